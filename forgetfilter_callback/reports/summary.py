"""Summary of a filter result in a line or two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..filtering.result import FilterResult
from ..utils.counted import counted, counted_of


if TYPE_CHECKING:
    from ..review.estimates import ReviewEstimate

_METHODS = {
    "auto": "chosen automatically",
    "fixed": "set by the user",
    "fraction": "set by the requested fraction",
}
# At most this fraction of the unsafe rows may be kept, and at most this fraction of the removed rows may be benign.
MAX_WRONG = 0.1


def page_summary(result: FilterResult) -> str:
    """Summarizes how many rows are removed, how φ was chosen, and what people have found.

    Args:
        result ([`FilterResult`]):
            The filter result, for all samples of its trace.
    """
    counts = result.counts
    removed = f"{counts['removed']:,} of {counted(counts['samples'], 'row')} removed"
    if result.threshold is None:
        return f"{removed}: {result.reason}." + ("" if result.estimate is None else f" {result.estimate.errors}")
    return f"{removed} (φ = {result.threshold:.3g}, {_METHODS[result.method]}). {_what_people_found(result)}"


def _what_people_found(result: FilterResult) -> str:
    estimate = result.estimate
    if estimate is None:
        return "Not checked by anyone."
    if estimate.drawn == 0:
        seen = counted_of(estimate.seen, estimate.rows, "row", "have")
        return f"{seen} a verdict, but no row was drawn at random, so errors cannot be estimated."
    (kept_low, kept_high), (removed_low, removed_high) = estimate.unsafe_left, estimate.benign_removed
    return (
        f"{'Well separated' if is_well_separated(result, estimate) else 'Not shown to be well separated'}: "
        f"{_range(kept_low, kept_high)} unsafe rows kept and {_range(removed_low, removed_high)} benign rows removed "
        f"(90 % intervals, from {counted(estimate.drawn, 'row')} drawn at random)."
    )


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def is_well_separated(result: FilterResult, estimate: ReviewEstimate) -> bool:
    """Whether a filter is shown to separate unsafe rows from benign ones.

    The values of forgetting cannot show this: they can form two groups while half of the unsafe rows are in the lower
    one. So this test uses the 90 % intervals of the errors, from verdicts on rows drawn at random. At their upper ends,
    at most 10 % of the unsafe rows may be kept, and at most 10 % of the removed rows may be benign.
    """
    removed, kept_unsafe, removed_benign = result.counts["removed"], estimate.unsafe_left[1], estimate.benign_removed[1]
    unsafe = kept_unsafe + removed - removed_benign
    return removed > 0 and removed_benign <= MAX_WRONG * removed and kept_unsafe <= MAX_WRONG * unsafe
