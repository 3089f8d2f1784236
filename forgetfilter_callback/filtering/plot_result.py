"""Histogram of forgetting values, with φ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..trace.plot_trace import draw_histogram, new_figure
from ..utils.counted import counted


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .result import FilterResult


def plot_result(result: FilterResult, groups: Sequence[str] | None = None) -> Figure:
    """See [`FilterResult.plot`]."""
    figure = new_figure(8)
    axes = figure.subplots()
    draw_histogram(axes, result.values, result.measure, groups)
    if result.threshold is not None:
        axes.axvline(result.threshold, color="black", linestyle="--", label=f"φ = {result.threshold:.3g}")
    counts = result.counts
    axes.set_title(f"{counts['removed']:,} of {counted(counts['samples'], 'row')} removed ({result.method} φ)")
    axes.legend()
    return figure
