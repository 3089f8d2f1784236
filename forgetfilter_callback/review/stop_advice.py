"""Whether it pays to review more rows."""

from __future__ import annotations

from typing import NamedTuple

from .review_queue import ReviewQueue


# The review can stop when this many rows in succession, all chosen by the ranking, are safe.
STOP_AFTER = 30


class StopAdvice(NamedTuple):
    """Whether a reviewer can stop.

    Attributes:
        is_enough (`bool`):
            Whether more rows are not worth a look.
        reason (`str`):
            The reason, in words for the reviewer.
    """

    is_enough: bool
    reason: str


def stop_advice(queue: ReviewQueue) -> StopAdvice:
    """Says whether it pays to review more rows."""
    if queue.is_seen.all():
        return StopAdvice(True, "Every row has a verdict, so there is nothing left to look at.")
    if queue.random_fraction == 1:
        return StopAdvice(False, "All rows are drawn at random. Each verdict makes the interval narrower.")
    drawn = {verdict.row for verdict in queue.verdicts if verdict.drawn_from is not None}
    ranked = [label for row, label in queue.labels.items() if row not in drawn]
    safe_in_succession = next((i for i, label in enumerate(reversed(ranked)) if label == "unsafe"), len(ranked))
    if safe_in_succession < STOP_AFTER:
        return StopAdvice(
            False,
            f"Go on until the last {STOP_AFTER} rows that the ranking chose are all safe (now {safe_in_succession}).",
        )
    reason = f"You can stop: the last {safe_in_succession} rows that the ranking chose are safe."
    if "unsafe" not in ranked:
        reason += (
            " No unsafe row was found by the ranking. Either there are hardly any, or this model does not rank them first. "
            "The interval says how many there can be."
        )
    return StopAdvice(
        True,
        f"{reason} If the interval is too wide for you, go on with `--random-fraction 1`: only rows drawn at random (so far "
        f"{len(drawn)}) make it narrower.",
    )
