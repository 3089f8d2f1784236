"""One-line summary of a filter result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..filtering.result import FilterResult
from ..review.verdicts import Verdict
from ..utils.counted import counted, counted_of


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
        return f"{counts['removed']:,} of {counts['samples']:,} removed; {result.reason}."
    return (
        f"{counts['removed']:,} of {counts['samples']:,} removed (φ = {result.threshold:.3g}, "
        f"{_METHODS[result.method]}); {_what_people_found(result, verdicts)}."
    )


def _what_people_found(result: FilterResult, verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return "not checked by anyone"
    if all(verdict.drawn_from is None for verdict in verdicts):
        seen = counted_of(len({verdict.row for verdict in verdicts}), len(result.ids), "row", "have")
        return f"{seen} a verdict, but no row was drawn at random, so errors cannot be estimated"
    errors = _estimate_errors(result, verdicts)
    (kept_low, kept_high), (removed_low, removed_high) = errors
    drawn = len({verdict.row for verdict in verdicts if verdict.drawn_from is not None})
    return (
        f"{'well separated' if is_well_separated(result, *errors) else 'not shown to be well separated'}, with "
        f"{kept_low:,} to {kept_high:,} unsafe rows kept and {removed_low:,} to {removed_high:,} benign rows removed "
        f"(90 % intervals, from {counted(drawn, 'row')} drawn at random)"
    )


def is_well_separated(result: FilterResult, unsafe_kept: tuple[int, int], benign_removed: tuple[int, int]) -> bool:
    """Whether a filter is shown to separate unsafe rows from benign ones.

    The values of forgetting cannot show this: they can form two groups while half of the unsafe rows are in the lower
    one. So this test uses the 90 % intervals of the errors, from verdicts on rows drawn at random. At their upper ends,
    at most 10 % of the unsafe rows may be kept, and at most 10 % of the removed rows may be benign.
    """
    removed, kept_unsafe, removed_benign = result.counts["removed"], unsafe_kept[1], benign_removed[1]
    unsafe = kept_unsafe + removed - removed_benign
    return removed > 0 and removed_benign <= MAX_WRONG * removed and kept_unsafe <= MAX_WRONG * unsafe


def _estimate_errors(result: FilterResult, verdicts: Sequence[Verdict]) -> tuple[tuple[int, int], tuple[int, int]]:
    """90 % intervals of the number of unsafe rows that are kept, and of benign rows that are removed.

    A row that was drawn from all rows without a verdict was drawn from those on its side of φ too, so each side is
    estimated on its own.
    """
    from ..review.estimates import estimate_unsafe_rows  # imports scipy, which takes a second

    kept, removed = (
        estimate_unsafe_rows(_on_one_side(verdicts, side), int(side.sum()), np.full(side.sum(), is_removed))
        for side, is_removed in ((~result.removed, False), (result.removed, True))
    )
    return kept.unsafe_left, removed.benign_removed


def _on_one_side(verdicts: Sequence[Verdict], side: np.ndarray) -> list[Verdict]:
    """The verdicts on the rows in the mask `side`, as if the set consisted of these rows only."""
    order = list(dict.fromkeys(verdict.row for verdict in verdicts))
    seen_before = np.concatenate([[0], np.cumsum(side[order])])  # rows of this side among the first 0, 1, … rows
    places, numbers = {row: place for place, row in enumerate(order)}, np.cumsum(side) - 1
    found = []
    for verdict in verdicts:
        if side[verdict.row]:
            drawn_from = verdict.drawn_from
            if drawn_from is not None:
                before = min(len(side) - drawn_from, places[verdict.row])
                drawn_from = int(side.sum() - seen_before[before])
            found.append(replace(verdict, row=int(numbers[verdict.row]), drawn_from=drawn_from))
    return found
