"""Whether it pays to review more rows."""

from __future__ import annotations

import math
from typing import NamedTuple

from scipy.stats import binomtest

from ..utils.counted import counted
from .review_queue import ReviewQueue


# A review can stop after this many safe rows in succession that the ranking chose (see `safe_rows_needed`).
MIN_SAFE_ROWS, MAX_SAFE_ROWS = 15, 30
# If so many rows drawn at random are all safe, the 90 % interval ends at 5 % of the rows or below: .95 ** 45 / 2 < .05.
RANDOM_ROWS = 45


class StopAdvice(NamedTuple):
    """Whether a reviewer can stop.

    Attributes:
        is_enough (`bool`):
            Whether the review can stop.
        reason (`str`):
            The reason, in words for the reviewer.
    """

    is_enough: bool
    reason: str


def stop_advice(queue: ReviewQueue) -> StopAdvice:
    """Says whether it pays to review more rows."""
    if queue.is_known.all():
        return StopAdvice(True, "Every row has a verdict, so there is nothing left to look at.")
    drawn = {verdict.row for verdict in queue.verdicts if verdict.drawn_from is not None}
    if queue.random_fraction == 1:
        return StopAdvice(
            False, f"Every row is drawn at random ({len(drawn)} so far). Each verdict makes the interval narrower."
        )
    labels = queue.labels
    ranked = [label for row, label in labels.items() if row not in drawn]
    safe_in_succession = next((i for i, label in enumerate(reversed(ranked)) if label == "unsafe"), len(ranked))
    needed = safe_rows_needed(ranked.count("unsafe"), len(ranked) - safe_in_succession)
    if safe_in_succession < needed:
        reason = (
            f"Go on until the last {needed} rows that the ranking chose are all safe (now {safe_in_succession}; rows drawn "
            "at random do not count)."
        )
        if needed > MIN_SAFE_ROWS:
            reason += " Fewer are enough if it finds more unsafe rows."
        return StopAdvice(False, reason)
    ranked_are_safe = f"the last {safe_in_succession} rows that the ranking chose are safe"
    unsafe_drawn = sum(labels[row] == "unsafe" for row in drawn)
    if "unsafe" not in ranked and unsafe_drawn:
        return StopAdvice(
            True,
            f"It can pay to go on: {ranked_are_safe}, but {unsafe_drawn} of {counted(len(drawn), 'row')} drawn at random "
            "turned out to be unsafe. The ranking learns from such rows.",
        )
    if ranked.count("unsafe") + unsafe_drawn <= 1:
        found = "only one unsafe row" if "unsafe" in ranked else "no unsafe row"
        reason = (
            f"The ranking has found {found}: {ranked_are_safe}. Either there are hardly any, or this model does not rank "
            "them first. Go on if you want to find them."
        )
        if len(drawn) < RANDOM_ROWS:
            reason += (
                " To learn how many there can be, start the review again with `--random-fraction 1` (the verdicts are "
                f"kept): if {RANDOM_ROWS} rows drawn at random (so far {len(drawn)}) are all safe, at most about 5 % of the "
                "rows are unsafe."
            )
        else:
            reason += " The interval says how many there can be."
        return StopAdvice(True, reason)
    return StopAdvice(
        True,
        f"You can stop: {ranked_are_safe}. Only rows drawn at random (so far {len(drawn)}) count for the interval of "
        "unsafe rows, so it can be wide. To make it narrower, start the review again with `--random-fraction 1` (the "
        "verdicts are kept).",
    )


def safe_rows_needed(unsafe: int, chosen: int) -> int:
    """Says how many safe rows in succession end a review, given the rows before them.

    If the ranking still found unsafe rows at the lower bound of its hit rate so far (Clopper-Pearson, 95 %), so many safe
    rows in succession would have a probability of at most 1 %. The number is kept between 15 and 30, so with 30 the
    probability can be higher. This is a rule of thumb: the hit rate falls as unsafe rows are used up, the rule is applied
    after each row, and unsafe rows that the ranking cannot find are left.

    Args:
        unsafe (`int`):
            Rows that the ranking chose and that were found to be unsafe.
        chosen (`int`):
            Rows that the ranking chose up to and including the last of them.

    Returns:
        `int`: between 15 and 30. It is 30 if the ranking found nothing.
    """
    if unsafe == 0:
        return MAX_SAFE_ROWS
    hit_rate = binomtest(unsafe, chosen, alternative="greater").proportion_ci(0.95).low
    return min(max(math.ceil(math.log(0.01) / math.log1p(-hit_rate)), MIN_SAFE_ROWS), MAX_SAFE_ROWS)
