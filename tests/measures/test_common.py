"""What all measures have in common: mean losses, and that higher means more forgotten."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from forgetfilter_callback.measures import common
from forgetfilter_callback.measures.common import all_finite, mean_losses, windows
from forgetfilter_callback.measures.loss import loss_forgetting
from forgetfilter_callback.measures.pooled import pooled_forgetting
from forgetfilter_callback.measures.relative import relative_forgetting
from forgetfilter_callback.measures.rouge import rouge_forgetting
from forgetfilter_callback.measures.smoothed import agreed_forgetting, loss_changes


def test_mean_losses(samples):
    _, before, _, offsets = samples
    expected = [float(np.mean(x)) if len(x) else math.nan for x in before]
    np.testing.assert_allclose(mean_losses(np.concatenate(before), offsets), expected, rtol=1e-6)


def test_mean_losses_of_samples_without_tokens():
    np.testing.assert_array_equal(mean_losses(np.zeros(0, np.float32), np.zeros(3, int)), [np.nan, np.nan])


def test_higher_is_more_forgotten_for_all_measures():
    low, high = np.array([0.25]), np.array([1.0])
    assert loss_forgetting(low, high) == 0.75  # the loss rose
    assert relative_forgetting(np.array([1.75]), low, high) == 0.5
    assert rouge_forgetting(high, low) == 0.75  # the overlap dropped


def test_windows_are_bounded_by_tokens(monkeypatch):
    monkeypatch.setattr(common, "WINDOW_TOKENS", 10)
    offsets = np.cumsum([0, 5, 4, 12, 0, 3, 1, 6, 10, 2, 0, 0])
    found = [np.diff(window).tolist() for window, _ in windows(offsets)]
    assert found == [[5, 4], [12], [0, 3, 1, 6], [10], [2, 0, 0]]
    spans = [np.arange(offsets[-1])[span] for _, span in windows(offsets)]
    np.testing.assert_array_equal(np.concatenate(spans), np.arange(offsets[-1]))


MEASURES = {
    "mean losses": lambda tokens, offsets, before, after: mean_losses(after, offsets),
    "finite": lambda tokens, offsets, before, after: all_finite(after, offsets),
    "pooled": pooled_forgetting,
    "agreed": agreed_forgetting,
    "rises": lambda *arrays: loss_changes(*arrays).rises,
    "typical change": lambda *arrays: loss_changes(*arrays).typical_change,
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_memory_and_values_do_not_depend_on_the_window(measure, monkeypatch):
    """Tokens occur in many windows, and one sample is longer than a window."""
    rng = np.random.default_rng(1)
    lengths = np.append(rng.integers(0, 30, 4000), 2000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(0, 200, offsets[-1], dtype=np.int32)
    before, after = (rng.gamma(2, size=len(tokens)).astype(np.float32) for _ in range(2))
    after[[5, 400, 7000]] = np.nan, np.inf, -np.inf
    assert len(list(windows(offsets))) == 1
    expected = measure(tokens, offsets, before, after)
    monkeypatch.setattr(common, "WINDOW_TOKENS", 1000)
    tracemalloc.start()
    values = measure(tokens, offsets, before, after)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-14)
    assert peak < 12 * len(tokens)
