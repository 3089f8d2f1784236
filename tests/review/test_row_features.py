"""Features of the rows: what they are, and the memory they take."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.decomposition import PCA
from test_review_queue import make_trace

from forgetfilter_callback.review import row_features


@pytest.mark.parametrize("fitted", [1, 40], ids=["all", "every 40th"])
def test_components_are_those_of_scikit_learn_and_states_are_read_in_chunks(fitted, tmp_path, monkeypatch):
    """Chunks give the components of one array. Numbers that are not finite count as the mean of the others."""
    count, size, rng = 20_000, 300, np.random.default_rng(0)
    states = np.memmap(tmp_path / "states", np.float16, "w+", shape=(count, size))
    states[:] = rng.normal(size=states.shape) * np.geomspace(10, 1, size)
    states[[5, count - 1], 2] = np.inf, np.nan
    states[7] = np.nan
    known = np.ma.masked_invalid(np.array(states, np.float64))
    directions = known.filled(known.mean(axis=0)) - known.mean(axis=0).data
    directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-9)
    pca = PCA(100, svd_solver="full").fit(directions[::fitted])
    expected = pca.transform(directions)
    variance = expected[::fitted].var(axis=0, ddof=1).sum()
    monkeypatch.setattr(row_features, "random_subset", lambda count, size: np.arange(0, count, fitted))
    monkeypatch.setattr(row_features, "COMPONENTS_MAX_ROWS", 500)
    tracemalloc.start()
    found = row_features._state_components(states, count, variance)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found[:, :10] * signs[:10], expected[:, :10], atol=1.2e-4)
    assert found.shape == (count, 100) and found.dtype == np.float32
    assert fitted == 1 or peak < states.nbytes


def test_the_components_have_four_times_the_variance_of_the_ranks(tmp_path):
    trace, _ = make_trace(tmp_path)
    features = row_features.row_features(trace)
    ranks, components = features[:, :9], features[:, 9:]
    assert components.shape[1] == 16  # the size of the states
    assert components.var(axis=0).sum() == pytest.approx(4 * 9, rel=5e-3)
    ranks = np.delete(ranks, 6, axis=1)  # all rows have the same length
    np.testing.assert_allclose(ranks.var(axis=0), 1, atol=0.03)  # the quantiles of a finite number of rows
