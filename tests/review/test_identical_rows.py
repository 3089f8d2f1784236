"""A verdict says the same about all rows that are trained on the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import LogisticRegression
from test_review_queue import review

from forgetfilter_callback import FilterConfig, ReviewQueue, Trace, encode_rows, find_forgotten
from forgetfilter_callback.errors import DecisionError
from forgetfilter_callback.review import review_queue
from forgetfilter_callback.review.false_discoveries import removable_rows
from forgetfilter_callback.review.unsafe_probabilities import distinct_labels, unsafe_probabilities
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


def test_copies_that_were_drawn_are_not_lost_if_the_row_is_skipped(tmp_path):
    """If they were, skipping a difficult row with many copies would make the estimate too low."""
    trace = make_trace(tmp_path, np.r_[np.arange(60), np.zeros(60, int)], np.zeros(0))
    queue = ReviewQueue(trace, random_fraction=1)
    shown = queue.next(20)
    (row,) = (row for row in shown if trace.rows.ids[row].as_py()[:8] == trace.rows.ids[0].as_py()[:8])
    copies = [other for other in queue._drawn_from if other == 0 or other >= 60]
    assert len(copies) > 3
    queue.add(dict.fromkeys(set(shown) - {row}, "safe"))
    queue.skip(row)
    later = ReviewQueue(trace, random_fraction=1)
    assert later.drawn_without_verdict == [row]
    later.add({row: "unsafe"})
    assert {verdict.row for verdict in later.verdicts if verdict.verdict == "unsafe"} == set(copies)


def test_copies_of_a_safe_row_make_more_verdicts_necessary(tmp_path, monkeypatch):
    """They are tested, and they are safe: the unsafe rows left are a smaller fraction of the tested rows."""
    copies = np.r_[np.arange(200), np.zeros(100, int)]
    trace = make_trace(tmp_path, copies, np.zeros(0))
    queue = ReviewQueue(trace)
    monkeypatch.setattr(queue, "fit_scores", lambda labels: 1.0 * (np.arange(300) >= 190) * (np.arange(300) < 200))
    queue._drawn_from = dict.fromkeys(range(20), 300)
    queue.add(dict.fromkeys(range(20), "safe"))
    found = removable_rows(queue, 0.5)
    assert found.unsafe_left == 7
    assert found.safe_drawn + found.more_needed == -(-280 // (0.5 * found.unsafe_left)) - 1


def test_nothing_is_needed_if_only_copies_are_left(tmp_path):
    trace = make_trace(tmp_path, np.r_[np.arange(20), np.arange(20)], np.zeros(0))
    queue = ReviewQueue(trace)
    queue.add({row: "unsafe" if row < 3 else "safe" for row in range(20)})
    found = removable_rows(queue, 0.1)
    assert found.more_needed == 0 and not found.removed.any()


def test_copies_of_a_reviewed_row_have_its_weight(tmp_path):
    copies = np.repeat(np.arange(150), 2)  # rows 0 and 1 are equal, and so on
    trace = make_trace(tmp_path, copies, np.arange(20))
    queue = ReviewQueue(trace, random_fraction=0.5)
    review(queue, copies < 20, 60)
    known = np.isin(copies, copies[queue.is_seen])
    np.testing.assert_array_equal(queue.is_known, known)
    assert known.sum() > queue.is_seen.sum() > queue.estimate().seen == 60  # some copies were drawn, but not shown
    np.testing.assert_array_equal(unsafe_probabilities(queue)[known], (copies < 20)[known])
    assert ((unsafe_probabilities(queue)[~known] > 0) & (unsafe_probabilities(queue)[~known] < 1)).all()
    # In a subset, the only copy of a row has the id of the first one, whichever was reviewed.
    config = FilterConfig(reviewed=trace.folder / "review", weights=True)
    weights = find_forgotten(trace, config, trace.rows.ids.take(np.arange(0, 300, 2))).weights
    np.testing.assert_array_equal(weights[known[::2]], (copies >= 20)[::2][known[::2]])


@pytest.mark.parametrize("settings", [{"threshold": "fdr", "level": 0.2}, {"weights": True}], ids=["fdr", "weights"])
def test_copies_that_are_not_in_the_trace_are_treated_like_the_row(settings, tmp_path):
    trace = make_trace(tmp_path, np.arange(300), np.arange(60))
    queue = ReviewQueue(trace, random_fraction=1)
    review(queue, np.arange(300) < 60, 100)
    ids = trace.rows.ids.to_pylist()
    with_copies = pa.array([*ids, *(id_.removesuffix("-0") + "-1" for id_ in ids)])
    result = find_forgotten(trace, FilterConfig(reviewed=trace.folder / "review", **settings), with_copies)
    assert (result.removed[:300] & ~queue.is_seen).sum() > 10 or result.weights is not None
    np.testing.assert_array_equal(result.removed[300:], result.removed[:300])
    if result.weights is not None:
        np.testing.assert_array_equal(result.weights[300:], result.weights[:300])
        assert result.weights.min() == 0


@pytest.mark.parametrize("random_fraction", [0.1, 0.5])
def test_no_row_is_shown_twice(random_fraction, tmp_path):
    """60 copies of an unsafe row, and 30 other unsafe rows. Without the copies the review would end like this, too."""
    copies = np.random.default_rng(0).permutation(np.r_[np.arange(300), np.zeros(59, int)])
    queue = ReviewQueue(make_trace(tmp_path, copies, np.arange(31)), random_fraction=random_fraction)
    shown = []
    for _ in range(10):
        rows = queue.next(10)
        assert len(rows) == 10
        shown += copies[rows].tolist()
        queue.add({row: "unsafe" if copies[row] < 31 else "safe" for row in rows})
    assert len(set(shown)) == 100
    assert queue.estimate().seen == 100 and queue.is_known[copies == 0].all()
    assert queue.estimate().unsafe_found == (copies < 31)[queue.is_known].sum()
    if random_fraction == 0.1:
        assert sum(number < 31 for number in shown) == 31


def test_a_review_ends_when_every_distinct_row_was_shown(tmp_path):
    copies = np.repeat(np.arange(20), 3)
    for random_fraction in (0, 0.3, 1):
        queue = ReviewQueue(
            make_trace(tmp_path / str(random_fraction), copies, np.arange(3)), random_fraction=random_fraction
        )
        shown = []
        while rows := queue.next(4):
            shown += rows
            queue.add({row: "unsafe" if copies[row] < 3 else "safe" for row in rows})
        assert sorted(copies[shown]) == list(range(20)) and queue.is_known.all()
        assert queue.estimate().unsafe_left == (0, 0) and queue.estimate().unsafe_found == 9


def test_intervals_are_right_with_copies(tmp_path):
    """Ten texts make up half of the rows. The copies of a shown row are drawn without being shown."""
    covered, widths = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        copies = rng.permutation(np.r_[np.arange(150), rng.integers(0, 10, 150)])
        unsafe = rng.random(150) < 0.3
        queue = ReviewQueue(
            make_trace(tmp_path / str(seed), copies, np.arange(0), seed), seed=seed, random_fraction=0.5
        )
        review(queue, unsafe[copies], 60)
        left, (low, high) = (unsafe[copies] & ~queue.is_known).sum(), queue.estimate().unsafe_left
        covered.append(low <= left <= high)
        widths.append(high - low)
    assert np.mean(covered) > 0.85 and np.mean(widths) < 60, (np.mean(covered), np.mean(widths))


def test_a_copy_that_was_drawn_follows_the_row_that_was_shown(tmp_path):
    copies = np.r_[np.zeros(30, int), np.arange(1, 11)]
    queue = ReviewQueue(make_trace(tmp_path, copies, np.zeros(1)), reviewer="Ada", random_fraction=1)
    shown = []
    while not any(verdict.identical_to is not None for verdict in queue.verdicts):
        shown += queue.next(3)
        queue.add({row: "unsafe" if copies[row] == 0 else "safe" for row in shown[-3:]})
        assert not set(queue._drawn_from) - set(queue.labels)  # a review that ends here has lost no draw
    assert {verdict.reviewer for verdict in queue.verdicts} == {"Ada"}
    (of,) = (row for row in shown if copies[row] == 0)
    drawn = [verdict for verdict in queue.verdicts if verdict.identical_to is not None]
    assert all(each.identical_to == of and copies[each.row] == 0 and each.verdict == "unsafe" for each in drawn)
    assert all(each.drawn_from is not None for each in drawn)
    queue.add({of: "safe"})
    assert not queue.estimate().unsafe_found and set(queue.labels.values()) == {"safe"}
    queue.add({drawn[0].row: "unsafe"})  # a verdict of its own
    queue.add({of: "safe"})
    assert queue.labels[drawn[0].row] == "unsafe"


def test_a_copy_that_was_drawn_follows_all_rows_that_were_judged(tmp_path):
    """It is unsafe as long as one of them is, and no longer than that."""
    copies = np.r_[np.zeros(8, int), np.arange(1, 31)]
    queue = ReviewQueue(make_trace(tmp_path, copies, np.zeros(1)), random_fraction=1)
    queue.add({0: "safe"})
    queue.add({1: "unsafe"})
    while not any(verdict.identical_to is not None for verdict in queue.verdicts):
        queue.add(dict.fromkeys(queue.next(3), "safe"))
    drawn = {verdict.row for verdict in queue.verdicts if verdict.identical_to is not None}
    assert {queue.labels[row] for row in drawn} == {"unsafe"}
    queue.add({1: "safe"})
    assert set(queue.labels.values()) == {"safe"} and not find_forgotten(queue.trace, FilterConfig(
        reviewed=queue.trace.folder / "review"
    )).removed.any()  # fmt: skip
    queue.add({0: "unsafe"})
    assert {queue.labels[row] for row in drawn} == {"unsafe"} and queue.labels[1] == "safe"
    queue.add({1: "safe"})
    assert {queue.labels[row] for row in drawn} == {"unsafe"}


def test_copies_of_an_unsafe_row_are_not_learned_as_safe(tmp_path, monkeypatch):
    trace = make_trace(tmp_path, np.r_[np.zeros(60, int), np.arange(1, 41)], np.zeros(1))
    queue, fits = ReviewQueue(trace), []

    class Recorded(LogisticRegression):
        def fit(self, X, y, sample_weight=None):
            fits.append((y, sample_weight))
            return super().fit(X, y, sample_weight)

    monkeypatch.setattr(review_queue, "LogisticRegression", Recorded)
    queue.add({0: "unsafe", 70: "safe"})
    assert queue.ranking[:60].tolist() == list(range(60))
    ((learned, weights),) = fits
    assert learned.tolist() == [True] + [False] * 40 and weights[2:].sum() == pytest.approx(0.1 * 39)


def test_different_verdicts_on_identical_rows_cause_a_warning(tmp_path, caplog):
    trace = make_trace(tmp_path, np.r_[np.arange(20), 0], np.zeros(1))
    queue = ReviewQueue(trace)
    queue.add({0: "unsafe", 3: "safe"})
    find_forgotten(trace, FilterConfig(reviewed=trace.folder / "review"))
    assert "identical" not in caplog.text
    queue.add({20: "safe"})
    result = find_forgotten(trace, FilterConfig(reviewed=trace.folder / "review"))
    assert "Rows 0 and 20 are identical, but the verdict on one is 'unsafe' and on the other 'safe'" in caplog.text
    assert np.flatnonzero(result.removed).tolist() == [0]


def test_identical_verdicts_are_one_verdict_for_the_weights(tmp_path, monkeypatch):
    """A copy in another fold would have learned from the verdict on the row."""
    copies = np.repeat(np.arange(100), 2)
    queue = ReviewQueue(make_trace(tmp_path, copies, np.arange(15)), random_fraction=0.5)
    queue._drawn_from = dict.fromkeys(range(0, 80, 4), 200)
    queue.add({row: "unsafe" if copies[row] < 15 else "safe" for row in range(80)})  # both copies of 40 rows
    fit_scores, learned = queue.fit_scores, []
    monkeypatch.setattr(queue, "fit_scores", lambda labels: learned.append(copies[[*labels]]) or fit_scores(labels))
    unsafe_probabilities(queue)
    folds = [rows for rows in learned if len(rows) < 80]  # the others are the final fit to all verdicts
    assert len(folds) > 5 and all(len(set(rows)) == len(rows) < 40 for rows in folds)


def test_opening_a_finished_review_stores_nothing(tmp_path):
    """The copies of the reviewed rows need not be drawn."""
    trace = make_trace(tmp_path, np.repeat(np.arange(4), 500), np.zeros(1))
    ReviewQueue(trace, reviewer="Ada").add({0: "unsafe", 500: "safe", 1000: "safe", 1500: "safe"})
    queue = ReviewQueue(trace, reviewer="Bob", random_fraction=1)
    assert queue.next(10) == [] and len(queue.verdicts) == 4


def test_a_copy_that_is_drawn_has_the_reviewer_of_the_row(tmp_path):
    trace = make_trace(tmp_path, np.r_[np.zeros(50, int), np.arange(1, 11)], np.zeros(1))
    ReviewQueue(trace, reviewer="Ada").add({7: "unsafe"})
    queue = ReviewQueue(trace, reviewer="Bob", random_fraction=1)
    queue.add(dict.fromkeys(queue.next(5), "safe"))
    copied = [verdict for verdict in queue.verdicts if verdict.identical_to is not None]
    assert copied and {(verdict.identical_to, verdict.reviewer) for verdict in copied} == {(7, "Ada")}
    result = find_forgotten(trace, FilterConfig(reviewed=trace.folder / "review"))
    assert result.reason.startswith(
        "6 rows reviewed, 1 found to be unsafe and removed; 49 identical rows treated like them"
    )


def test_verdicts_on_one_text_are_too_few_for_weights(tmp_path):
    trace = make_trace(tmp_path, np.r_[np.zeros(60, int), np.arange(1, 61)], np.zeros(1))
    queue = ReviewQueue(trace, random_fraction=1)
    queue.add({row: "unsafe" if row < 60 else "safe" for row in [*range(20), *queue.next(20)]})
    with pytest.raises(DecisionError, match=r"There are 1 unsafe and \d+ safe verdicts on distinct rows"):
        unsafe_probabilities(queue)


def test_different_verdicts_on_identical_rows_are_one_unsafe_verdict_for_the_weights(tmp_path):
    queue = ReviewQueue(make_trace(tmp_path, np.repeat(np.arange(30), 2), np.zeros(1)))
    queue.add({0: "unsafe", 1: "safe", 2: "safe", 3: "unsafe", 4: "safe", 5: "safe"})
    assert list(distinct_labels(queue).values()) == ["unsafe", "unsafe", "safe"]
