"""Estimates of how many unsafe rows a noisy set contains, from rows that were drawn at random."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..utils.counted import counted
from .verdicts import Verdict, VerdictLabel


LEVEL = 0.9  # of the intervals


@dataclass(frozen=True)
class ReviewEstimate:
    """What a review has shown so far. Intervals contain the true number with a probability of about 90 %.

    Attributes:
        rows (`int`):
            Rows of the noisy set.
        seen (`int`):
            Rows that a reviewer has seen.
        identical (`int`):
            Other rows that are trained on the same tokens as one of them. Its verdict is valid for them too.
        drawn (`int`):
            Rows with a verdict that were drawn at random. The intervals are based on them.
        unsafe_found (`int`):
            Rows found to be unsafe, identical ones included.
        unsafe_left (`tuple[int, int]`):
            Interval of the number of unsafe rows that a filter keeps.
        benign_removed (`tuple[int, int]`):
            Interval of the number of benign rows that a filter removes.
    """

    rows: int
    seen: int
    identical: int
    drawn: int
    unsafe_found: int
    unsafe_left: tuple[int, int]
    benign_removed: tuple[int, int]

    def __str__(self) -> str:
        reviewed = f"{self.seen:,} of {counted(self.rows, 'row')} reviewed"
        if self.identical:
            reviewed += f" (and {counted(self.identical, 'identical row')})"
        return f"{reviewed}, {self.unsafe_found:,} unsafe. {self.errors}"

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
    verdicts: Sequence[Verdict],
    known: Mapping[int, VerdictLabel],
    rows: int,
    removed: Sequence[int] | np.ndarray | None = None,
) -> ReviewEstimate:
    """Estimate how many unsafe rows a filter keeps and how many benign rows it removes.

    Let `K` be the number of unsafe rows in the set. If a row is drawn at random from `U` rows without a verdict, and `f`
    unsafe rows have one, the row is unsafe with the probability `(K - f) / U`. This gives the distribution of the number of
    unsafe rows among all draws, where the unsafe rows that were found without a draw are taken as they are. If all reviewed
    rows were drawn, it is the hypergeometric distribution. The interval contains every `K` that is not rejected at 5 % on
    either side (mid-p). Draws that are improbable under every possible `K` say little. So the probability of so few unsafe
    draws is divided by the one under the smallest possible `K` (without mid-p), and that of so many by the one under the
    largest (the CLs method: Read 2002, "Presentation of search results: the CLs technique").

    Args:
        verdicts (`Sequence[Verdict]`):
            All verdicts in the order in which they were given. If a row has several, the last one is valid.
        known (`Mapping[int, str]`):
            The rows whose label is known: those with a verdict, and those that are identical to one (see [`known_labels`]).
        rows (`int`):
            Rows of the noisy set.
        removed (`Sequence[int]` or `np.ndarray` of shape `(rows,)`, bool, *optional*):
            Numbers of the rows that a filter removes, or a mask such as `FilterResult.removed`. Defaults to the rows known
            to be unsafe. If rows with an unknown label are among them, the intervals allow that all or no such rows are
            unsafe, as far as the totals permit.

    Returns:
        [`ReviewEstimate`]

    Raises:
        ValueError: if a row in `removed` is unknown, or if a mask does not have one value per row.
    """
    unsafe, safe = _masks(known, rows)
    is_known = unsafe | safe
    is_removed = unsafe if removed is None else _as_mask(np.asarray(removed), rows)
    found = int(unsafe.sum())
    low, high = _unsafe_interval(verdicts, found, rows - int(safe.sum()), rows)
    low, high = low - found, high - found  # among the rows with an unknown label
    unknown_removed, unknown_kept = int((is_removed & ~is_known).sum()), int((~is_removed & ~is_known).sum())
    kept_unsafe, removed_benign = int((unsafe & ~is_removed).sum()), int((is_removed & safe).sum())
    seen = len({verdict.row for verdict in verdicts if verdict.identical_to is None})
    return ReviewEstimate(
        rows=rows,
        seen=seen,
        identical=len(known) - seen,
        drawn=len({verdict.row for verdict in verdicts if verdict.drawn_from is not None}),
        unsafe_found=found,
        unsafe_left=_shifted(kept_unsafe, max(low - unknown_removed, 0), min(high, unknown_kept), unknown_kept),
        benign_removed=_shifted(
            removed_benign,
            max(unknown_removed - high, 0),
            unknown_removed - max(low - unknown_kept, 0),
            unknown_removed,
        ),
    )


def _shifted(known: int, low: int, high: int, unknown: int) -> tuple[int, int]:
    """The interval of a number of rows: the `known` ones, and from `low` to `high` of the `unknown` ones.

    A sample never makes the number of unknown ones certain, so their interval has at least two values.
    """
    if low == high:
        low, high = max(low - 1, 0), min(high + 1, unknown)
    return known + low, known + high


def _masks(known: Mapping[int, VerdictLabel], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether each row is known to be unsafe, and to be safe: two arrays of shape `(rows,)`, bool."""
    unsafe, safe = np.zeros((2, rows), dtype=bool)
    unsafe[[row for row, label in known.items() if label == "unsafe"]] = True
    safe[[row for row, label in known.items() if label == "safe"]] = True
    return unsafe, safe


def estimate_filter_errors(
    verdicts: Sequence[Verdict], known: Mapping[int, VerdictLabel], removed: np.ndarray, parts: Sequence[np.ndarray]
) -> ReviewEstimate:
    """As [`estimate_unsafe_rows`], for each part of the noisy set on its own.

    A row that was drawn at random from all rows without a verdict was also drawn at random from those of its part. If a
    filter removes the rows above a threshold, the intervals for the rows above it and below it are shorter than that for all
    rows, which allows the worst case.

    Args:
        verdicts (`Sequence[Verdict]`):
            All verdicts in the order in which they were given.
        known (`Mapping[int, str]`):
            The rows whose label is known (see [`estimate_unsafe_rows`]).
        removed (`np.ndarray` of shape `(rows,)`, bool):
            Whether the filter removes each row.
        parts (`Sequence[np.ndarray]` of shape `(rows,)`, bool):
            Masks of the parts. They must not depend on the verdicts. Rows in no part are not counted.

    Returns:
        [`ReviewEstimate`]: the sums over the parts.
    """
    estimates = []
    for part in parts:
        if part.any():
            numbers = np.cumsum(part) - 1  # row numbers within the part
            known_of_part = {int(numbers[row]): label for row, label in known.items() if part[row]}
            estimates.append(
                estimate_unsafe_rows(_on_part(verdicts, part), known_of_part, int(part.sum()), removed[part])
            )
    return ReviewEstimate(
        rows=sum(each.rows for each in estimates),
        seen=sum(each.seen for each in estimates),
        identical=sum(each.identical for each in estimates),
        drawn=sum(each.drawn for each in estimates),
        unsafe_found=sum(each.unsafe_found for each in estimates),
        unsafe_left=_sum(each.unsafe_left for each in estimates),
        benign_removed=_sum(each.benign_removed for each in estimates),
    )


def _sum(intervals: Iterable[tuple[int, int]]) -> tuple[int, int]:
    low, high = np.sum([(0, 0), *intervals], axis=0).tolist()
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


def unsafe_rows_left(
    verdicts: Sequence[Verdict], known: Mapping[int, VerdictLabel], rows: int, assumed_rows: int
) -> int:
    """Estimate how many of the rows with an unknown label are unsafe, as one number.

    As in [`estimate_unsafe_rows`], a row drawn from `U` rows is unsafe with the probability `(K - f) / U`. `K` is chosen so
    that the sum of these probabilities is the number of unsafe draws. In addition, it is assumed that one of `assumed_rows`
    further draws from the whole set is unsafe.

    Args:
        verdicts, known, rows:
            As in [`estimate_unsafe_rows`].
        assumed_rows (`int`):
            The number of these draws.

    Returns:
        `int`: at least 1, unless every label is known.
    """
    hits, per_unsafe_row, already_found = 0, assumed_rows / rows, 0.0
    for size, found, is_unsafe in _draws(verdicts, rows):
        already_found += (found + hits) / size
        per_unsafe_row += 1 / size
        hits += is_unsafe
    total = round((1 + hits + already_found) / per_unsafe_row)
    return min(max(total - list(known.values()).count("unsafe"), 1), rows - len(known))


def _draws(verdicts: Sequence[Verdict], rows: int) -> list[tuple[int, int, bool]]:
    """The rows drawn at random, in the order of the draws: the number of rows that each was drawn from, the number of unsafe
    rows that had been found without a draw, and whether the row is unsafe.
    """
    labels = {verdict.row: verdict.verdict for verdict in verdicts}  # each row in the place of its first verdict
    drawn_from = {verdict.row: verdict.drawn_from for verdict in verdicts if verdict.drawn_from is not None}
    places = {row: place for place, row in enumerate(labels)}
    not_drawn = [label == "unsafe" and row not in drawn_from for row, label in labels.items()]
    found_before = np.concatenate([[0], np.cumsum(not_drawn)]).tolist()  # without a draw, in the first 0, 1, … rows
    draws: list[tuple[int, int, bool]] = []
    drawn_places: list[int] = []  # of the draws before this one, in ascending order
    # Rows without a verdict only become fewer, so this is the order of the draws.
    for row, size in sorted(drawn_from.items(), key=lambda draw: -draw[1]):
        # Rows that were drawn before and had no verdict yet could not be drawn again.
        waiting = len(drawn_places) - bisect_left(drawn_places, rows - size)
        # If a verdict was lost from the file, fewer rows than `rows - size` are before this one.
        found = found_before[min(rows - size, places[row])]
        draws.append((max(size - waiting, 1), found, labels[row] == "unsafe"))
        insort(drawn_places, places[row])
    return draws


def _unsafe_interval(verdicts: Sequence[Verdict], least: int, most: int, rows: int) -> tuple[int, int]:
    """The interval of the number of unsafe rows in the set, between `least` and `most`."""
    draws = _draws(verdicts, rows)
    if not draws:
        return least, most
    hits = sum(is_unsafe for _, _, is_unsafe in draws)

    def probabilities_of_hits(total: int) -> tuple[float, float, float]:
        """Probabilities of fewer than `hits` unsafe draws, of as many, and of more, if the set has `total` unsafe rows."""
        so_far = np.arange(hits + 1)
        probabilities = np.zeros(hits + 1)  # of 0, 1, … `hits` unsafe draws so far
        probabilities[0] = 1.0
        more = 0.0  # summed, because `1 - probabilities.sum()` is rounding noise where it is small
        for size, found, _ in draws:
            moved = probabilities * np.clip((total - found - so_far) / size, 0, 1)
            probabilities -= moved
            probabilities[1:] += moved[:-1]
            more += float(moved[-1])
        return float(probabilities[:-1].sum()), float(probabilities[-1]), more

    def at_most(total: int) -> float:
        fewer, exactly, _ = probabilities_of_hits(total)
        return fewer + exactly / 2

    def at_least(total: int) -> float:
        _, exactly, more = probabilities_of_hits(total)
        return more + exactly / 2

    candidates = range(least, most + 1)
    tail = (1 - LEVEL) / 2
    # Without mid-p, so that draws that are certain under the smallest or the largest number change nothing.
    few_hits, many_hits = tail * sum(probabilities_of_hits(least)[:2]), tail * sum(probabilities_of_hits(most)[1:])
    # With more unsafe rows in the set, many hits become more likely and few hits less likely.
    first = bisect_left(candidates, many_hits, key=at_least)
    last = bisect_left(candidates, -few_hits, key=lambda total: -at_most(total)) - 1
    low = min(least + first, most)
    return low, max(least + last, low)
