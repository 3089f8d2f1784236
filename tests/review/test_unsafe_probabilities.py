"""The probability of being unsafe: calibrated on synthetic sets, and refused where there are too few verdicts."""

from __future__ import annotations

import numpy as np
import pytest
from test_review_queue import make_trace, review

from forgetfilter_callback import FilterConfig, ReviewQueue, find_forgotten, to_dataset
from forgetfilter_callback.errors import DecisionError
from forgetfilter_callback.review.unsafe_probabilities import unsafe_probabilities, why_no_probabilities


@pytest.mark.parametrize(("unsafe", "looks"), [(15, 60), (30, 100), (100, 100)])
def test_probabilities_of_rows_without_a_verdict_are_calibrated(unsafe, looks, tmp_path):
    """They sum to about the number of unsafe rows. Their log loss is below that of the true fraction for every row."""
    expected, actual, losses, base = [], [], [], []
    for seed in range(12):
        trace, is_unsafe = make_trace(tmp_path / str(seed), unsafe=unsafe, seed=seed)
        queue = ReviewQueue(trace, seed=seed, random_fraction=0.2)
        review(queue, is_unsafe, looks)
        if why_no_probabilities(queue) is not None:
            continue
        probabilities, left = unsafe_probabilities(queue), ~queue.is_seen
        np.testing.assert_array_equal(probabilities[queue.is_seen], is_unsafe[queue.is_seen])
        assert ((probabilities[left] > 0) & (probabilities[left] < 1)).all()
        expected.append(probabilities[left].sum())
        actual.append(is_unsafe[left].sum())
        losses.append(log_loss(is_unsafe[left], probabilities[left]))
        base.append(log_loss(is_unsafe[left], np.full(left.sum(), is_unsafe[left].mean().clip(1e-3))))
    assert len(losses) > 5
    assert 0.7 * np.mean(actual) < np.mean(expected) < 1.3 * np.mean(actual) + 3, (expected, actual)
    assert np.mean(losses) < 0.97 * np.mean(base), (losses, base)


def log_loss(is_unsafe: np.ndarray, probabilities: np.ndarray) -> float:
    return float(-np.log(np.where(is_unsafe, probabilities, 1 - probabilities)).mean())


def test_likely_rows_are_more_likely_unsafe(tmp_path):
    """With a third of the rows unsafe there are enough of them to count how often a probability comes true."""
    probabilities, outcomes = [], []
    for seed in range(30):
        trace, is_unsafe = make_trace(tmp_path / str(seed), unsafe=100, seed=seed)
        queue = ReviewQueue(trace, seed=seed, random_fraction=0.2)
        review(queue, is_unsafe, 60)
        probabilities.append(unsafe_probabilities(queue)[~queue.is_seen])
        outcomes.append(is_unsafe[~queue.is_seen])
    all_probabilities, all_outcomes = np.concatenate(probabilities), np.concatenate(outcomes)
    quarters = np.array_split(np.argsort(all_probabilities), 4)
    expected = np.array([all_probabilities[quarter].mean() for quarter in quarters])
    actual = np.array([all_outcomes[quarter].mean() for quarter in quarters])
    assert (expected - actual > -0.1).all() and (expected - actual < 0.15).all(), (expected, actual)  # rather too high
    assert (np.diff(actual) > 0.05).all(), actual


def test_no_verdict_is_compared_with_a_score_that_has_learned_from_it(tmp_path, monkeypatch):
    trace, is_unsafe = make_trace(tmp_path)
    queue = ReviewQueue(trace, random_fraction=0.2)
    review(queue, is_unsafe, 60)
    fit_scores, learned = queue.fit_scores, []
    monkeypatch.setattr(queue, "fit_scores", lambda labels: learned.append(set(labels)) or fit_scores(labels))
    unsafe_probabilities(queue)
    seen = set(queue.labels)
    folds = [seen - labels for labels in learned if labels != seen]
    assert set.union(*folds) == seen and sum(map(len, folds)) == 60 and len(folds) > 4


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (
            {"unsafe": 4, "safe": 30, "drawn": 30},
            "There are 4 unsafe and 30 safe verdicts on distinct rows. 30 of these rows were drawn",
        ),
        ({"unsafe": 30, "safe": 4, "drawn": 30}, "at least 5 verdicts of each kind and 10 on rows drawn at random"),
        ({"unsafe": 30, "safe": 30, "drawn": 9}, "9 of these rows were drawn at random"),
        ({"unsafe": 5, "safe": 5, "drawn": 10}, None),
    ],
    ids=str,
)
def test_too_few_verdicts_are_refused(verdicts, said, tmp_path):
    trace, _ = make_trace(tmp_path)
    queue = ReviewQueue(trace, random_fraction=0.2)
    queue._drawn_from = dict.fromkeys(range(verdicts["drawn"]), 300)
    labels = ["unsafe"] * verdicts["unsafe"] + ["safe"] * verdicts["safe"]
    queue.add(dict(enumerate(labels)))
    if said is None:
        assert why_no_probabilities(queue) is None and len(unsafe_probabilities(queue)) == 300
        return
    with pytest.raises(DecisionError, match=said):
        unsafe_probabilities(queue)
    with pytest.raises(DecisionError, match=said):
        find_forgotten(trace, FilterConfig(reviewed=trace.folder / "review", weights=True))


def test_scores_that_rank_the_unsafe_rows_last_give_no_weights(tmp_path, monkeypatch, caplog):
    """Otherwise the most suspicious rows would have the largest weights."""
    trace, is_unsafe = make_trace(tmp_path)
    queue = ReviewQueue(trace, random_fraction=0.2)
    review(queue, is_unsafe, 60)
    assert np.isfinite(unsafe_probabilities(queue)).all()
    monkeypatch.setattr(
        ReviewQueue, "fit_scores", lambda self, labels: np.random.default_rng(0).random(300) - is_unsafe
    )
    queue = ReviewQueue(trace)
    with pytest.raises(DecisionError, match=r"ranking does not separate the unsafe rows.* Review more rows"):
        unsafe_probabilities(queue)
    rows = [{"input_ids": trace.rows.sample(number)[0].tolist()} for number in range(300)]
    assert set(to_dataset(trace, rows)["forgetfilter_weight"]) == {None}
    assert "`forgetfilter_weight` is null: The ranking does not separate" in caplog.text


def test_a_filter_with_weights_removes_nothing(tmp_path):
    trace, is_unsafe = make_trace(tmp_path)
    queue = ReviewQueue(trace, random_fraction=0.2)
    review(queue, is_unsafe, 60)
    result = find_forgotten(trace, FilterConfig(reviewed=trace.folder / "review", weights=True))
    assert not result.removed.any() and result.method == "weights"
    assert (result.weights[queue.is_seen] == ~is_unsafe[queue.is_seen]).all()
    assert result.weights[is_unsafe].mean() < result.weights[~is_unsafe].mean() - 0.3
    ids = trace.rows.ids.take(np.arange(0, 300, 2)[::-1])
    other = find_forgotten(trace, FilterConfig(reviewed=trace.folder / "review", weights=True), ids)
    np.testing.assert_array_equal(other.weights, result.weights[::2][::-1])
