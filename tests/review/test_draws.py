"""Rows that a review has drawn at random, on disk."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from test_review_queue import make_trace

from forgetfilter_callback import ReviewQueue
from forgetfilter_callback.review.draws import DRAWS_FILE, append_draws, read_draws


IDS = pa.array(["a", "b", "c", "d"])


def test_draws_are_read_in_their_order(tmp_path):
    file = tmp_path / "review" / DRAWS_FILE
    append_draws({3: 4, 0: 4}, IDS, file)
    append_draws({1: 2}, IDS, file)
    assert list(read_draws(file, IDS, without_verdict=1).items()) == [(3, 4), (0, 4), (1, 2)]


def test_no_file_has_no_draws(tmp_path):
    assert read_draws(tmp_path / DRAWS_FILE, IDS, without_verdict=4) == {}


@pytest.mark.parametrize(
    "line",
    [
        '{"row": 0, "id": "a", "dra',
        "[]",
        "3",
        "{}",
        '{"row": 0, "id": "another", "drawn_from": 4, "rows": 4}',
        '{"row": 0, "id": "a", "drawn_from": 4, "rows": 5}',
        '{"row": 4, "id": "a", "drawn_from": 4, "rows": 4}',
        '{"row": -4, "id": "a", "drawn_from": 4, "rows": 4}',
        '{"row": "0", "id": "a", "drawn_from": 4, "rows": 4}',
        '{"row": 0, "id": "a", "drawn_from": 5, "rows": 4}',
        '{"row": 0, "id": "a", "drawn_from": 1, "rows": 4}',  # now two rows have no verdict
        '{"row": 0, "id": "a", "drawn_from": null, "rows": 4}',
    ],
)
def test_lines_that_hold_no_draw_of_this_review_are_left_out(line, tmp_path):
    file = tmp_path / DRAWS_FILE
    append_draws({1: 4}, IDS, file)
    with file.open("a") as stream:
        stream.write(line)
    append_draws({2: 3}, IDS, file)
    assert read_draws(file, IDS, without_verdict=2) == {1: 4, 2: 3}


def test_reviews_that_are_closed_often_lose_no_draw(tmp_path):
    """The reviewer skips unsafe rows, because they are difficult, until the last of ten short reviews."""
    trace, is_unsafe = make_trace(tmp_path, rows=120, unsafe=60)
    drawn: dict[int, int] = {}
    for _ in range(10):
        queue = ReviewQueue(trace, random_fraction=1)
        queue.add({row: "safe" for row in queue.next(8) if not is_unsafe[row]})
        drawn |= queue._drawn_from
    skipped = [row for row in drawn if is_unsafe[row]]
    assert len(skipped) > 5
    queue = ReviewQueue(trace, random_fraction=1)
    assert queue.drawn_without_verdict == skipped
    queue.add(dict.fromkeys(queue.next(len(skipped)), "unsafe"))
    assert {verdict.row: verdict.drawn_from for verdict in queue.verdicts} == drawn
    low, high = queue.estimate().unsafe_left
    assert low <= np.count_nonzero(is_unsafe) - len(skipped) <= high


def test_a_review_without_its_verdicts_begins_again(tmp_path):
    trace, _ = make_trace(tmp_path, rows=120, unsafe=60)
    queue = ReviewQueue(trace, random_fraction=1)
    for _ in range(3):
        queue.add(dict.fromkeys(queue.next(8)[:4], "safe"))
    assert len(queue.drawn_without_verdict) > 0
    (trace.folder / "review" / "verdicts.jsonl").unlink()
    waiting = ReviewQueue(trace, random_fraction=1).drawn_without_verdict
    assert waiting == [row for row, size in queue._drawn_from.items() if size == 120]
