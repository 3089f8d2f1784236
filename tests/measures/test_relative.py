"""`relative` forgetting."""

from __future__ import annotations

import numpy as np

from forgetfilter_callback.measures.relative import relative_forgetting


def test_relative_forgetting():
    base, before, after = np.array([3.0, 2.0, 1.0]), np.array([1.0, 1.0, 0.99]), np.array([2.0, 0.5, 1.0])
    np.testing.assert_allclose(relative_forgetting(base, before, after), [0.5, -0.5, 0.1])
