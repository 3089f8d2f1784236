"""What all measures have in common: mean losses, and that higher means more forgotten."""

from __future__ import annotations

import math

import numpy as np

from forgetfilter_callback.measures.common import mean_losses
from forgetfilter_callback.measures.loss import loss_forgetting
from forgetfilter_callback.measures.relative import relative_forgetting
from forgetfilter_callback.measures.rouge import rouge_forgetting


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
