"""Plots of a trace: losses by record, and a histogram of forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import TraceError
from ..measures.names import UNITS, Measure
from ..utils.optional_packages import requires_extra
from .records import BASE_RECORD


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .trace import Trace

COLORS = {"unsafe": "tab:red", "safe": "tab:green", "task": "tab:blue", "samples": "tab:blue"}
BANDS = ((1, 99), (10, 90), (25, 75))  # percentiles


def new_figure(width: float, height: float = 4.5) -> Figure:
    """A figure that a notebook shows once: as the value of a cell, and not again as an open figure of pyplot.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    with requires_extra("report", "The plot"):
        # A figure without pyplot would be shown as text.
        import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(figure)
    return figure


def plot_trace(trace: Trace, measure: Measure) -> Figure:
    """See [`Trace.plot`]."""
    values = None
    try:
        values = trace.forgetting(measure)
    except TraceError:
        steps = [record.step for record in trace.records() if record.session == "safety"]
        if 0 in steps and len(steps) > 1:  # the trace lacks what this measure needs; others can be computed
            raise
    figure = new_figure(9 if values is None else 12)
    if values is None:
        _draw_losses(figure.subplots(), trace)
        return figure
    left, right = figure.subplots(1, 2)
    _draw_losses(left, trace)
    draw_histogram(right, values, measure)
    return figure


def _draw_losses(axes: Axes, trace: Trace) -> None:
    # A record of the base model that holds only a sample of the rows is left out.
    records = [record for record in trace.records() if record != BASE_RECORD or trace.base_record is not None]
    losses = np.array([trace.mean_losses(record) for record in records]).reshape(-1, len(trace.rows))
    places = np.arange(len(losses))
    known = losses[:, np.isfinite(losses).all(axis=0)]
    if known.size:
        for low, high in BANDS:
            axes.fill_between(
                places,
                *np.percentile(known, [low, high], axis=1),
                color="tab:blue",
                alpha=0.2,
                linewidth=0,
                label=f"{low} % to {high} % of the rows",
            )
        axes.plot(places, np.median(known, axis=1), color="tab:blue", marker="o", label="median")
        axes.legend()
    names = [f"{record.session}\n{record.step}" for record in records]
    axes.set_xticks(places, names)
    axes.set_xlabel("session and step of the record")
    axes.set_ylabel("mean loss of a sample [nats per token]")
    axes.set_title("Losses of the noisy set")


def draw_histogram(axes: Axes, values: np.ndarray, measure: Measure, groups: Sequence[str] | None = None) -> None:
    """Draws a histogram of forgetting values. Values that are not finite are left out.

    Args:
        axes ([`matplotlib.axes.Axes`]):
            Where to draw.
        values (`np.ndarray` of shape `(samples,)`):
            Forgetting.
        measure (`str`):
            The measure of the values.
        groups (`Sequence[str]` of length `samples`, *optional*):
            Group of each sample. Groups are stacked.
    """
    known = np.isfinite(values)
    labels = np.asarray(groups if groups is not None else ["samples"] * len(values))[known]
    values = values[known]
    names = sorted(set(labels.tolist()))
    if names:
        axes.hist(
            [values[labels == name] for name in names],
            bins=min(60, max(10, len(values) // 4)),
            stacked=True,
            label=[f"{name} ({(labels == name).sum()})" for name in names],
            color=[COLORS.get(name) or f"C{index}" for index, name in enumerate(names)],
        )
    axes.set_xlabel(f"{measure} forgetting [{UNITS[measure]}], higher is more forgotten")
    axes.set_ylabel("rows (stacked)" if len(names) > 1 else "rows")
    axes.set_title("Forgetting")
