"""The queue: what it asks for, what it learns, and what survives a crash."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from forgetfilter_callback import FilterConfig, ReviewQueue, Trace, encode_rows, find_forgotten
from forgetfilter_callback.errors import DataError, DecisionError
from forgetfilter_callback.measures.smoothed import random_subset
from forgetfilter_callback.reports.dataset_card import dataset_card
from forgetfilter_callback.review import review_queue
from forgetfilter_callback.review.false_discoveries import (
    FalseDiscoveryResult,
    _calibration_rows_needed,
    removable_rows,
)
from forgetfilter_callback.review.verdicts import Verdict, append_verdicts
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


ROWS, UNSAFE = 300, 30


def make_trace(
    folder: Path, rows: int = ROWS, unsafe: int = UNSAFE, seed: int = 0, distance: float = 2.0
) -> tuple[Trace, np.ndarray]:
    """A trace in which unsafe rows are forgotten only slightly more than others.

    The mean of their states is `distance` standard deviations from that of the others.
    """
    rng = np.random.default_rng(seed)
    is_unsafe = np.zeros(rows, dtype=bool)
    is_unsafe[rng.choice(rows, unsafe, replace=False)] = True
    encoded = encode_rows(
        [{"input_ids": [1, *rng.integers(2, 50, 8).tolist()]} for _ in range(rows)], disable_tqdm=True
    )
    trace = Trace.create(folder, encoded, "model", None, None)
    states = rng.normal(size=(rows, 16)) + distance * is_unsafe[:, None] * np.eye(16)[0]
    losses = rng.gamma(2, 1, encoded.loss_offsets[-1])
    rises = np.repeat(0.2 * is_unsafe, np.diff(encoded.loss_offsets)) + rng.normal(size=len(losses))
    for record, values in (
        (Record("noisy", 0), losses + 2),
        (Record("safety", 0), losses),
        (Record("safety", 5), np.maximum(losses + rises, 0)),
    ):
        trace.append(record, [Scores(values.astype(np.float32), states.astype(np.float16))])
    return trace, is_unsafe


def review(queue: ReviewQueue, is_unsafe: np.ndarray, looks: int) -> None:
    for _ in range(looks // 10):
        queue.add({row: "unsafe" if is_unsafe[row] else "safe" for row in queue.next(10)})


def test_a_diverged_model_cannot_rank_rows(tmp_path):
    trace, _ = make_trace(tmp_path, rows=20, unsafe=2)
    losses = np.full(trace.rows.loss_offsets[-1], np.nan, np.float32)
    trace.append(Record("safety", 5), [Scores(losses, trace.states(Record("safety", 5)))])
    with pytest.raises(DataError, match="no finite forgetting value among 20 rows, so the rows cannot be ranked"):
        ReviewQueue(trace)


def test_verdicts_find_more_unsafe_rows_than_the_measure_alone(tmp_path):
    gains = []
    for seed in range(4):
        trace, is_unsafe = make_trace(tmp_path / str(seed), seed=seed)
        queue = ReviewQueue(trace)
        by_measure = is_unsafe[queue.ranking[:60]].sum()
        assert queue.scores.dtype == np.float64
        review(queue, is_unsafe, 60)
        assert queue.scores.dtype == np.float64
        gains.append(is_unsafe[queue.is_seen].sum() - by_measure)
        assert sorted(queue.ranking) == list(range(ROWS))
    assert np.mean(gains) >= 5, gains


def test_verdicts_show_that_surprising_rows_are_unsafe(tmp_path):
    """Unsafe rows differ from the others only by their losses, which safety finetuning does not change."""
    rng = np.random.default_rng(3)
    encoded = encode_rows([{"input_ids": [1, *rng.integers(2, 50, 8)]} for _ in range(ROWS)], disable_tqdm=True)
    is_unsafe = rng.permutation(ROWS) < UNSAFE
    losses = rng.gamma(8, 0.25, encoded.loss_offsets[-1]) + np.repeat(2.0 * is_unsafe, np.diff(encoded.loss_offsets))
    trace = Trace.create(tmp_path, encoded, "model", None, None)
    states = rng.normal(size=(ROWS, 16)).astype(np.float16)
    for record in (Record("noisy", 0), Record("safety", 0), Record("safety", 5)):
        noise = rng.normal(scale=0.1, size=len(losses))
        trace.append(record, [Scores((losses + noise).astype(np.float32), states)])
    queue = ReviewQueue(trace)
    assert is_unsafe[queue.ranking[:100]].sum() < 15  # about as many as in 100 random rows
    review(queue, is_unsafe, 100)
    assert is_unsafe[queue.is_seen].sum() >= 28


def test_the_first_ranking_is_that_of_the_default_measure(tmp_path):
    trace, _ = make_trace(tmp_path)
    np.testing.assert_array_equal(ReviewQueue(trace).ranking, np.argsort(-trace.forgetting(), kind="stable"))


def test_a_tenth_of_the_rows_is_drawn_from_all_rows_without_a_verdict(tmp_path):
    trace, is_unsafe = make_trace(tmp_path)
    queue = ReviewQueue(trace, seed=1)
    review(queue, is_unsafe, 50)
    drawn = [verdict.drawn_from for verdict in queue.verdicts if verdict.drawn_from is not None]
    assert sorted(drawn, reverse=True) == [300, 290, 280, 270, 260]
    single = ReviewQueue(trace, tmp_path / "single")
    for _ in range(20):
        (row,) = single.next(1)
        single.add({row: "safe"})
    assert sum(verdict.drawn_from is not None for verdict in single.verdicts) == 2


@pytest.mark.parametrize(("fraction", "drawn"), [(0, 0), (0.5, 25), (1, 50)])
def test_the_random_fraction(tmp_path, fraction, drawn):
    trace, is_unsafe = make_trace(tmp_path)
    queue = ReviewQueue(trace, random_fraction=fraction)
    review(queue, is_unsafe, 50)
    assert sum(verdict.drawn_from is not None for verdict in queue.verdicts) == drawn


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), "all", None])
def test_a_wrong_random_fraction_is_refused(tmp_path, fraction):
    trace, _ = make_trace(tmp_path)
    with pytest.raises(ValueError, match="between 0 and 1"):
        ReviewQueue(trace, random_fraction=fraction)


def test_a_row_that_was_drawn_comes_back_until_it_has_a_verdict(tmp_path):
    """If difficult rows were left out, the others would not be a random sample."""
    trace, _ = make_trace(tmp_path)
    queue = ReviewQueue(trace, random_fraction=0.2)
    first = queue.next(10)
    drawn = [row for row in first if row in queue._drawn_from]
    queue.add({row: "safe" for row in first if row not in drawn})
    second = queue.next(10)
    assert len(drawn) == 2 and len(second) == 10 and set(drawn) <= set(second)
    assert not set(drawn) & set(queue.next(1))  # the ranking does not choose them
    others = ReviewQueue(trace, tmp_path / "others", random_fraction=0.2)
    others._drawn_from = dict.fromkeys(drawn, 300)
    third = others.next(10, skipped=drawn)
    assert len(others.drawn_without_verdict) == 4 and not set(drawn) & set(third)  # two other rows are drawn
    queue.add(dict.fromkeys(drawn, "safe"))
    assert {v.row: v.drawn_from for v in queue.verdicts if v.drawn_from is not None} == dict.fromkeys(drawn, 300)
    assert not set(drawn) & set(queue.next(10))


def test_the_draws_after_skipped_rows_are_not_their_neighbours(tmp_path):
    trace, _ = make_trace(tmp_path)
    queue = ReviewQueue(trace, random_fraction=1)
    skipped: list[int] = []
    for _ in range(30):
        skipped += queue.next(1, skipped)
        queue.skip(skipped[-1])
    assert len(set(skipped)) == 30
    neighbours = sum(abs(before - after) == 1 for before, after in pairwise(skipped))
    assert neighbours < 5  # 2 of 299 pairs of other rows are


def test_rows_of_an_earlier_round_stay_drawn(tmp_path):
    trace, _ = make_trace(tmp_path)
    queue = ReviewQueue(trace, random_fraction=0.2)
    rows = queue.next(10)
    queue.next(3)
    queue.add(dict.fromkeys(rows, "safe"))
    assert sum(verdict.drawn_from is not None for verdict in queue.verdicts) == 2


def test_random_rows_are_uniform(tmp_path):
    """Over many seeds, rows in the top half of the ranking are drawn as often as the others."""
    trace, _ = make_trace(tmp_path, rows=40, unsafe=4)
    top = set(ReviewQueue(trace).ranking[:20].tolist())
    drawn = []
    for seed in range(200):
        queue = ReviewQueue(trace, tmp_path / str(seed), seed=seed, random_fraction=0.2)
        queue.add(dict.fromkeys(queue.next(5), "safe"))
        drawn += [verdict.row for verdict in queue.verdicts if verdict.drawn_from is not None]
    assert len(drawn) == 200 and 70 < sum(row in top for row in drawn) < 130


def test_a_queue_continues_where_another_stopped(tmp_path):
    trace, is_unsafe = make_trace(tmp_path)
    one = ReviewQueue(trace, tmp_path / "one", seed=3)
    review(one, is_unsafe, 40)
    review(ReviewQueue(trace, tmp_path / "two", reviewer="first", seed=3), is_unsafe, 20)
    two = ReviewQueue(trace, tmp_path / "two", reviewer="second", seed=3)
    review(two, is_unsafe, 20)
    assert list(two.labels.items()) == list(one.labels.items())
    np.testing.assert_array_equal(two.ranking, one.ranking)
    assert [verdict.reviewer for verdict in two.verdicts] == ["first"] * 20 + ["second"] * 20


def test_the_later_verdict_counts_and_both_are_kept(tmp_path):
    trace, _ = make_trace(tmp_path)
    queue = ReviewQueue(trace)
    queue.add({5: "safe"})
    queue.add({5: "unsafe"})
    assert ReviewQueue(trace).labels == {5: "unsafe"}
    assert [verdict.verdict for verdict in queue.verdicts] == ["safe", "unsafe"]


@pytest.mark.parametrize(
    "verdicts", [{ROWS: "safe"}, {-1: "safe"}, {3: "safe", 4: "benign"}, {1.5: "safe"}, {"3": "safe"}, {True: "safe"}]
)
def test_unknown_rows_and_verdicts_are_refused_and_nothing_is_stored(tmp_path, verdicts):
    trace, _ = make_trace(tmp_path)
    queue = ReviewQueue(trace)
    with pytest.raises(ValueError, match=r"There is no row|must be 'unsafe' or 'safe'"):
        queue.add(verdicts)
    with pytest.raises(ValueError, match=r"There is no row|must be 'unsafe' or 'safe'"):
        queue.fit_scores(verdicts)
    assert queue.verdicts == [] and ReviewQueue(trace).verdicts == []


@pytest.mark.parametrize("verdicts", [[3], None, [(3, "safe")], "safe"])
def test_verdicts_are_a_mapping(tmp_path, verdicts):
    trace, _ = make_trace(tmp_path)
    with pytest.raises(TypeError, match="Pass a dictionary from row numbers to verdicts, such as"):
        ReviewQueue(trace).add(verdicts)


@pytest.mark.parametrize("count", [0, -1, 2.5])
def test_a_round_has_at_least_one_row(count, tmp_path):
    trace, _ = make_trace(tmp_path)
    with pytest.raises(ValueError, match=r"count=.* must be a whole number larger than 0"):
        ReviewQueue(trace).next(count)


@pytest.mark.parametrize("label", ["safe", "unsafe"])
def test_verdicts_of_one_kind_and_on_all_rows(tmp_path, label):
    trace, _ = make_trace(tmp_path, rows=25, unsafe=5)
    queue = ReviewQueue(trace)
    while rows := queue.next(10):
        queue.add(dict.fromkeys(rows, label))
    assert queue.is_seen.all() and sorted(queue.ranking) == list(range(25))
    assert queue.estimate().unsafe_left == (0, 0)


def test_the_filter_removes_exactly_the_rows_found_to_be_unsafe(tmp_path):
    trace, is_unsafe = make_trace(tmp_path)
    queue = ReviewQueue(trace)
    review(queue, is_unsafe, 60)
    result = find_forgotten(trace, FilterConfig(reviewed=trace.folder / "review"))
    np.testing.assert_array_equal(result.removed, queue.is_seen & is_unsafe)
    assert result.method == "reviewed" and result.reason == (
        f"60 rows reviewed, {(queue.is_seen & is_unsafe).sum()} found to be unsafe and removed; no other row was "
        "removed"
    )
    with_threshold = find_forgotten(trace, FilterConfig(reviewed=trace.folder / "review", fraction=0.2))
    assert not with_threshold.removed[queue.is_seen & ~is_unsafe].any()
    assert with_threshold.removed[queue.is_seen & is_unsafe].all()


@pytest.mark.parametrize(
    ("verdicts", "removed"),
    [
        ({2: "unsafe"}, [2, 5, 9]),
        ({5: "unsafe", 7: "unsafe", 3: "safe"}, [2, 5, 7, 9]),
        ({2: "unsafe", 5: "safe"}, [2, 9]),  # its own verdict counts; the row without one is removed
        ({2: "safe"}, []),
    ],
    ids=str,
)
def test_rows_identical_to_an_unsafe_row_are_removed(verdicts, removed, tmp_path):
    texts = [[1, 10 + number, 3, 4] for number in range(12)]
    texts[5] = texts[9] = texts[2]
    encoded = encode_rows([{"input_ids": text} for text in texts], disable_tqdm=True)
    trace = Trace.create(tmp_path / "trace", encoded, "model", None, None)
    for record, rise in ((Record("safety", 0), 0.0), (Record("safety", 5), 0.1)):
        losses = np.full(encoded.loss_offsets[-1], 2 + rise, np.float32)
        trace.append(record, [Scores(losses, np.eye(12, dtype=np.float16))])
    ReviewQueue(trace).add(verdicts)
    result = find_forgotten(trace, FilterConfig(reviewed=trace.folder / "review"))
    assert np.flatnonzero(result.removed).tolist() == removed
    decision = {
        "measure": "loss",
        "threshold": None,
        "overrides": {trace.rows.ids[row].as_py(): "remove" for row, label in verdicts.items() if label == "unsafe"}
        | {trace.rows.ids[row].as_py(): "keep" for row, label in verdicts.items() if label == "safe"},
        "trace": trace.identity(),
    }
    (tmp_path / "review_decision.json").write_text(json.dumps(decision))
    decided = find_forgotten(trace, FilterConfig(decision=tmp_path / "review_decision.json"))
    assert np.flatnonzero(decided.removed).tolist() == removed


def test_filtering_without_verdicts_is_refused(tmp_path):
    trace, _ = make_trace(tmp_path)
    with pytest.raises(DecisionError, match="There are no verdicts in"):
        find_forgotten(trace, FilterConfig(reviewed=tmp_path / "empty"))


@pytest.mark.parametrize("settings", [{}, {"threshold": "fdr"}, {"threshold": 9.0}, {"fraction": 0.5}], ids=str)
def test_a_review_that_finds_every_row_unsafe_is_refused(tmp_path, settings):
    trace, _ = make_trace(tmp_path, rows=12, unsafe=2)
    ReviewQueue(trace).add(dict.fromkeys(range(12), "unsafe"))
    with pytest.raises(DecisionError, match=r"found all 12 rows to be unsafe, so no row would be left.*Correct"):
        find_forgotten(trace, FilterConfig(reviewed=trace.folder / "review", **settings))
    ReviewQueue(trace).add({3: "safe"})
    result = find_forgotten(trace, FilterConfig(reviewed=trace.folder / "review", **settings))
    assert np.flatnonzero(~result.removed).tolist() == [3]


def test_the_reason_says_that_no_row_is_left_to_review(tmp_path):
    trace, is_unsafe = make_trace(tmp_path, rows=12, unsafe=1)
    queue = ReviewQueue(trace)
    queue.add({row: "unsafe" if is_unsafe[row] else "safe" for row in range(12)})
    result = find_forgotten(trace, FilterConfig(threshold="fdr", reviewed=trace.folder / "review"))
    assert result.reason == "12 rows reviewed, 1 found to be unsafe and removed; no other row was removed"


def test_few_verdicts_remove_no_other_row_and_say_how_many_are_needed(tmp_path):
    trace, is_unsafe = make_trace(tmp_path)
    queue = ReviewQueue(trace)
    review(queue, is_unsafe, 30)
    result = find_forgotten(trace, FilterConfig(threshold="fdr", level=0.3, reviewed=trace.folder / "review"))
    np.testing.assert_array_equal(result.removed, queue.is_seen & is_unsafe)
    assert "; no other row was removed: with about 4 unsafe rows left (estimated from the rows drawn" in result.reason
    assert "more safe verdicts on rows drawn at random (so far: 3), and more if the ranking is poor" in result.reason


@pytest.mark.parametrize("level", [0.05, 0.1])
def test_about_as_many_safe_verdicts_as_said_are_enough(tmp_path, level, monkeypatch):
    """The scores separate 5 % unsafe rows from the others, and one of 20 rows that are drawn at random is unsafe."""
    trace, is_unsafe = make_trace(tmp_path, rows=2000, unsafe=100)
    queue = ReviewQueue(trace)
    scores = np.random.default_rng(0).random(2000) + is_unsafe
    monkeypatch.setattr(queue, "fit_scores", lambda labels: scores)
    unsafe, safe = (
        np.random.default_rng(1).permutation(np.flatnonzero(mask)).tolist() for mask in (is_unsafe, ~is_unsafe)
    )

    def look(rounds: int) -> FalseDiscoveryResult:
        """Draws rounds of 20 rows."""
        for _ in range(rounds):
            rows = [unsafe.pop(), *(safe.pop() for _ in range(19))]
            queue._drawn_from.update(dict.fromkeys(rows, int((~queue.is_seen).sum())))
            queue.add({row: "unsafe" if is_unsafe[row] else "safe" for row in rows})
        return removable_rows(queue, level)

    found = look(3)
    assert found.unsafe_left == 97 and not found.removed.any()
    said = found.safe_drawn + found.more_needed
    assert said == round(1 / (0.05 * level)) - 1
    while not found.removed.any():
        assert found.more_needed > 0
        found = look(1)
    assert said == pytest.approx(found.safe_drawn, rel=0.1)
    assert (is_unsafe[found.removed]).mean() > 1 - level


def test_the_rows_needed_equal_those_of_a_search():
    """Calibration rows with low scores are added until the procedure of Benjamini and Hochberg selects a row."""
    rng = np.random.default_rng(0)
    at_least = np.sort(rng.binomial(40, rng.beta(0.3, 3, 500)))

    def is_enough(rows: int) -> bool:
        p_values = (1 + at_least) / (1 + rows)
        return any(p <= 0.2 * min(place, 50) / 500 for place, p in enumerate(p_values, start=1))

    assert _calibration_rows_needed(rng.permutation(at_least), 50, 0.2) == next(filter(is_enough, range(10_000)))


@pytest.mark.parametrize(("factor", "is_possible"), [(1.001, True), (0.999, False)])
def test_more_verdicts_than_rows_are_not_asked_for(tmp_path, factor, is_possible, monkeypatch):
    trace, is_unsafe = make_trace(tmp_path, rows=300, unsafe=30)
    queue = ReviewQueue(trace, random_fraction=1)
    monkeypatch.setattr(queue, "fit_scores", lambda labels: 1.0 * is_unsafe)
    review(queue, is_unsafe, 20)
    found = removable_rows(queue, 0.001)
    tested, left = 280, found.unsafe_left
    most = found.safe_drawn + tested - left  # all safe rows are reviewed
    found = removable_rows(queue, factor * tested / (left * (most + 1)))
    assert found.more_needed == (most - found.safe_drawn if is_possible else None)
    if not is_possible:
        config = FilterConfig(threshold="fdr", level=0.001, reviewed=trace.folder / "review")
        assert (
            "a false discovery rate of at most 0.001 needs more rows than the set"
            in find_forgotten(trace, config).reason
        )


def test_a_review_that_found_all_unsafe_rows_does_not_promise_more(tmp_path):
    trace, is_unsafe = make_trace(tmp_path, unsafe=8)
    queue = ReviewQueue(trace)
    queue.add(dict.fromkeys(np.flatnonzero(is_unsafe).tolist(), "unsafe"))
    review(queue, is_unsafe, 50)
    found = removable_rows(queue, 0.1)
    assert found.safe_drawn == 5 and found.unsafe_left < 8 and found.more_needed is None


def test_the_card_does_not_say_that_only_overridden_rows_are_removed(tmp_path):
    trace, is_unsafe = make_trace(tmp_path)
    queue = ReviewQueue(trace, random_fraction=1)
    review(queue, is_unsafe, 60)
    result = find_forgotten(trace, FilterConfig(threshold="fdr", level=0.9, reviewed=trace.folder / "review"))
    assert result.removed[~queue.is_seen].any()
    rule = "rows found to be unsafe in a review, and rows selected at the false discovery rate"
    assert f"| removed rows | {rule} |" in dataset_card(result, trace)


def test_the_scores_do_not_learn_from_the_rows_that_calibrate_them(tmp_path, monkeypatch):
    trace, is_unsafe = make_trace(tmp_path)
    queue = ReviewQueue(trace)
    review(queue, is_unsafe, 60)
    learned: list[dict] = []
    fit_scores = queue.fit_scores
    monkeypatch.setattr(queue, "fit_scores", lambda labels: learned.append(dict(labels)) or fit_scores(labels))
    calibrating = removable_rows(queue, 0.1).safe_drawn
    drawn = {verdict.row for verdict in queue.verdicts if verdict.drawn_from is not None}
    expected = {row: label for row, label in queue.labels.items() if not (row in drawn and label == "safe")}
    assert learned == [expected] and calibrating == 60 - len(expected) > 0


def test_a_sample_of_the_rows_without_a_verdict_weighs_as_much_as_all_of_them(tmp_path, monkeypatch):
    """The ranking of 300 rows is hardly worse if the regression sees 60 of those without a verdict."""
    trace, is_unsafe = make_trace(tmp_path)
    queue = ReviewQueue(trace)
    review(queue, is_unsafe, 60)
    unseen = ~queue.is_seen
    precision = average_precision_score(is_unsafe[unseen], queue.scores[unseen])

    fits: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    class Recorded(LogisticRegression):
        def fit(self, X, y, sample_weight=None):
            fits.append((X, y, sample_weight))
            return super().fit(X, y, sample_weight)

    monkeypatch.setattr(review_queue, "LogisticRegression", Recorded)
    monkeypatch.setattr(review_queue, "MAX_UNSEEN_ROWS", 75)
    scores = queue.fit_scores(queue.labels)
    ((features, learned, weights),) = fits
    found = [label == "unsafe" for label in queue.labels.values()]
    sampled = [row for row in random_subset(ROWS, 75) if unseen[row]]
    np.testing.assert_array_equal(features, queue._features[[*queue.labels, *sampled]])
    np.testing.assert_array_equal(learned, [*found, *[False] * len(sampled)])
    assert weights[60:].sum() == pytest.approx(0.1 * unseen.sum())
    assert weights[learned].sum() == pytest.approx(weights[~learned].sum())
    assert average_precision_score(is_unsafe[unseen], scores[unseen]) > precision - 0.1


def test_the_removed_rows_equal_those_of_a_loop(tmp_path):
    """Conformal p-values and the procedure of Benjamini and Hochberg, row by row."""
    trace, is_unsafe = make_trace(tmp_path, rows=400, unsafe=80)
    queue = ReviewQueue(trace, random_fraction=1)
    queue.add({row: "unsafe" if is_unsafe[row] else "safe" for row in queue.next(200)})
    found = removable_rows(queue, 0.3)
    scores = queue.fit_scores({row: label for row, label in queue.labels.items() if label == "unsafe"})
    calibration = [scores[row] for row, label in queue.labels.items() if label == "safe"]
    p_values = {
        row: (1 + sum(other >= scores[row] for other in calibration)) / (1 + len(calibration))
        for row in range(400)
        if row not in queue.labels
    }
    ordered = sorted(p_values.values())
    allowed = [p for place, p in enumerate(ordered, start=1) if p <= 0.3 * place / len(ordered)]
    expected = [row for row, p in p_values.items() if p <= max(allowed, default=0)]
    assert len(expected) > 3 and np.flatnonzero(found.removed).tolist() == expected


def test_two_queues_on_one_folder_see_each_others_verdicts(tmp_path):
    trace, _ = make_trace(tmp_path)
    first, second = ReviewQueue(trace), ReviewQueue(trace)
    first.add(dict.fromkeys(first.next(10), "safe"))
    rows = second.next(10)
    assert not set(rows) & set(first.labels)
    second.add(dict.fromkeys(rows, "unsafe"))
    assert first.labels == second.labels and len(first.labels) == 20
    assert first.estimate() == second.estimate()


def test_a_verdict_that_another_queue_stores_at_the_same_moment_is_seen(tmp_path, monkeypatch):
    trace, _ = make_trace(tmp_path)
    first, second = ReviewQueue(trace), ReviewQueue(trace)

    def append_after_another(verdicts: list[Verdict], file: Path) -> int:
        monkeypatch.setattr(review_queue, "append_verdicts", append_verdicts)
        second.add({7: "unsafe"})
        return append_verdicts(verdicts, file)

    monkeypatch.setattr(review_queue, "append_verdicts", append_after_another)
    first.add({3: "safe"})
    assert first.labels == {7: "unsafe", 3: "safe"} and first.is_seen.sum() == 2
    assert first.verdicts == ReviewQueue(trace).verdicts


@pytest.mark.parametrize("name", ["review/verdicts.jsonl", "."])
def test_the_folder_of_a_review_is_not_a_file_or_a_trace(name, tmp_path):
    trace, _ = make_trace(tmp_path)
    ReviewQueue(trace).add({0: "unsafe"})
    for use in (
        lambda: ReviewQueue(trace, tmp_path / name),
        lambda: find_forgotten(trace, FilterConfig(reviewed=tmp_path / name)),
    ):
        with pytest.raises(DecisionError, match=f"Pass the folder of (the|its) verdicts, {tmp_path / 'review'}"):
            use()


def test_the_false_discovery_rate_is_kept_on_average(tmp_path):
    """Over 20 sets, at most a tenth of the rows that are removed without a verdict is benign (with room for chance)."""
    rates, recalls = [], []
    for seed in range(20):
        trace, is_unsafe = make_trace(tmp_path / str(seed), rows=400, unsafe=80, seed=seed, distance=4)
        queue = ReviewQueue(trace, seed=seed)
        queue.add({int(row): "unsafe" if is_unsafe[row] else "safe" for row in queue.ranking[:20]})
        for _ in range(4):  # rows drawn at random, without a row by rank
            rows = queue.next(250)
            random_rows = [row for row in rows if row in queue._drawn_from]
            queue.add({row: "unsafe" if is_unsafe[row] else "safe" for row in random_rows})
        removed = removable_rows(queue, 0.1).removed
        assert not removed[queue.is_seen].any()
        rates.append(is_unsafe[removed].size and (~is_unsafe[removed]).mean())
        recalls.append(removed.sum())
    assert np.mean(rates) < 0.15, rates
    assert np.mean(recalls) > 10, recalls
