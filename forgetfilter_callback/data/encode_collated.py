"""Encode the rows of a training set through the trainer's own data collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..errors import EncodingError, UnsupportedDatasetError
from .as_rows import as_rows
from .encode_each import encode_each
from .encoded_rows import IGNORE_INDEX, EncodedRows


# This many rows are read and collated twice, to detect a dataset or a collator that is not deterministic.
_ROWS_READ_TWICE = 16


def encode_collated(
    dataset: Any,
    collate_fn: Callable[[list[Any]], Mapping[str, torch.Tensor]],
    max_length: int | None = None,
    disable_tqdm: bool = False,
) -> EncodedRows:
    """Encode the rows of a training set through its own collator, one row at a time.

    Args:
        dataset (a map-style dataset):
            The rows as `train_dataloader.dataset` holds them, without id and audit columns.
        collate_fn (`Callable`):
            The collator of the data loader. It must return `input_ids` and `labels`.
        max_length (`int`, *optional*):
            Rows with more tokens are truncated on the right. By default, no row is truncated.
        disable_tqdm (`bool`, defaults to `False`):
            Whether to hide the progress bar.

    Returns:
        [`EncodedRows`]: one sample per row, in the order of `dataset`.

    Raises:
        UnsupportedDatasetError: if the dataset is streamed or packed, or if the collator returns no labels for a single
            row.
        EncodingError: if the dataset is empty, if a row is not a causal language modeling sample, or if a row changes
            each time it is read.
    """
    dataset = as_rows(dataset, "The training set")
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise UnsupportedDatasetError(
            "An IterableDataset has no fixed rows, so the loss of a row cannot be tracked. Load it as a map-style "
            "dataset (`datasets.load_dataset(..., streaming=False)`), or pass the rows to track: "
            "`ForgetTracker(noisy)`."
        )

    def encode_one(index: int) -> tuple[np.ndarray, np.ndarray]:
        batch = collate_one(index)
        if index < _ROWS_READ_TWICE:
            # Cloned, because the dataset or the collator may reuse the same memory for the second batch.
            first = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
            batch = collate_one(index)
            if not _equal(first, batch):
                raise EncodingError(
                    "the dataset or the collator returns a different batch each time it reads the same row (random "
                    "masks, prompts or augmentation). Such a row has no fixed loss, and reading it for a record would "
                    "change the random numbers that training draws. Use a deterministic dataset and collator."
                )
        return sample_of(batch)

    def collate_one(index: int) -> Mapping[str, torch.Tensor]:
        row = dataset[index]
        try:
            batch = collate_fn([row])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UnsupportedDatasetError(
                f"the collator cannot collate a single row ({type(error).__name__}: {error}). Use a collator that "
                "accepts a list of one row."
            ) from error
        if not isinstance(batch, Mapping):
            raise UnsupportedDatasetError(
                f"the collator returns {type(batch).__name__}. It must return a mapping with `input_ids` and `labels`."
            )
        return batch

    def sample_of(batch: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        if "input_ids" not in batch or "labels" not in batch:
            raise UnsupportedDatasetError(
                f"the collator returns {sorted(batch)}, but `input_ids` and `labels` are required. Use a collator that "
                "makes labels, such as `DataCollatorForLanguageModeling(tokenizer, mlm=False)`."
            )
        input_ids, labels = batch["input_ids"], batch["labels"]
        if input_ids.ndim != 2 or labels.shape != input_ids.shape:
            raise EncodingError(
                f"`input_ids` has shape {tuple(input_ids.shape)} and `labels` has shape {tuple(labels.shape)}. Both "
                "must be 2D and have the same shape, with one label per token. ForgetFilter supports causal language "
                "modeling only."
            )
        packed = len(input_ids) != 1
        if "position_ids" in batch and not packed:
            # Trailing zeros are padding (`pad_to_multiple_of`). Any other zero after the first starts another sample.
            length = max(1, len(np.trim_zeros(batch["position_ids"][0].numpy(), "b")))
            input_ids, labels = input_ids[:, :length], labels[:, :length]
            packed = int((batch["position_ids"][0, :length] == 0).sum()) > 1
        if packed:
            raise UnsupportedDatasetError(
                "one row of the training set holds several samples (packing), so their losses cannot be told apart. "
                "Disable packing. Only a safety session may be packed, and only if the noisy rows are passed: "
                "`ForgetTracker(noisy)`."
            )
        if "attention_mask" in batch:
            attended = batch["attention_mask"][0].bool()
            input_ids, labels = input_ids[:, attended], labels[:, attended]
        loss_mask = labels[0] != IGNORE_INDEX
        if not torch.equal(labels[0][loss_mask], input_ids[0][loss_mask]):
            raise EncodingError(
                "the labels differ from the row's own tokens, as in masked or sequence-to-sequence training. "
                "ForgetFilter supports causal language modeling only."
            )
        return input_ids[0].numpy().astype(np.int32), loss_mask.numpy()

    return encode_each(range(len(dataset)), encode_one, len(dataset), max_length, disable_tqdm)


def _equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    tensors = [name for name, value in first.items() if isinstance(value, torch.Tensor)]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in tensors)
