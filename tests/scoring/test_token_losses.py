"""Losses per token equal those of one row at a time, for any batch size, order and precision."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import random_rows, reference_losses, rows_with_common_prefixes, tiny_llama, tiny_lora
from peft import PromptTuningConfig, get_peft_model
from tiny_models import NOT_REUSING_MODELS, REUSING_MODELS, gpt2, longrope, qwen, reuses_prefixes, sliding_window

from forgetfilter_callback import encode_rows
from forgetfilter_callback.data import encoded_rows
from forgetfilter_callback.errors import EncodingError
from forgetfilter_callback.measures.common import mean_losses
from forgetfilter_callback.scoring import forward_pass as forward_module
from forgetfilter_callback.scoring import model_capabilities as model_support
from forgetfilter_callback.scoring import token_losses as token_losses_module
from forgetfilter_callback.scoring.token_losses import token_losses


@pytest.mark.parametrize("make_rows", [random_rows, rows_with_common_prefixes], ids=lambda f: f.__name__)
@pytest.mark.parametrize("make_model", [*REUSING_MODELS, *NOT_REUSING_MODELS], ids=lambda f: f.__name__)
def test_losses_equal_the_one_row_reference(make_model, make_rows):
    model, rows = make_model(), make_rows(17)
    losses = token_losses(model.eval(), encode_rows(rows), batch_tokens=64, disable_tqdm=True)
    np.testing.assert_allclose(losses, reference_losses(model, rows), rtol=1e-5, atol=1e-6)


def padded_rows(side: str) -> list[dict[str, list[int]]]:
    """Rows with labels on their padding, and rows without padding that share a prefix."""
    rng = np.random.default_rng(0)
    rows = []
    for length in (3, 9, 14, 5, 14, 13, 8):
        tokens, padding = [5, 6, *rng.integers(5, 99, length - 2).tolist()], [1] * (14 - length)
        input_ids = tokens + padding if side == "right" else padding + tokens
        attended = [1] * length + [0] * len(padding)
        rows.append({"input_ids": input_ids, "labels": input_ids,
                     "attention_mask": attended if side == "right" else attended[::-1]})  # fmt: skip
    return rows


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make_model", [*REUSING_MODELS, *NOT_REUSING_MODELS], ids=lambda f: f.__name__)
@pytest.mark.parametrize("flash", [False, True])
def test_labels_on_padding(make_model, side, flash, monkeypatch):
    """Also with a sliding window, where padding may attend to nothing, and where other rows are free of padding."""
    if flash:
        monkeypatch.setattr(token_losses_module, "can_reuse_prefixes", lambda model, rows: False)
        monkeypatch.setattr(forward_module, "is_padding_free", model_support._takes_own_positions)
    model, rows = make_model().eval(), padded_rows(side)
    expected = []
    for row in rows:
        # Only virtual tokens predict the first token.
        inputs = {
            name: torch.tensor([values]) for name, values in {**row, "labels": [-100, *row["labels"][1:]]}.items()
        }
        with torch.no_grad():
            expected.append(float(model(**inputs).loss))
    encoded = encode_rows(rows)
    losses = mean_losses(token_losses(model, encoded, batch_tokens=64, disable_tqdm=True), encoded.loss_offsets)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


PADDING_FREE = [tiny_llama, tiny_lora, sliding_window, qwen, gpt2]


@pytest.mark.parametrize("make_model", PADDING_FREE, ids=lambda f: f.__name__)
def test_padding_free_batches(make_model, monkeypatch):
    """Padding-free batches are meant for flash attention; `sdpa` accepts them too, but is slower."""
    model, rows = make_model().eval(), random_rows(17)
    monkeypatch.setattr(token_losses_module, "can_reuse_prefixes", lambda model, rows: False)
    monkeypatch.setattr(forward_module, "is_padding_free", model_support._takes_own_positions)
    forward, read = model.forward, []

    def counting_forward(*args, **kwargs):
        assert "attention_mask" not in kwargs
        read.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting_forward)
    losses = token_losses(model, encode_rows(rows), batch_tokens=128, disable_tqdm=True)
    last_loss_tokens = [max(i for i, label in enumerate(row["labels"]) if label != -100) for row in rows]
    assert {batch for batch, _ in read} == {1} and sum(length for _, length in read) == sum(last_loss_tokens)
    monkeypatch.setattr(model, "forward", forward)
    np.testing.assert_allclose(losses, reference_losses(model, rows), rtol=1e-5, atol=1e-6)


def test_longrope_scales_each_row_by_its_own_length():
    model, rows = longrope(), random_rows(30)
    assert reuses_prefixes(model, random_rows(9, longest=12)) and not reuses_prefixes(model, rows)
    losses = token_losses(model, encode_rows(rows), disable_tqdm=True)
    # `reference_losses` also reads the last token, which changes the length that LongRoPE sees.
    last = [max(i for i, label in enumerate(row["labels"]) if label != -100) for row in rows]
    assert min(last) < 12 < max(last)
    expected = []
    for row, end in zip(rows, last, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"][:end]])).logits[0].log_softmax(-1)
        expected += [-logits[i - 1, label] for i, label in enumerate(row["labels"]) if i and label != -100]
    np.testing.assert_allclose(losses, np.array(expected), rtol=1e-5, atol=1e-6)


def test_virtual_tokens_count_towards_the_longrope_context():
    model = get_peft_model(longrope(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    rows = encode_rows(random_rows(30))
    alone = token_losses(model, rows, batch_tokens=1, disable_tqdm=True)
    np.testing.assert_allclose(token_losses(model, rows, disable_tqdm=True), alone, rtol=1e-5, atol=1e-6)


def test_no_rows_give_no_losses():
    rows = encode_rows(random_rows(3)).select([])
    assert token_losses(tiny_llama(), rows, disable_tqdm=True).shape == (0,)


@pytest.mark.parametrize("batch_tokens", [1, 37, 4096])
def test_losses_do_not_depend_on_the_batch(batch_tokens):
    model, rows = tiny_lora(), encode_rows(random_rows(17))
    losses = token_losses(model, rows, batch_tokens=batch_tokens, disable_tqdm=True)
    np.testing.assert_allclose(losses, token_losses(model, rows, disable_tqdm=True), rtol=1e-5, atol=1e-6)


def test_losses_do_not_depend_on_the_order():
    model, rows = tiny_llama(), encode_rows(random_rows(17))
    order = np.random.default_rng(0).permutation(len(rows))
    losses = np.split(token_losses(model, rows, disable_tqdm=True), rows.loss_offsets[1:-1])
    shuffled = rows.select(order)
    again = np.split(token_losses(model, shuffled, disable_tqdm=True), shuffled.loss_offsets[1:-1])
    for place, index in enumerate(order):
        np.testing.assert_allclose(again[place], losses[index], rtol=1e-5, atol=1e-6)


def test_bfloat16_losses_are_close_to_one_row_losses():
    """A bound for this small model. A wrong mask gives 0.3; the README has figures of a real model."""
    model, rows = tiny_llama(), encode_rows(rows_with_common_prefixes())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.bfloat16()
    one_row = token_losses(model, rows, batch_tokens=1, reuse_prefixes=False, disable_tqdm=True)
    shared = token_losses(model, rows, batch_tokens=4096, disable_tqdm=True)
    starts = rows.loss_offsets[:-1]
    difference = np.add.reduceat(shared - one_row, starts) / np.diff(rows.loss_offsets)
    assert 0 < np.abs(difference).max() < 0.02


def test_out_of_memory_halves_all_following_batches(monkeypatch, caplog):
    model, rows = tiny_llama(), encode_rows(random_rows(40))
    expected = token_losses(model, rows, disable_tqdm=True)
    forward, sizes = model.forward, []

    def forward_that_fits_fifty_tokens(*args, **kwargs):
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > 50:
            raise torch.OutOfMemoryError("no memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(encoded_rows, "WINDOW", 20)
    emptied = []  # the cache of an Intel GPU
    monkeypatch.setattr("accelerate.utils.memory.is_xpu_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "empty_cache", lambda: emptied.append(len(sizes)))
    monkeypatch.setattr(model, "forward", forward_that_fits_fifty_tokens)
    losses = token_losses(model, rows, batch_tokens=320, reuse_prefixes=False, disable_tqdm=True)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    failed = [size > 50 for size in sizes]
    assert failed == sorted(failed, reverse=True) and sum(failed) >= 2, sizes
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "Scoring 320 tokens at a time does not fit" in warning
    assert f"`ForgetTracker(batch_tokens={320 // 2 ** sum(failed)})`" in warning
    assert emptied == list(range(1, sum(failed) + 1))


def test_a_row_that_is_not_a_number_does_not_spread_to_its_pack():
    """Rows of a pack attend to each other with weight 0, and 0 times NaN is NaN."""
    model, rows = tiny_llama(), rows_with_common_prefixes()
    assert reuses_prefixes(model, rows)
    only_once = next(token for token in rows[0]["input_ids"] if sum(token in row["input_ids"] for row in rows) == 1)
    with torch.no_grad():
        model.model.embed_tokens.weight[only_once] = float("nan")
    expected = reference_losses(model, rows)
    assert 0 < np.isnan(expected).sum() < len(rows[0]["input_ids"])
    losses = token_losses(model, encode_rows(rows), batch_tokens=64, disable_tqdm=True)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)


def test_tokens_beyond_the_vocabulary_are_refused():
    rows = encode_rows([{"input_ids": [1, 2, 99_999]}], disable_tqdm=True)
    with pytest.raises(EncodingError, match="range from 1 to 99999, but the model's vocabulary has 128 tokens"):
        token_losses(tiny_llama(), rows, disable_tqdm=True)


def test_tokens_added_without_resizing_the_embeddings_are_refused(byte_tokenizer):
    tokenizer, model = copy.deepcopy(byte_tokenizer), tiny_llama(vocab_size=len(byte_tokenizer))
    tokenizer.add_tokens(["<new>"])
    rows = encode_rows([{"text": "the cat <new>"}], tokenizer, disable_tqdm=True)
    with pytest.raises(EncodingError, match="the model's embeddings were not resized"):
        token_losses(model, rows, disable_tqdm=True)
    model.resize_token_embeddings(len(tokenizer))
    assert np.isfinite(token_losses(model, rows, disable_tqdm=True)).all()
