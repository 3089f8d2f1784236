"""TODO"""

from __future__ import annotations

from ..filtering.result import FilterResult
from ..thresholds import MIN_DISTANCE


def page_summary(result: FilterResult) -> str:
    """What was decided, in plain words."""
    counts = result.counts
    if result.threshold is None:
        return f"Nothing removed of {counts['samples']:,}: {result.reason}."
    how = {"auto": "chosen automatically", "fixed": "given by hand", "fraction": "so that a given share goes"}[
        result.method
    ]
    found = result.separability
    is_apart = found.separable and found.distance is not None and found.distance >= MIN_DISTANCE
    apart = "well separated" if is_apart else "not well separated"
    return f"{counts['removed']:,} of {counts['samples']:,} removed (φ = {result.threshold:.3g}, {how}); {apart}."
