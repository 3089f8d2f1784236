"""When a review is told to end."""

from __future__ import annotations

import pytest
from test_review_queue import make_trace

from forgetfilter_callback import ReviewQueue
from forgetfilter_callback.review.stop_advice import STOP_AFTER, stop_advice


@pytest.fixture
def queue(tmp_path) -> ReviewQueue:
    return ReviewQueue(make_trace(tmp_path, rows=80, unsafe=4)[0])


def review_until_enough(queue: ReviewQueue) -> None:
    while not stop_advice(queue).is_enough:
        queue.add(dict.fromkeys(queue.next(1), "safe"))


def test_a_review_can_stop_after_safe_rows_that_the_ranking_chose(queue):
    assert stop_advice(queue) == (
        False,
        "Go on until the last 30 rows that the ranking chose are all safe (now 0).",
    )
    while queue._drawn_from or not queue.verdicts:  # an unsafe row that the ranking chose
        queue.add(dict.fromkeys(queue.next(1), "unsafe"))
    review_until_enough(queue)
    drawn = [verdict.row for verdict in queue.verdicts if verdict.drawn_from is not None]
    safe = [row for row, label in queue.labels.items() if label == "safe" and row not in drawn]
    assert len(safe) == STOP_AFTER
    assert stop_advice(queue).reason == (
        "You can stop: the last 30 rows that the ranking chose are safe. If the interval is too wide for you, go on with "
        f"`--random-fraction 1`: only rows drawn at random (so far {len(drawn)}) make it narrower."
    )


def test_an_unsafe_row_that_the_ranking_chose_continues_the_review(queue):
    review_until_enough(queue)
    queue.random_fraction = 0
    queue.add(dict.fromkeys(queue.next(1), "unsafe"))
    is_enough, reason = stop_advice(queue)
    assert not is_enough and reason.endswith("are all safe (now 0).")


def test_a_ranking_that_found_nothing_may_be_wrong(queue):
    review_until_enough(queue)
    assert "No unsafe row was found by the ranking." in stop_advice(queue).reason


def test_random_rows_are_not_counted_as_rows_that_the_ranking_chose(queue):
    queue.random_fraction = 1
    queue.add(dict.fromkeys(queue.next(60), "safe"))
    assert stop_advice(queue) == (False, "All rows are drawn at random. Each verdict makes the interval narrower.")


def test_a_review_of_all_rows_is_over(queue):
    queue.add(dict.fromkeys(range(80), "unsafe"))
    assert stop_advice(queue) == (True, "Every row has a verdict, so there is nothing left to look at.")
