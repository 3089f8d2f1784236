"""Encoded rows read in windows."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from helpers import rows_with_common_prefixes, sample_ids, tiny_llama
from transformers import DataCollatorForSeq2Seq

from forgetfilter_callback import encode_rows
from forgetfilter_callback.data import encode_each, encoded_rows
from forgetfilter_callback.data.encoded_rows import EncodedRows
from forgetfilter_callback.scoring.token_losses import token_losses


def rows_of(lengths: list[int], padded: bool) -> EncodedRows:
    """Random rows. With `padded`, any token may be padding, whether it counts or not."""
    rng, total = np.random.default_rng(0), sum(lengths)
    attention_mask = rng.random(total) < 0.7 if padded else np.ones(total, bool)
    tokens = rng.integers(0, 90, total, dtype=np.int32)
    offsets, loss_mask = np.cumsum([0, *lengths]), rng.random(total) < 0.5
    loss_mask[offsets[:-1][np.diff(offsets) > 0]] = False
    return EncodedRows(sample_ids(len(lengths)), tokens, loss_mask, attention_mask, offsets)


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


@pytest.mark.parametrize("padded", [False, True])
def test_the_dataset_to_train_on(padded, monkeypatch, chat_tokenizer):
    """Against one row at a time. It is built from windows; the last window has no token."""
    rows = rows_of([5, 0, 4, 12, 0, 3, 1, 6, 10, 2, 0, 0], padded)
    expected = []
    for index in range(len(rows)):
        tokens, loss_mask = rows.sample(index)
        attention_mask = rows.attention_mask[rows.offsets[index] : rows.offsets[index + 1]]
        labels = [int(token) if counts else -100 for token, counts in zip(tokens, loss_mask, strict=True)]
        if len(tokens) and not attention_mask[0]:
            labels[0] = int(tokens[0])
        row = {"input_ids": tokens.tolist(), "labels": labels}
        expected.append({**row, "attention_mask": [int(mask) for mask in attention_mask]} if padded else row)
    monkeypatch.setattr(encoded_rows, "WINDOW_TOKENS", 10)
    assert len(list(rows.windows())) > 4
    dataset = rows.as_dataset()
    assert list(dataset) == expected
    from_lists = Dataset.from_list(expected)
    assert dataset.features == from_lists.features
    assert rows.select([3, 0]).as_dataset()[:] == dataset[[3, 0]] == from_lists[[3, 0]]
    collate = DataCollatorForSeq2Seq(chat_tokenizer)
    batch, expected_batch = collate([dataset[0], dataset[3]]), collate([from_lists[0], from_lists[3]])
    assert set(batch) == set(expected_batch)
    for name, tensor in expected_batch.items():
        assert batch[name].dtype == torch.int64 and torch.equal(batch[name], tensor)


def test_the_dataset_of_rows_without_tokens():
    integers = Features({"input_ids": List(Value("int32")), "labels": List(Value("int64"))})
    for count in (0, 2):
        dataset = rows_of([0] * count, padded=False).as_dataset()
        assert dataset.features == integers
        assert list(dataset) == [{"input_ids": [], "labels": []}] * count


def test_loss_offsets_are_computed_in_windows(monkeypatch):
    rows = rows_of([0, 900, 0, 1, *[500] * 100, 0], padded=False)
    monkeypatch.setattr(encoded_rows, "WINDOW_TOKENS", 2000)
    tracemalloc.start()
    loss_offsets = rows.loss_offsets
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = [0]
    for index in range(len(rows)):
        expected.append(expected[-1] + int(rows.sample(index)[1].sum()))
    assert loss_offsets.tolist() == expected
    assert peak < len(rows.tokens)


def test_the_dataset_takes_few_bytes_per_token():
    rows = rows_of([500] * 400, padded=True)
    rows.select([0]).as_dataset()  # imports
    tracemalloc.start()
    dataset = rows.as_dataset()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(dataset) == 400 and peak < 12 * len(rows.tokens)


def test_rows_with_equal_ids_share_memory():
    tokens = np.random.default_rng(0).integers(5, 100, (6, 9)).tolist()
    rows, again = (encode_rows([{"input_ids": row} for row in tokens], max_length=8) for _ in range(2))
    shared = again.sharing_memory(rows)
    assert shared.tokens is rows.tokens and shared.loss_mask is rows.loss_mask and shared.ids is rows.ids
    assert shared.truncated == 6
    other_order = again.select([1, 0, 2, 3, 4, 5])
    assert other_order.sharing_memory(rows) is other_order


def test_an_attention_mask_is_stored_for_padded_rows_only():
    rows = [{"input_ids": [7, 8, 9]}, {"input_ids": [7, 8]}, {"input_ids": [7, 7, 8, 9]}, {"input_ids": [8, 9]}]
    assert encode_rows(rows).attention_mask.strides == (0,)
    padded = {"input_ids": [7, 8, 1], "labels": [7, 8, 1], "attention_mask": [1, 1, 0]}
    mask = encode_rows([*rows[:2], padded, rows[2], padded, rows[3]]).attention_mask
    assert mask.astype(int).tolist() == [1] * 5 + [1, 1, 0] + [1] * 4 + [1, 1, 0] + [1] * 2
