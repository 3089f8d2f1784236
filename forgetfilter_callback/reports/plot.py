"""Histogram of forgetting values as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..filtering.result import FilterResult


def plot_forgetting(result: FilterResult, file: str | Path, groups: Sequence[str] | None = None) -> None:
    """Writes the plot of a filter result to a PNG file. See [`FilterResult.plot`].

    Args:
        result ([`FilterResult`]):
            The filter result.
        file (`str` or `Path`):
            The PNG file to write.
        groups (`Sequence[str]` of length `samples`, *optional*):
            Audit label of each sample.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    result.plot(groups).savefig(file, dpi=150)
