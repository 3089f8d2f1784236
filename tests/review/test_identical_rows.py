"""A verdict says the same about all rows that are trained on the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from test_review_queue import review

from forgetfilter_callback import FilterConfig, ReviewQueue, Trace, encode_rows, find_forgotten
from forgetfilter_callback.review.unsafe_probabilities import unsafe_probabilities
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


def make_trace(folder: Path, copies: np.ndarray, far: np.ndarray, seed: int = 0) -> Trace:
    """Row `i` is number `copies[i]` of the distinct rows. The states of the numbers in `far` are far from the others."""
    rng = np.random.default_rng(seed)
    count = copies.max() + 1
    tokens = np.column_stack([np.ones(count, int), rng.integers(2, 200, (count, 8))])
    encoded = encode_rows([{"input_ids": tokens[number].tolist()} for number in copies], disable_tqdm=True)
    states = rng.normal(size=(count, 16)) + 4 * np.isin(np.arange(count), far)[:, None] * np.eye(16)[0]
    losses, rises = rng.gamma(2, 1, (count, 8)), rng.normal(size=(count, 8))
    trace = Trace.create(folder, encoded, "model", None, None)
    for step, values in ((0, losses), (5, np.maximum(losses + rises, 0))):
        scores = Scores(values[copies].ravel().astype(np.float32), states[copies].astype(np.float16))
        trace.append(Record("safety", step), [scores])
    return trace


def test_copies_of_an_unsafe_row_make_no_room_for_benign_rows(tmp_path):
    """A quarter of the rows are one row. If it counted as a discovery, a tenth as many benign rows could be removed."""
    for seed in range(8):
        copies = np.random.default_rng(seed).permutation(np.r_[np.arange(300), np.zeros(99, int)])
        trace = make_trace(tmp_path / str(seed), copies, np.zeros(1), seed)
        queue = ReviewQueue(trace, seed=seed, random_fraction=1)
        review(queue, copies == 0, 60)
        result = find_forgotten(trace, FilterConfig(threshold="fdr", reviewed=trace.folder / "review"))
        np.testing.assert_array_equal(result.removed, copies == 0)


def test_copies_of_a_safe_row_are_not_removed(tmp_path):
    """They rank as high as the unsafe rows, with which they have their states in common."""
    copies = np.r_[np.arange(300), [0, 0]]
    trace = make_trace(tmp_path, copies, np.arange(60))
    queue = ReviewQueue(trace, random_fraction=1)
    queue._drawn_from = dict.fromkeys(range(60, 160), 302)
    queue.add({0: "safe"} | dict.fromkeys(range(1, 20), "unsafe") | dict.fromkeys(range(60, 160), "safe"))
    config = FilterConfig(threshold="fdr", level=0.3, reviewed=trace.folder / "review")
    result = find_forgotten(trace, config)
    assert result.removed[20:60].sum() > 30
    assert not result.removed[[0, 300, 301]].any()
    assert [result.overrides[trace.rows.ids[row].as_py()] for row in (0, 300, 301)] == ["keep"] * 3


def test_copies_of_a_reviewed_row_have_its_weight(tmp_path):
    copies = np.repeat(np.arange(150), 2)  # rows 0 and 1 are equal, and so on
    trace = make_trace(tmp_path, copies, np.arange(20))
    queue = ReviewQueue(trace, random_fraction=0.5)
    review(queue, copies < 20, 60)
    known = np.isin(copies, copies[queue.is_seen])
    assert known.sum() > queue.is_seen.sum() == 60
    np.testing.assert_array_equal(unsafe_probabilities(queue)[known], (copies < 20)[known])
    assert ((unsafe_probabilities(queue)[~known] > 0) & (unsafe_probabilities(queue)[~known] < 1)).all()
    # In a subset, the only copy of a row has the id of the first one, whichever was reviewed.
    config = FilterConfig(reviewed=trace.folder / "review", weights=True)
    weights = find_forgotten(trace, config, trace.rows.ids.take(np.arange(0, 300, 2))).weights
    np.testing.assert_array_equal(weights[known[::2]], (copies >= 20)[::2][known[::2]])
