"""`pooled` forgetting against loops in plain Python."""

from __future__ import annotations

import numpy as np
from measure_helpers import pooled_reference

from forgetfilter_callback.measures.pooled import pooled_forgetting


def test_pooled_forgetting_is_the_mean_of_the_three_largest_pooled_rises(samples):
    tokens, before, after, offsets = samples
    expected = pooled_reference(tokens, before, after)
    flat = [np.concatenate(x) for x in (tokens, before, after)]
    np.testing.assert_allclose(pooled_forgetting(flat[0], offsets, flat[1], flat[2]), expected, rtol=1e-6)


def test_a_diverged_token_counts_as_zero_rise_in_other_samples():
    tokens, offsets = np.array([4, 4, 4]), np.arange(4)
    losses = np.array([1.0, 3.0, np.inf])
    # For the first sample, one other rises by 2 and one diverges; the prior adds three zeros.
    expected = [(2 + 0) / 5, (0 + 0) / 5, np.nan]
    np.testing.assert_allclose(pooled_forgetting(tokens, offsets, np.ones(3), losses), expected)
