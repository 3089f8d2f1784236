"""Samples shared by the tests of the measures."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def samples():
    """Samples of different lengths with shared and repeated tokens; two are empty."""
    rng = np.random.default_rng(0)
    lengths = [5, 1, 0, 8, 2, 3, 0]
    tokens = [rng.integers(0, 6, n) for n in lengths]
    before = [rng.gamma(2, size=n).astype(np.float32) for n in lengths]
    after = [rng.gamma(2, size=n).astype(np.float32) for n in lengths]
    return tokens, before, after, np.concatenate([[0], np.cumsum(lengths)])
