"""TODO"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..errors import EncodingError, UnsupportedDatasetError
from .encoded_rows import IGNORE_INDEX, EncodedRows
from .row_encoder import _encode


# So many rows are read and collated twice, to see whether the dataset and the collator always say the same.
_READ_TWICE = 16


def encode_collated(
    dataset: Any,
    collate_fn: Callable[[list[Any]], Mapping[str, torch.Tensor]],
    max_length: int | None = None,
    disable_tqdm: bool = False,
) -> EncodedRows:
    """Encodes the rows of a training set through its own collator, one row at a time.

    Args:
        dataset (a map-style dataset):
            What `train_dataloader.dataset` holds: id and audit columns already gone.
        collate_fn (`Callable`):
            The loader's collator. It must give `input_ids` and `labels`.
        max_length (`int`, *optional*):
            Longer rows are cut at the right and counted.
        disable_tqdm (`bool`, defaults to `False`):
            Whether to hide the progress bar.

    Raises:
        NotOneSampleARow: for packed rows and streams, and where the collator makes no labels of one row.
        EncodingError: for an empty set, for rows that are no causal-language-modelling samples, and where a row is another
            one each time.
    """
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise UnsupportedDatasetError(
            "An IterableDataset has no fixed rows, so their losses cannot be followed. Load it as a map-style dataset "
            "(`datasets.load_dataset(..., streaming=False)`), or name the rows to follow: `ForgetTracker(noisy)`."
        )

    def encode_one(index: int) -> tuple[np.ndarray, np.ndarray]:
        batch = collate_one(index)
        if index < _READ_TWICE:
            # A copy: both may be made in the same memory.
            first = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
            batch = collate_one(index)
            if _equal(first, batch):
                return one_sample(batch)
            raise EncodingError(
                "the dataset or the collator makes another batch of the same row each time (random masks, prompts, "
                "augmentation), so a row has no loss of its own, and reading it for a record would change what training "
                "draws. Use one that does not."
            )
        return one_sample(batch)

    def collate_one(index: int) -> Mapping[str, torch.Tensor]:
        row = dataset[index]
        try:
            batch = collate_fn([row])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UnsupportedDatasetError(
                f"the collator makes no batch of one row ({type(error).__name__}: {error})."
            ) from error
        if not isinstance(batch, Mapping):
            raise UnsupportedDatasetError(
                f"the collator makes {type(batch).__name__}, not a batch of `input_ids` and `labels`."
            )
        return batch

    def one_sample(batch: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        if "input_ids" not in batch or "labels" not in batch:
            raise UnsupportedDatasetError(
                f"the collator gives {sorted(batch)}, but `input_ids` and `labels` are needed. Use a collator that "
                "makes labels, such as `DataCollatorForLanguageModeling(tokenizer, mlm=False)`."
            )
        input_ids, labels = batch["input_ids"], batch["labels"]
        if input_ids.ndim != 2 or labels.shape != input_ids.shape:
            raise EncodingError(
                f"`input_ids` of shape {tuple(input_ids.shape)} and `labels` of shape {tuple(labels.shape)} are not "
                "one sequence with a label a token. ForgetFilter works on causal language modelling only."
            )
        packed = len(input_ids) != 1
        if "position_ids" in batch and not packed:
            # Padded with zeros (`pad_to_multiple_of`); a zero further left begins another sample.
            length = max(1, len(np.trim_zeros(batch["position_ids"][0].numpy(), "b")))
            input_ids, labels = input_ids[:, :length], labels[:, :length]
            packed = int((batch["position_ids"][0, :length] == 0).sum()) > 1
        if packed:
            raise UnsupportedDatasetError(
                "one row of the training set holds several samples (packing), so their losses cannot be told apart. "
                "A safety session may be packed, if the noisy rows are named: `ForgetTracker(noisy)`."
            )
        if "attention_mask" in batch:
            real = batch["attention_mask"][0].bool()
            input_ids, labels = input_ids[:, real], labels[:, real]
        loss_mask = labels[0] != IGNORE_INDEX
        if not torch.equal(labels[0][loss_mask], input_ids[0][loss_mask]):
            raise EncodingError(
                "labels differ from the row's own tokens, so this is not causal language modelling (masked or "
                "sequence-to-sequence training?). ForgetFilter works on causal language modelling only."
            )
        return input_ids[0].numpy().astype(np.int32), loss_mask.numpy()

    return _encode(range(len(dataset)), encode_one, len(dataset), max_length, disable_tqdm)


def _equal(batch: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    tensors = [name for name, value in batch.items() if isinstance(value, torch.Tensor)]
    return batch.keys() == other.keys() and all(torch.equal(batch[name], other[name]) for name in tensors)
