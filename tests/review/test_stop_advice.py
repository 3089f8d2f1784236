"""When a review is told to end."""

from __future__ import annotations

from math import comb

import pytest
from test_review_queue import make_trace

from forgetfilter_callback import ReviewQueue
from forgetfilter_callback.review.estimates import estimate_unsafe_rows
from forgetfilter_callback.review.stop_advice import MAX_SAFE_ROWS, RANDOM_ROWS, safe_rows_needed, stop_advice
from forgetfilter_callback.review.verdicts import Verdict


NOT_COUNTED = "rows drawn at random do not count)."
FEWER = " Fewer are enough if it finds more unsafe rows."


@pytest.fixture
def queue(tmp_path) -> ReviewQueue:
    return ReviewQueue(make_trace(tmp_path, rows=80, unsafe=4)[0])


def review_until_enough(queue: ReviewQueue) -> None:
    while not stop_advice(queue).is_enough:
        queue.add(dict.fromkeys(queue.next(1), "safe"))


def add_unsafe_rows(queue: ReviewQueue, count: int) -> None:
    """Adds unsafe rows that the ranking chose."""
    queue.random_fraction = 0
    for _ in range(count):
        queue.add(dict.fromkeys(queue.next(1), "unsafe"))
    queue.random_fraction = 0.1


def test_a_review_can_stop_after_safe_rows_that_the_ranking_chose(queue):
    assert stop_advice(queue) == (
        False,
        "Go on until the last 30 rows that the ranking chose are all safe (now 0; rows drawn at random do not count). "
        "Fewer are enough if it finds more unsafe rows.",
    )
    add_unsafe_rows(queue, 1)
    queue.add(dict.fromkeys(set(queue.ranking[:12]) - {*queue.labels}, "safe"))
    add_unsafe_rows(queue, 1)
    before = len(queue.labels)
    review_until_enough(queue)
    drawn = [verdict.row for verdict in queue.verdicts if verdict.drawn_from is not None]
    assert len(queue.labels) - before - len(drawn) == MAX_SAFE_ROWS
    assert stop_advice(queue).reason == (
        "You can stop: the last 30 rows that the ranking chose are safe. Only rows drawn at random (so far "
        f"{len(drawn)}) count for the interval of unsafe rows, so it can be wide. To make it narrower, start the review "
        "again with `--random-fraction 1` (the verdicts are kept)."
    )


def test_an_unsafe_row_that_the_ranking_chose_continues_the_review(queue):
    review_until_enough(queue)
    queue.random_fraction = 0
    queue.add(dict.fromkeys(queue.next(1), "unsafe"))
    is_enough, reason = stop_advice(queue)
    assert not is_enough and reason.endswith(f"are all safe (now 0; {NOT_COUNTED}{FEWER}")


def test_a_ranking_that_finds_many_unsafe_rows_is_believed_sooner(queue):
    add_unsafe_rows(queue, 4)
    assert stop_advice(queue).reason == (
        "Go on until the last 15 rows that the ranking chose are all safe (now 0; rows drawn at random do not count)."
    )
    review_until_enough(queue)
    assert stop_advice(queue).reason.startswith("You can stop: the last 15 rows that the ranking chose are safe.")


@pytest.mark.parametrize(("unsafe", "chosen"), [(1, 1), (2, 2), (2, 9), (4, 6), (5, 12), (8, 14), (20, 70), (30, 300)])
def test_the_number_of_safe_rows_follows_from_the_lower_bound_of_the_hit_rate(unsafe, chosen):
    def at_least_unsafe(rate: float) -> float:
        return sum(comb(chosen, k) * rate**k * (1 - rate) ** (chosen - k) for k in range(unsafe, chosen + 1))

    rate = max(step / 10_000 for step in range(10_000) if at_least_unsafe(step / 10_000) <= 0.05)
    unlikely = next(rows for rows in range(1, 10_000) if (1 - rate) ** rows <= 0.01)
    assert safe_rows_needed(unsafe, chosen) == min(max(unlikely, 15), 30)


@pytest.mark.parametrize(("unsafe", "found"), [(0, "no unsafe row"), (1, "only one unsafe row")])
def test_a_ranking_that_found_none_or_one_may_be_wrong(queue, unsafe, found):
    add_unsafe_rows(queue, unsafe)
    review_until_enough(queue)
    drawn = [verdict for verdict in queue.verdicts if verdict.drawn_from is not None]
    assert stop_advice(queue) == (
        True,
        f"The ranking has found {found}: the last 30 rows that the ranking chose are safe. Either there are hardly any, or "
        "this model does not rank them first. Go on if you want to find them. To learn how many there can be, start the "
        "review again with `--random-fraction 1` (the verdicts are kept): if 45 rows drawn at random (so far "
        f"{len(drawn)}) are all safe, at most about 5 % of the rows are unsafe.",
    )


def test_a_ranking_that_found_nothing_is_wrong_if_random_rows_are_unsafe(queue):
    queue.random_fraction = 0.5
    queue.next(8)
    drawn = list(queue._drawn_from)
    queue.add({row: "unsafe" if row == drawn[0] else "safe" for row in drawn})
    queue.random_fraction = 0
    review_until_enough(queue)
    assert stop_advice(queue).reason == (
        "It can pay to go on: the last 30 rows that the ranking chose are safe, but 1 of 4 rows drawn at random turned out "
        "to be unsafe. The ranking learns from such rows."
    )


def test_an_unsafe_row_of_the_ranking_and_one_drawn_at_random_are_two(queue):
    queue.random_fraction = 0.5
    queue.next(8)
    drawn = list(queue._drawn_from)
    add_unsafe_rows(queue, 1)
    queue.add({row: "unsafe" if row == drawn[0] else "safe" for row in drawn})
    queue.random_fraction = 0
    review_until_enough(queue)
    assert stop_advice(queue).reason.startswith("You can stop: the last 30 rows that the ranking chose are safe.")


def test_many_safe_random_rows_need_no_more_of_them(tmp_path):
    queue = ReviewQueue(make_trace(tmp_path, rows=200, unsafe=4)[0], random_fraction=1)
    queue.add(dict.fromkeys(queue.next(RANDOM_ROWS), "safe"))
    queue.random_fraction = 0
    review_until_enough(queue)
    assert stop_advice(queue).reason.endswith(
        "Go on if you want to find them. The interval says how many there can be."
    )


def test_45_safe_rows_drawn_at_random_show_that_few_rows_are_unsafe():
    rows = 100_000
    drawn = [Verdict(row, str(row), "safe", "2026-11-29", drawn_from=rows - row) for row in range(RANDOM_ROWS)]
    ends = [
        estimate_unsafe_rows(some, {verdict.row: "safe" for verdict in some}, rows).unsafe_left[1]
        for some in (drawn[:-1], drawn)
    ]
    assert ends[1] <= 0.05 * rows < ends[0]


def test_random_rows_are_not_counted_as_rows_that_the_ranking_chose(queue):
    queue.random_fraction = 1
    queue.add(dict.fromkeys(queue.next(60), "safe"))
    queue.random_fraction = 0.1
    is_enough, reason = stop_advice(queue)
    assert not is_enough and reason.endswith(f"are all safe (now 0; {NOT_COUNTED}{FEWER}")


@pytest.mark.parametrize("label", ["safe", "unsafe"])
@pytest.mark.parametrize(("ranked", "needed"), [(0, 30), (4, 15)])
def test_rows_drawn_at_random_do_not_change_how_many_safe_rows_are_needed(queue, label, ranked, needed):
    queue.random_fraction = 0.5
    queue.next(8)
    drawn = dict.fromkeys(queue._drawn_from, label)
    assert len(drawn) == 4
    queue.add(drawn)
    add_unsafe_rows(queue, ranked)
    fewer = FEWER if needed > 15 else ""
    assert stop_advice(queue).reason == (
        f"Go on until the last {needed} rows that the ranking chose are all safe (now 0; {NOT_COUNTED}{fewer}"
    )


def test_only_random_rows_make_the_interval_narrower(queue):
    queue.random_fraction = 1
    rows = queue.next(60)
    queue.add(dict.fromkeys(rows, "safe"))
    queue.add({rows[0]: "safe"})  # a second verdict on a row counts once
    assert stop_advice(queue) == (
        False,
        "Every row is drawn at random (60 so far). Each verdict makes the interval narrower.",
    )


def test_a_review_of_all_rows_is_over(queue):
    queue.add(dict.fromkeys(range(80), "unsafe"))
    assert stop_advice(queue) == (True, "Every row has a verdict, so there is nothing left to look at.")
