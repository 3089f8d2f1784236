"""Histogram of forgetting values as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..filtering.result import FilterResult
from ..measures.names import UNITS
from ..utils.counted import counted
from ..utils.optional_packages import requires_extra


_COLORS = {"unsafe": "tab:red", "safe": "tab:green", "task": "tab:blue", "samples": "tab:blue"}


def plot_forgetting(result: FilterResult, file: str | Path, groups: Sequence[str] | None = None) -> None:
    """Plots a histogram of the forgetting values, with φ as a dashed line.

    Args:
        result ([`FilterResult`]):
            The filter result.
        file (`str` or `Path`):
            The PNG file to write.
        groups (`Sequence[str]` of length `samples`, *optional*):
            Audit label of each sample. Groups are drawn as stacked colors; they do not affect the filter result.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    with requires_extra("report", "The plot"):
        from matplotlib.figure import Figure

    known = np.isfinite(result.values)
    values = result.values[known]
    labels = np.asarray(groups if groups is not None else ["samples"] * len(result.values))[known]
    names = sorted(set(labels.tolist()))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(
        [values[labels == name] for name in names],
        bins=min(60, max(10, len(values) // 4)),
        stacked=True,
        label=[f"{name} ({(labels == name).sum()})" for name in names],
        color=[_COLORS.get(name) or f"C{index}" for index, name in enumerate(names)],
    )
    if result.threshold is not None:
        axes.axvline(result.threshold, color="black", linestyle="--", label=f"φ = {result.threshold:.3g}")
    counts = result.counts
    axes.set_title(f"{counts['removed']:,} of {counted(counts['samples'], 'sample')} removed ({result.method} φ)")
    axes.set_xlabel(f"{result.measure} forgetting [{UNITS[result.measure]}], higher is more forgotten")
    axes.set_ylabel("samples (stacked)" if len(names) > 1 else "samples")
    axes.legend()
    figure.savefig(file, dpi=150)
