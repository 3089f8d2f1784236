"""One-line summary of a filter result."""

from __future__ import annotations

from ..filtering.result import FilterResult
from ..filtering.thresholds import MIN_DISTANCE


_METHODS = {
    "auto": "chosen automatically, not checked by anyone",
    "fixed": "set by the user",
    "fraction": "set by the requested fraction",
}


def page_summary(result: FilterResult) -> str:
    """Summarizes how many samples are removed, φ, how φ was chosen, and whether the samples are well separated."""
    counts = result.counts
    if result.threshold is None:
        return f"{counts['removed']:,} of {counts['samples']:,} removed: {result.reason}."
    separability = result.separability
    well_separated = (
        separability.separable and separability.distance is not None and separability.distance >= MIN_DISTANCE
    )
    return (
        f"{counts['removed']:,} of {counts['samples']:,} removed (φ = {result.threshold:.3g}, "
        f"{_METHODS[result.method]}); {'well separated' if well_separated else 'not well separated'}."
    )
