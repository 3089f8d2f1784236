"""Rows that were drawn at random and skipped come back in a later review."""

from __future__ import annotations

from itertools import count

import numpy as np
import pyarrow as pa
import pytest
from test_review_queue import make_trace, review

from forgetfilter_callback import ReviewQueue
from forgetfilter_callback.errors import DecisionError
from forgetfilter_callback.review import review_queue
from forgetfilter_callback.review.skipped_draws import SKIPPED_FILE, append_skipped_draws, read_skipped_draws
from forgetfilter_callback.review.verdicts import Verdict


IDS = pa.array(["a", "b", "c", "d"])
VERDICTS = [Verdict(row, IDS[row].as_py(), "safe", f"2026-11-29T10:00:0{row}") for row in (2, 3)]
LATEST = VERDICTS[-1].time


def test_skipped_draws_are_read_in_their_order(tmp_path):
    file = tmp_path / "review" / SKIPPED_FILE
    append_skipped_draws({3: 4, 0: 4}, None, IDS, file)
    append_skipped_draws({1: 2}, LATEST, IDS, file)
    assert list(read_skipped_draws(file, IDS, VERDICTS).items()) == [(3, 4), (0, 4), (1, 2)]


def test_without_a_file_no_row_was_skipped(tmp_path):
    assert read_skipped_draws(tmp_path / SKIPPED_FILE, IDS, []) == {}


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / SKIPPED_FILE).mkdir()
    with pytest.raises(DecisionError, match=r"The skipped rows in .*skipped.jsonl cannot be read"):
        read_skipped_draws(tmp_path / SKIPPED_FILE, IDS, [])


@pytest.mark.parametrize(
    "line",
    [
        '{"row": 0, "id": "a", "dra',
        "[]",
        "3",
        "{}",
        "[" * 100_000,
        '{"row": 0, "id": "another", "drawn_from": 4, "rows": 4, "after": null}',
        '{"row": 0, "id": "a", "drawn_from": 4, "rows": 5, "after": null}',
        '{"row": 4, "id": "a", "drawn_from": 4, "rows": 4, "after": null}',
        '{"row": -4, "id": "a", "drawn_from": 4, "rows": 4, "after": null}',
        '{"row": 99999999999999999999, "id": "a", "drawn_from": 4, "rows": 4, "after": null}',
        '{"row": "0", "id": "a", "drawn_from": 4, "rows": 4, "after": null}',
        '{"row": false, "id": "a", "drawn_from": 4, "rows": 4, "after": null}',
        '{"row": 0, "id": "a", "drawn_from": 5, "rows": 4, "after": null}',
        '{"row": 0, "id": "a", "drawn_from": 4.0, "rows": 4, "after": null}',
        '{"row": 0, "id": "a", "drawn_from": 1, "rows": 4, "after": null}',  # now two rows have no verdict
        '{"row": 0, "id": "a", "drawn_from": null, "rows": 4, "after": null}',
        '{"row": 0, "id": "a", "drawn_from": 4, "rows": 4}',
        '{"row": 0, "id": "a", "drawn_from": 4, "rows": 4, "after": []}',
        '{"row": 0, "id": "a", "drawn_from": 4, "rows": 4, "after": "2026-11-28T10:00:00"}',  # of a deleted verdict
    ],
)
def test_lines_that_are_not_of_this_review_are_left_out(line, tmp_path):
    file = tmp_path / SKIPPED_FILE
    append_skipped_draws({1: 4}, None, IDS, file)
    with file.open("a") as stream:
        stream.write(line)
    append_skipped_draws({2: 3}, LATEST, IDS, file)
    assert read_skipped_draws(file, IDS, VERDICTS) == {1: 4, 2: 3}


def test_reviews_that_are_closed_often_lose_no_skipped_draw(tmp_path):
    """The reviewer skips unsafe rows, because they are difficult, until the last of ten short reviews."""
    trace, is_unsafe = make_trace(tmp_path, rows=120, unsafe=60)
    drawn_from: dict[int, int] = {}
    for _ in range(10):
        queue = ReviewQueue(trace, random_fraction=1)
        for row in queue.next(8):
            if is_unsafe[row]:
                queue.skip(row)
            else:
                queue.add({row: "safe"})
        drawn_from |= queue._drawn_from
    skipped = [row for row in drawn_from if is_unsafe[row]]
    assert len(skipped) > 5
    queue = ReviewQueue(trace, random_fraction=1)
    assert sorted(queue.drawn_without_verdict) == sorted(skipped)
    queue.add(dict.fromkeys(queue.next(len(skipped)), "unsafe"))
    assert {verdict.row: verdict.drawn_from for verdict in queue.verdicts} == drawn_from
    low, high = queue.estimate().unsafe_left
    assert low <= np.count_nonzero(is_unsafe) - len(skipped) <= high


def test_only_skipped_draws_are_stored(tmp_path):
    """A look at rows, or a skipped row that the ranking chose, changes nothing in a later review."""
    trace, _ = make_trace(tmp_path, rows=120, unsafe=60)
    queue = ReviewQueue(trace, random_fraction=0.5)
    rows = queue.next(20)
    for row in rows:
        if row not in queue._drawn_from:
            queue.skip(row)
    assert not (trace.folder / "review").exists()
    assert ReviewQueue(trace, random_fraction=0.5).next(20) == rows


def test_a_review_without_its_verdicts_begins_again(tmp_path, monkeypatch):
    seconds = count()
    monkeypatch.setattr(review_queue, "_now", lambda: f"2026-11-29T10:00:00+{next(seconds):06}")
    trace, is_unsafe = make_trace(tmp_path, rows=120, unsafe=60)
    queue = ReviewQueue(trace, random_fraction=1)
    queue.add(dict.fromkeys(queue.next(8), "safe"))
    queue.skip(queue.next(1)[0])
    assert len(ReviewQueue(trace).drawn_without_verdict) == 1
    (trace.folder / "review" / "verdicts.jsonl").unlink()
    assert ReviewQueue(trace).drawn_without_verdict == []
    review(ReviewQueue(trace), is_unsafe, 20)
    assert ReviewQueue(trace).drawn_without_verdict == []
