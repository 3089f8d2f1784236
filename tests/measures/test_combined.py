"""`combined` forgetting against loops, scikit-learn and the standard library."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from measure_helpers import agreed_reference, pooled_reference, ridge_strengths
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV

from forgetfilter_callback.measures.combined import combined_forgetting, mean_estimate


def reference(tokens, offsets, before, after, states):
    """One estimate at a time: clipped, smoothed by scikit-learn, and scaled with `statistics`."""
    samples = [np.split(values, offsets[1:-1]) for values in (tokens, before, after)]
    loss = [sum(map(float, b - a)) / len(a) for _, a, b in zip(*samples, strict=True)]
    directions = np.array([state - states.mean(axis=0) for state in states])
    directions = np.array([each / math.sqrt(sum(each**2)) for each in directions])
    smoothed = []
    for estimate in (loss, pooled_reference(*samples), agreed_reference(*samples)):
        low, high = np.percentile(estimate, [2, 98])
        clipped = np.array([min(max(value, low - (high - low)), high + (high - low)) for value in estimate])
        ridge = RidgeCV(ridge_strengths(*states.shape), fit_intercept=False, gcv_mode="svd")
        ridge.fit(directions, clipped - clipped.mean())
        smoothed.append(ridge.predict(directions) + clipped.mean())
    mean, deviation = statistics.fmean(smoothed[2]), statistics.pstdev(smoothed[2])
    in_one_unit = [
        [mean + deviation * (value - statistics.fmean(each)) / statistics.pstdev(each) for value in each]
        for each in smoothed
    ]
    return [sum(values) / 3 for values in zip(*in_one_unit, strict=True)]


def flat_samples(count=40, seed=2):
    """Random losses of samples with shared tokens and informative states. One sample has an extreme loss."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, count)
    offsets = np.cumsum([0, *lengths])
    states = rng.normal(size=(count, 4)).astype(np.float16)
    before = rng.gamma(2, size=offsets[-1]).astype(np.float32)
    after = before + np.repeat(states[:, 0], lengths).astype(np.float32) + rng.normal(0, 0.5, offsets[-1])
    after[0] += 100
    return rng.integers(0, 20, offsets[-1]), offsets, before, after.astype(np.float32), states


def test_combined_forgetting_equals_the_reference():
    values = combined_forgetting(*flat_samples())
    tokens, offsets, before, after, states = flat_samples()
    expected = reference(tokens, offsets, before.astype(float), after.astype(float), states.astype(float))
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert np.std(values) > 0.1


@pytest.mark.parametrize("broken", ["before", "after", "state"])
def test_only_the_sample_with_a_value_that_is_not_finite_is_unknown(broken):
    tokens, offsets, before, after, states = flat_samples()
    complete = combined_forgetting(tokens, offsets, before, after, states)
    if broken == "state":
        states[3, 1] = np.nan
    else:
        {"before": before, "after": after}[broken][offsets[3]] = np.inf
    values = combined_forgetting(tokens, offsets, before, after, states)
    assert np.flatnonzero(np.isnan(values)).tolist() == [3]
    others = np.arange(40) != 3
    assert np.corrcoef(values[others], complete[others])[0, 1] > 0.99


def test_samples_without_loss_tokens_and_sets_without_any(samples):
    tokens, before, after, offsets = samples
    states = np.random.default_rng(5).normal(size=(len(tokens), 4)).astype(np.float16)
    values = combined_forgetting(np.concatenate(tokens), offsets, np.concatenate(before), np.concatenate(after), states)
    assert np.isnan(values).tolist() == [len(own) == 0 for own in tokens]
    none = combined_forgetting(np.zeros(0, int), np.zeros(5, int), np.zeros(0), np.zeros(0), np.ones((4, 2)))
    assert np.isnan(none).all() and len(none) == 4


@pytest.mark.parametrize("rounding", [0.0, 1e-9])
def test_an_estimate_that_smoothing_removes_does_not_decide(rounding):
    """Two of the estimates do not vary, up to rounding. Scaling them to the spread of the third would make them count."""
    constant, noise = np.array([7.0, 7.0, 7.0, 7.0]), np.array([1.0, -1.0, 1.0, -1.0])
    agreed = np.array([0.0, 1.0, 2.0, 3.0])
    estimates = np.column_stack([constant + noise, constant + 1e-3 * noise, agreed])
    smoothed = np.column_stack([constant + rounding * noise, constant - rounding * noise, agreed])
    np.testing.assert_allclose(mean_estimate(estimates, smoothed), agreed)


def test_combined_is_robust_to_one_extreme_sample():
    """One of 100 samples rises by 30 nats. The order of the others hardly changes."""
    tokens, offsets, before, after, states = flat_samples(100)
    values = combined_forgetting(tokens, offsets, before, after, states)
    after[offsets[50] : offsets[51]] += 30
    wild = combined_forgetting(tokens, offsets, before, after, states)
    others = np.arange(100) != 50
    assert spearmanr(values[others], wild[others]).statistic > 0.95


def test_values_of_noise_are_small():
    """If safety finetuning changed almost nothing, scaling the estimates to one spread must not inflate them."""
    tokens, offsets = np.repeat(np.arange(8), 10), np.arange(0, 81, 10)
    rises = np.random.default_rng(0).normal(0, 1e-4, 80)
    states = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float16)
    values = combined_forgetting(tokens, offsets, np.zeros(80), rises, states)
    assert 0 < np.abs(values).max() < 0.01
