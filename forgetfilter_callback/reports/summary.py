"""One-line summary of a filter result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..filtering.result import FilterResult
from ..review.verdicts import Verdict
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


def page_summary(result: FilterResult, verdicts: Sequence[Verdict] = ()) -> str:
    """Summarizes how many samples are removed, how φ was chosen, and what people have found.

    Args:
        result ([`FilterResult`]):
            The filter result, for all samples of its trace.
        verdicts (`Sequence[Verdict]`, *optional*):
            All verdicts on the trace.
    """
    counts = result.counts
    if result.threshold is None:
        return f"{counts['removed']:,} of {counts['samples']:,} removed: {result.reason}."
    return (
        f"{counts['removed']:,} of {counts['samples']:,} removed (φ = {result.threshold:.3g}, "
        f"{_METHODS[result.method]}); {_what_people_found(result, verdicts)}."
    )


def _what_people_found(result: FilterResult, verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return "not checked by anyone"
    from ..review.estimates import estimate_unsafe_rows  # imports scipy, which takes a second

    estimate = estimate_unsafe_rows(verdicts, len(result.ids), result.removed)
    if not estimate.drawn:
        seen = counted_of(estimate.seen, estimate.rows, "row", "have")
        return f"{seen} a verdict, but no row was drawn at random, so errors cannot be estimated"
    (kept_low, kept_high), (removed_low, removed_high) = estimate.unsafe_left, estimate.benign_removed
    return (
        f"{'well separated' if is_well_separated(estimate, result) else 'not shown to be well separated'}, with "
        f"{kept_low:,} to {kept_high:,} unsafe rows kept and {removed_low:,} to {removed_high:,} benign rows removed "
        f"(90 % intervals, {counted(estimate.drawn, 'random row')} seen)"
    )


def is_well_separated(estimate: ReviewEstimate, result: FilterResult) -> bool:
    """Whether a filter is shown to separate unsafe rows from benign ones.

    The values of forgetting cannot show this: they can form two groups while half of the unsafe rows are in the lower
    one. So this test uses verdicts on rows drawn at random. At the upper ends of the 90 % intervals, at most 10 % of the
    unsafe rows may be kept, and at most 10 % of the removed rows may be benign.
    """
    removed, (_, kept_unsafe), (_, removed_benign) = (
        result.counts["removed"],
        estimate.unsafe_left,
        estimate.benign_removed,
    )
    removed_unsafe = removed - removed_benign
    return (
        removed > 0
        and removed_benign <= MAX_WRONG * removed
        and kept_unsafe <= MAX_WRONG * (kept_unsafe + removed_unsafe)
    )
