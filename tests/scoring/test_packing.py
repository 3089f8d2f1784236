"""Rows that share a prefix are packed together, within a token bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import random_rows, reference_losses, rows_with_common_prefixes, tiny_llama
from tiny_models import REUSING_MODELS, reuses_prefixes

from forgetfilter_callback import encode_rows
from forgetfilter_callback.scoring import packing
from forgetfilter_callback.scoring.packing import plan_packs
from forgetfilter_callback.scoring.token_losses import token_losses


@pytest.mark.parametrize("make_model", REUSING_MODELS, ids=lambda f: f.__name__)
def test_prefixes_are_reused_by_supported_models(make_model, monkeypatch):
    model, rows = make_model().eval(), rows_with_common_prefixes()
    assert reuses_prefixes(model, rows)
    read = 0
    forward = model.forward

    def counting_forward(*args, **kwargs):
        nonlocal read
        read += kwargs["input_ids"].numel()
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting_forward)
    losses = token_losses(model, encode_rows(rows), batch_tokens=256, disable_tqdm=True)
    assert read < 0.6 * sum(len(row["input_ids"]) for row in rows)
    np.testing.assert_allclose(losses, reference_losses(model, rows), rtol=1e-5, atol=1e-6)


def test_packs_are_bounded():
    rows = encode_rows(rows_with_common_prefixes())
    packs = plan_packs(rows, longest=50)
    assert max(pack.length for pack in packs) <= 50 < plan_packs(rows, longest=1000)[0].length
    assert sorted(row for pack in packs for row in pack.rows) == list(range(len(rows)))


@pytest.mark.parametrize("make_rows", [random_rows, rows_with_common_prefixes], ids=lambda f: f.__name__)
def test_attention_masks_are_bounded(make_rows, monkeypatch):
    monkeypatch.setattr(packing, "_MAX_MASK_ENTRIES", 40 * 40)
    model, rows = tiny_llama(), make_rows(40)
    forward, masks = model.forward, []

    def recording_forward(*args, **kwargs):
        packs, width = kwargs["input_ids"].shape
        masks.append(packs * width * width)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", recording_forward)
    losses = token_losses(model, encode_rows(rows), disable_tqdm=True)
    assert 40 * 40 / 2 < max(masks) <= 40 * 40
    np.testing.assert_allclose(losses, reference_losses(model, rows), rtol=1e-5, atol=1e-6)


def test_out_of_memory_splits_a_pack(monkeypatch):
    model, rows = tiny_llama(), encode_rows(rows_with_common_prefixes())
    expected = token_losses(model, rows, reuse_prefixes=False, disable_tqdm=True)
    forward, lengths = model.forward, []

    def forward_that_fits_forty(*args, **kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        if lengths[-1] > 40:
            raise torch.OutOfMemoryError("no memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward_that_fits_forty)
    np.testing.assert_allclose(token_losses(model, rows, disable_tqdm=True), expected, rtol=1e-5, atol=1e-6)
    assert max(lengths) > 80
