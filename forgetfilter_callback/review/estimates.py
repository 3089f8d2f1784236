"""Estimates of how many unsafe rows a noisy set contains, from rows that were drawn at random."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import poisson_binom

from ..utils.counted import counted
from .verdicts import Verdict


LEVEL = 0.9  # of the intervals


@dataclass(frozen=True)
class ReviewEstimate:
    """What a review has shown so far. Intervals contain the true number with a probability of about 90 %.

    Attributes:
        rows (`int`):
            Rows of the noisy set.
        seen (`int`):
            Rows with a verdict.
        drawn (`int`):
            Rows with a verdict that were drawn at random. The intervals are based on them.
        unsafe_found (`int`):
            Rows found to be unsafe.
        unsafe_left (`tuple[int, int]`):
            Interval of the number of unsafe rows that a filter keeps.
        benign_removed (`tuple[int, int]`):
            Interval of the number of benign rows that a filter removes.
    """

    rows: int
    seen: int
    drawn: int
    unsafe_found: int
    unsafe_left: tuple[int, int]
    benign_removed: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.seen:,} of {counted(self.rows, 'row')} reviewed, {self.unsafe_found:,} unsafe. {self.errors}"

    @property
    def errors(self) -> str:
        """Both intervals in words."""
        return (
            f"Unsafe rows that are kept: {self._describe(self.unsafe_left)}. "
            f"Benign rows that are removed: {self._describe(self.benign_removed)}."
        )

    def _describe(self, interval: tuple[int, int]) -> str:
        low, high = interval
        if low == high:
            return f"{low:,}"
        if self.drawn == 0:
            return "not known, because no reviewed row was drawn at random"
        return f"{low:,} to {high:,} (90 % interval, from {counted(self.drawn, 'row')} drawn at random)"


def estimate_unsafe_rows(
    verdicts: Sequence[Verdict], rows: int, removed: Sequence[int] | np.ndarray | None = None
) -> ReviewEstimate:
    """Estimate how many unsafe rows a filter keeps and how many benign rows it removes.

    A row that is drawn at random from the `U` rows without a verdict is unsafe with the probability `(K - f) / U`, where `K`
    is the number of unsafe rows in the set and `f` the number found before. The number of unsafe rows among all draws
    therefore has a Poisson binomial distribution. The interval contains every `K` that this distribution does not reject at
    5 % on either side (mid-p). What the other rows of a round show is known and needs no estimate.

    Args:
        verdicts (`Sequence[Verdict]`):
            All verdicts in the order in which they were given. If a row has several, the last one is valid.
        rows (`int`):
            Rows of the noisy set.
        removed (`Sequence[int]` or `np.ndarray` of shape `(rows,)`, bool, *optional*):
            Numbers of the rows that a filter removes, or a mask such as `FilterResult.removed`. Defaults to the rows found
            to be unsafe. If rows without a verdict are among them, the intervals allow that all or no such rows are unsafe,
            as far as the totals permit.

    Returns:
        [`ReviewEstimate`]

    Raises:
        ValueError: if a row in `removed` is unknown, or if a mask does not have one value per row.
    """
    labels = {verdict.row: verdict.verdict for verdict in verdicts}
    unsafe = np.zeros(rows, dtype=bool)
    unsafe[[row for row, label in labels.items() if label == "unsafe"]] = True
    seen = np.zeros(rows, dtype=bool)
    seen[list(labels)] = True
    is_removed = unsafe if removed is None else _as_mask(np.asarray(removed), rows)
    found = int(unsafe.sum())
    low, high = _unsafe_interval(verdicts, unsafe, rows)
    low, high = low - found, high - found  # among the rows without a verdict
    unseen_removed, unseen_kept = int((is_removed & ~seen).sum()), int((~is_removed & ~seen).sum())
    kept_unsafe, removed_benign = int((unsafe & ~is_removed).sum()), int((is_removed & seen & ~unsafe).sum())
    return ReviewEstimate(
        rows=rows,
        seen=len(labels),
        drawn=len({verdict.row for verdict in verdicts if verdict.drawn_from is not None}),
        unsafe_found=found,
        unsafe_left=(kept_unsafe + max(low - unseen_removed, 0), kept_unsafe + min(high, unseen_kept)),
        benign_removed=(
            removed_benign + max(unseen_removed - high, 0),
            removed_benign + unseen_removed - max(low - unseen_kept, 0),
        ),
    )


def estimate_filter_errors(
    verdicts: Sequence[Verdict], removed: np.ndarray, parts: Sequence[np.ndarray]
) -> ReviewEstimate:
    """As [`estimate_unsafe_rows`], for each part of the noisy set on its own.

    A row that was drawn at random from all rows without a verdict was also drawn at random from those of its part. If a
    filter removes the rows above a threshold, the intervals for the rows above it and below it are shorter than that for all
    rows, which allows the worst case.

    Args:
        verdicts (`Sequence[Verdict]`):
            All verdicts in the order in which they were given.
        removed (`np.ndarray` of shape `(rows,)`, bool):
            Whether the filter removes each row.
        parts (`Sequence[np.ndarray]` of shape `(rows,)`, bool):
            Masks of the parts. They must not depend on the verdicts. Rows in no part are not counted.

    Returns:
        [`ReviewEstimate`]: the sums over the parts.
    """
    estimates = [
        estimate_unsafe_rows(_on_part(verdicts, part), int(part.sum()), removed[part]) for part in parts if part.any()
    ]
    return ReviewEstimate(
        rows=sum(each.rows for each in estimates),
        seen=sum(each.seen for each in estimates),
        drawn=sum(each.drawn for each in estimates),
        unsafe_found=sum(each.unsafe_found for each in estimates),
        unsafe_left=_sum(each.unsafe_left for each in estimates),
        benign_removed=_sum(each.benign_removed for each in estimates),
    )


def _sum(intervals: Iterable[tuple[int, int]]) -> tuple[int, int]:
    low, high = np.sum([*intervals], axis=0).tolist()
    return low, high


def _on_part(verdicts: Sequence[Verdict], part: np.ndarray) -> list[Verdict]:
    """The verdicts on the rows in the mask `part`, as if the set consisted of these rows only."""
    order = list(dict.fromkeys(verdict.row for verdict in verdicts))
    seen_before = np.concatenate([[0], np.cumsum(part[order])])  # rows of this part among the first 0, 1, … rows
    places, numbers = {row: place for place, row in enumerate(order)}, np.cumsum(part) - 1
    size = int(part.sum())
    found = []
    for verdict in verdicts:
        if part[verdict.row]:
            drawn_from = verdict.drawn_from
            if drawn_from is not None:
                before = min(len(part) - drawn_from, places[verdict.row])
                drawn_from = size - int(seen_before[before])
            found.append(replace(verdict, row=int(numbers[verdict.row]), drawn_from=drawn_from))
    return found


def _as_mask(removed: np.ndarray, rows: int) -> np.ndarray:
    """Return a mask of shape `(rows,)` for row numbers, or `removed` itself if it is one."""
    if removed.dtype == np.bool_:
        if removed.shape != (rows,):
            raise ValueError(f"`removed` is a mask of shape {removed.shape}, but the set has {counted(rows, 'row')}.")
        return removed
    if removed.ndim != 1 or (len(removed) and not np.issubdtype(removed.dtype, np.integer)):
        raise ValueError(f"`removed` must be row numbers or a mask of bool, not an array of {removed.dtype}.")
    numbers = removed.astype(int)
    if len(np.unique(numbers)) < len(numbers):
        raise ValueError("`removed` has the same row number twice. For a mask, pass an array of bool.")
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < rows:
        raise ValueError(
            f"`removed` has row numbers from {numbers.min()} to {numbers.max()}, but the set has the rows 0 to {rows - 1}."
        )
    mask = np.zeros(rows, dtype=bool)
    mask[numbers] = True
    return mask


def _unsafe_interval(verdicts: Sequence[Verdict], unsafe: np.ndarray, rows: int) -> tuple[int, int]:
    """The interval of the number of unsafe rows in the set."""
    order = list(dict.fromkeys(verdict.row for verdict in verdicts))  # each row once, by its first verdict
    found_before = np.concatenate([[0], np.cumsum(unsafe[order])]).astype(int)
    drawn_from = {verdict.row: verdict.drawn_from for verdict in verdicts if verdict.drawn_from is not None}
    found = int(found_before[-1])
    most = rows - (len(order) - found)  # the rows found to be safe are not unsafe
    if not drawn_from:
        return found, most
    sizes = np.array(list(drawn_from.values()))
    # If a verdict was lost from the file, a row has fewer rows before it in `order` than there were verdicts at its draw.
    places = {row: place for place, row in enumerate(order)}
    found_at_draw = found_before[np.minimum(rows - sizes, [places[row] for row in drawn_from])]
    hits = int(unsafe[list(drawn_from)].sum())

    def tails(total: int) -> tuple[float, float]:
        """Mid-p probabilities of at most, and of at least, `hits` unsafe draws if the set has `total` unsafe rows."""
        probabilities = poisson_binom.pmf(np.arange(hits + 1), np.clip((total - found_at_draw) / sizes, 0, 1))
        below, exactly = float(probabilities[:-1].sum()), float(probabilities[-1])
        return below + exactly / 2, 1 - below - exactly / 2

    candidates = range(found, most + 1)
    tail = (1 - LEVEL) / 2
    # With more unsafe rows in the set, many hits become more likely and few hits less likely.
    first = bisect_left(candidates, tail, key=lambda total: tails(total)[1])
    last = bisect_left(candidates, -tail, key=lambda total: -tails(total)[0]) - 1
    return min(found + first, most), max(found + last, found)
