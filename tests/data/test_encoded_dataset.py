"""Encoded rows as a dataset to train on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import sample_ids, tiny_llama
from transformers import Trainer

from forgetfilter_callback.data.encoded_dataset import EncodedDataset
from forgetfilter_callback.data.encoded_rows import EncodedRows


def rows_of(lengths: list[int], padded: bool = False) -> EncodedRows:
    """Random rows. With `padded`, any token may be padding, whether it counts or not."""
    rng, total = np.random.default_rng(0), sum(lengths)
    attention_mask = rng.random(total) < 0.7 if padded else np.ones(total, bool)
    tokens = rng.integers(5, 90, total, dtype=np.int32)
    offsets, loss_mask = np.cumsum([0, *lengths]), rng.random(total) < 0.5
    loss_mask[offsets[:-1][np.diff(offsets) > 0]] = False
    return EncodedRows(sample_ids(len(lengths)), tokens, loss_mask, attention_mask, offsets)


@pytest.mark.parametrize("padded", [False, True])
def test_it_has_the_rows_of_the_dataset_with_columns(padded):
    rows = rows_of([5, 0, 4, 12, 1, 3, 0], padded)
    dataset, expected = EncodedDataset(rows), rows.as_dataset().to_list()
    assert list(dataset) == expected and len(dataset) == len(expected)
    assert dataset[-1] == expected[-1] and dataset[-4] == expected[-4]
    for index in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            dataset[index]


def test_a_trainer_learns_the_same_from_it(make_args, collator, tokenizer):
    rows = rows_of([5, 8, 4, 12, 7, 3, 9, 6])
    models = []
    for dataset in (rows.as_dataset(), EncodedDataset(rows)):
        args = make_args(train_sampling_strategy="group_by_length")
        model = tiny_llama()
        Trainer(model, args, train_dataset=dataset, data_collator=collator, processing_class=tokenizer).train()
        models.append(model)
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)
