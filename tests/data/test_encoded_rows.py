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
