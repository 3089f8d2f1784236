"""`smoothed` forgetting against loops in plain Python."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from measure_helpers import agreed_reference, ridge_strengths
from sklearn.linear_model import Ridge, RidgeCV

from forgetfilter_callback.filtering.thresholds import find_threshold
from forgetfilter_callback.measures import smoothed
from forgetfilter_callback.measures.combined import combined_forgetting
from forgetfilter_callback.measures.pooled import pooled_forgetting
from forgetfilter_callback.measures.smoothed import (
    RIDGE_STRENGTHS,
    nats_per_unit,
    ridge_coefficients,
    smoothed_forgetting,
    smoothed_over_states,
    typical_change,
)


def smoothed_reference(tokens, before, after, states):
    """Plain loops; the ridge strength is chosen by refitting without each sample in turn."""
    agreed = np.array(agreed_reference(tokens, before, after))
    y, mean = agreed - agreed.mean(), agreed.mean()
    x = states - states.mean(axis=0)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)

    def fit(rows, strength):
        return np.linalg.solve(x[rows].T @ x[rows] + strength * np.eye(x.shape[1]), x[rows].T @ y[rows])

    def error(strength):
        others = [[j for j in range(len(y)) if j != i] for i in range(len(y))]
        return sum((y[i] - x[i] @ fit(others[i], strength)) ** 2 for i in range(len(y)))

    return x @ fit(list(range(len(y))), min(ridge_strengths(*states.shape), key=error)) + mean


def test_smoothed_forgetting_equals_the_reference(samples):
    tokens, before, after, offsets = samples
    known = [i for i, own in enumerate(tokens) if len(own)]
    states = np.random.default_rng(5).normal(size=(len(tokens), 4)).astype(np.float32)
    flat = [np.concatenate(x) for x in (tokens, before, after)]
    values = smoothed_forgetting(flat[0], offsets, flat[1], flat[2], states)
    parts = [[x[i] for i in known] for x in (tokens, before, after)]
    expected = smoothed_reference(*parts, states[known].astype(float))
    np.testing.assert_allclose(values[known], expected, rtol=1e-6)
    assert np.isnan(values[[i for i in range(len(tokens)) if i not in known]]).all()


@pytest.mark.parametrize("lengths", [[25, 31, 40, 11], [3, 4, 2]], ids=["long", "as few as can be alike"])
def test_smoothed_forgetting_of_long_samples_and_of_few_samples(lengths):
    rng = np.random.default_rng(8)
    tokens = [rng.integers(0, 12, n) for n in lengths]
    before, after = ([rng.gamma(2, size=n).astype(np.float32) for n in lengths] for _ in range(2))
    states = rng.normal(size=(len(lengths), 3)).astype(np.float16)
    flat = [np.concatenate(x) for x in (tokens, before, after)]
    values = smoothed_forgetting(flat[0], np.cumsum([0, *lengths]), flat[1], flat[2], states)
    expected = smoothed_reference(tokens, before, after, states.astype(float))
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_smoothed_forgetting_ignores_values_that_are_not_finite(samples):
    tokens, before, after, offsets = samples
    states = np.random.default_rng(5).normal(size=(len(tokens), 4)).astype(np.float32)
    first = next(i for i, own in enumerate(tokens) if len(own))
    states[first] = np.nan
    flat = [np.concatenate(x) for x in (tokens, before, after)]
    values = smoothed_forgetting(flat[0], offsets, flat[1], flat[2], states)
    assert np.isnan(values[first]) and np.isfinite(values).sum() == sum(len(own) > 0 for own in tokens) - 1
    broken = flat[2].copy()
    broken[offsets[3] + 1] = np.inf
    for values in (
        smoothed_forgetting(flat[0], offsets, flat[1], broken, np.ones_like(states) + states),
        pooled_forgetting(flat[0], offsets, flat[1], broken),
    ):
        assert np.isnan(values[3])
    alone = smoothed_forgetting(np.array([7]), np.array([0, 1]), np.zeros(1), np.ones(1), np.ones((1, 2)))
    np.testing.assert_allclose(alone, [0.25])  # no other occurrence, so only the prior of a quarter remains


def test_smoothed_is_robust_to_one_extreme_sample():
    rng = np.random.default_rng(3)
    offsets = np.arange(0, 1001, 10)
    tokens, states = rng.integers(0, 30, 1000), rng.normal(size=(100, 4))
    after = rng.normal(np.where(np.arange(1000) < 500, 0.8, 0.0), 0.2)  # half of the samples are forgotten
    values = smoothed_forgetting(tokens, offsets, np.zeros(1000), after, states)
    wild = after.copy()
    wild[-10:] += 50
    others = smoothed_forgetting(tokens, offsets, np.zeros(1000), wild, states)[:-1]
    one, other = (
        typical_change((losses**2).reshape(100, 10).mean(axis=1), np.full(100, 10)) for losses in (wild, after)
    )
    assert one < 1.2 * other < 0.6 and 1 - np.exp(-np.sqrt(np.mean(wild**2))) > 0.99
    assert np.median(others[:50]) > 0.8 * np.median(values[:50])


@pytest.mark.parametrize("nats", [5.0, 0.5, -1.0])
def test_nats_per_unit(nats):
    values, counts = np.linspace(0.0, 1.0, 101), np.full(101, 4)
    rises = nats * values / 4 + 0.3  # all samples became less likely by a constant too
    assert nats_per_unit(values, rises, counts) == pytest.approx(nats)
    for place in (0, -1):  # an extreme sample at either end
        wild = rises.copy()
        wild[place] += 500.0
        assert nats_per_unit(values, wild, counts) == pytest.approx(nats, rel=0.2)
    assert math.isnan(nats_per_unit(np.ones(101), rises, counts))  # all values are equal
    rises[0] = np.nan
    assert nats_per_unit(values, rises, counts) == pytest.approx(nats)
    assert math.isnan(nats_per_unit(values, np.full(101, np.nan), counts))


@pytest.mark.parametrize("fraction", [0.01, 0.02, 0.05])
def test_a_few_forgotten_samples_suffice_for_nats_per_unit(fraction):
    rng = np.random.default_rng(0)
    unsafe = np.arange(400) < fraction * 400
    values = np.where(unsafe, 1.6, 0.3) + rng.normal(0, 0.1, 400)
    rises = np.where(unsafe, 1.0, 0.0) + rng.normal(0, 0.15, 400)
    assert nats_per_unit(values, rises, np.full(400, 6)) > 1


def test_drift_of_long_samples_does_not_hide_short_forgotten_samples():
    """Sums alone would hide them: 200 tokens drifting by 0.1 are 20 nats, 15 tokens rising by 1 are 15."""
    unsafe = np.arange(200) % 2 == 0
    counts = np.where(unsafe, 15, 200)
    found = nats_per_unit(np.where(unsafe, 1.5, 0.2), np.where(unsafe, 1.0, 0.1), counts)
    assert found == pytest.approx(0.9 / 1.3 * 107.5)


@pytest.mark.parametrize(("measure", "compute"), [("smoothed", smoothed_forgetting), ("combined", combined_forgetting)])
def test_shifts_within_samples_are_not_removed(measure, compute):
    """In half of the samples one token loses 4 nats; in the second set another token of the sample gains 4."""
    rng = np.random.default_rng(0)
    offsets = np.arange(0, 4001, 10)
    first, marked = np.arange(4000) % 10 == 0, np.repeat(np.arange(400) % 2 == 0, 10)
    tokens = np.where(first, np.where(marked, 2, 1), 100 + rng.integers(0, 50, 4000))
    states = np.where(marked[::10, None], [1.0, 0.0], [0.0, 1.0]) + rng.normal(0, 0.1, (400, 2))
    lost = rng.normal(0, 0.1, 4000) + 4.0 * (marked & first)
    to_and_fro = lost - 4.0 * (marked & (np.arange(4000) % 10 == 5))
    found = []
    for rises in (lost, to_and_fro):
        values = compute(tokens, offsets, np.zeros(4000), rises, states)
        # As on a trace: also `combined` is compared with the loss by the smoothed estimate.
        agreed = smoothed_forgetting(tokens, offsets, np.zeros(4000), rises, states)
        found.append(
            find_threshold(
                values, measure, nats_per_unit(agreed, rises.reshape(400, 10).mean(axis=1), np.full(400, 10))
            )
        )
    assert found[0].separable and not found[1].separable
    assert "less likely by only 0.0" in found[1].reason or "less likely by only -0.0" in found[1].reason


def test_the_typical_change_is_nan_when_all_losses_diverged():
    assert math.isnan(typical_change(np.full(2, np.nan), np.full(2, 2)))


def test_smoothed_forgetting_of_noise_is_small():
    """If safety finetuning changed almost nothing, values are scaled by 0.05 nats."""
    tokens, offsets = np.repeat(np.arange(4), 10), np.arange(0, 41, 10)
    rises = np.random.default_rng(0).normal(0, 1e-4, 40)
    states = np.random.default_rng(1).normal(size=(4, 3))
    values = smoothed_forgetting(tokens, offsets, np.zeros(40), rises, states)
    assert 0 < np.abs(values).max() < 0.01
    none = smoothed_forgetting(tokens[:0], np.zeros(5, dtype=int), np.zeros(0), np.zeros(0), states)
    assert np.isnan(none).all()


def test_states_are_read_in_chunks(tmp_path, monkeypatch):
    """Values and states of some samples are unknown. Chunks give the values of one array."""
    count, size, rng = 8_000, 300, np.random.default_rng(0)
    states = np.memmap(tmp_path / "states", np.float16, "w+", shape=(count, size))
    states[:] = rng.normal(size=states.shape)
    values = states[:, 0] + rng.normal(0, 0.1, count)
    values[[3, 700]], states[[5, 7_999], 2] = np.nan, np.inf
    monkeypatch.setattr(smoothed, "random_subset", lambda count, size: np.arange(0, count, 16))
    expected = smoothed_over_states(values, np.array(states))
    monkeypatch.setattr(smoothed, "RIDGE_MAX_SAMPLES", 500)
    tracemalloc.start()
    found = smoothed_over_states(values, states)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.flatnonzero(np.isnan(found)).tolist() == [3, 5, 700, 7_999]
    assert peak < states.nbytes


@pytest.mark.parametrize("shape", [(300, 20), (20, 300), (50, 50), (3, 512)])
@pytest.mark.parametrize("noise", [0.01, 1.0, 100.0])
def test_the_ridge_equals_that_of_scikit_learn(shape, noise):
    rng = np.random.default_rng(shape)
    features = rng.normal(size=shape)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    targets = features @ rng.normal(size=shape[1]) + noise * rng.normal(size=shape[0])
    ridge = RidgeCV(RIDGE_STRENGTHS * shape[0] / min(shape), fit_intercept=False, gcv_mode="svd").fit(features, targets)
    np.testing.assert_allclose(ridge_coefficients(features, targets), ridge.coef_, rtol=1e-7, atol=1e-9)
    two = np.column_stack([targets, rng.normal(size=shape[0])])
    expected = np.column_stack([ridge_coefficients(features, each) for each in two.T])
    np.testing.assert_allclose(ridge_coefficients(features, two), expected, rtol=1e-12, atol=1e-14)


def test_the_strength_is_chosen_by_random_samples(monkeypatch):
    """The strength that 100 of 300 samples choose, with a fit on all of them."""
    monkeypatch.setattr(smoothed, "RIDGE_MAX_LEFT_OUT", 100)
    rng = np.random.default_rng(0)
    features, noise = rng.normal(size=(300, 20)), np.where(np.arange(300) % 3 == 0, 30.0, 0.1)
    targets = features @ rng.normal(size=20) + noise * rng.normal(size=300)
    drawn = smoothed.random_subset(300, 100)
    assert len(drawn) == 100 and (np.diff(drawn) > 0).all() and len(np.unique(drawn % 3)) == 3

    def fitted(strength, left_out=None):
        rows = np.arange(300) != left_out
        return Ridge(strength, fit_intercept=False).fit(features[rows], targets[rows]).coef_

    def error(strength):
        return sum((targets[i] - features[i] @ fitted(strength, i)) ** 2 for i in drawn)

    best = min(RIDGE_STRENGTHS * 300 / 20, key=error)
    np.testing.assert_allclose(ridge_coefficients(features, targets), fitted(best), rtol=1e-6)


@pytest.mark.parametrize("count", [2400, 20_000])
def test_kinds_of_samples_that_alternate_are_both_seen(count):
    """Every second sample is forgotten. Evenly spaced samples of such a set would all be of one kind."""
    rng = np.random.default_rng(0)
    forgotten = np.arange(count) % 2 == 1
    states = (np.where(forgotten[:, None], [1.0, 0.0], [0.0, 1.0]) + rng.normal(0, 0.1, (count, 2))).astype(np.float16)
    values = smoothed_over_states(forgotten + rng.normal(0, 0.1, count), states)
    assert abs(values[forgotten].mean() - 1) < 0.05 and abs(values[~forgotten].mean()) < 0.05
