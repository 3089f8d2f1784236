"""Encoded rows read in windows."""

from __future__ import annotations

import numpy as np
from helpers import rows_with_common_prefixes, tiny_llama

from forgetfilter_callback import encode_rows
from forgetfilter_callback.data import encode_each, encoded_rows
from forgetfilter_callback.scoring.token_losses import token_losses


def test_windows_give_the_same_losses(monkeypatch):
    model, rows = tiny_llama(), rows_with_common_prefixes()
    whole = encode_rows(rows)
    expected, fingerprint = token_losses(model, whole, disable_tqdm=True), whole.fingerprint
    for module in (encoded_rows, encode_each):
        monkeypatch.setattr(module, "WINDOW", 7)
    windows = encode_rows(rows)
    assert len(list(windows.windows())) == 7
    assert windows.ids == whole.ids and windows.fingerprint == fingerprint
    np.testing.assert_allclose(token_losses(model, windows, disable_tqdm=True), expected, rtol=1e-5, atol=1e-6)


def test_windows_are_bounded_by_tokens(monkeypatch):
    model, lengths = tiny_llama(), [5, 4, 12, 3, 1, 6, 10, 2]
    rng = np.random.default_rng(0)
    rows = encode_rows([{"input_ids": rng.integers(5, 100, length).tolist()} for length in lengths], disable_tqdm=True)
    expected = token_losses(model, rows, disable_tqdm=True)
    monkeypatch.setattr(encoded_rows, "WINDOW_TOKENS", 10)
    windows = list(rows.windows())
    assert [np.diff(window.offsets).tolist() for window in windows] == [[5, 4], [12], [3, 1, 6], [10], [2]]
    assert [sample for window in windows for sample in window.ids.to_pylist()] == rows.ids.to_pylist()
    np.testing.assert_array_equal(np.concatenate([window.tokens for window in windows]), rows.tokens)
    np.testing.assert_allclose(token_losses(model, rows, disable_tqdm=True), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(encoded_rows, "WINDOW", 2)
    assert [len(window) for window in rows.windows()] == [2, 1, 2, 1, 1, 1]
