"""Encode the rows of a training set through the trainer's own data collator."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig

from ..errors import EncodingError, RandomRowsError, UnsupportedDatasetError
from ..utils.parallelism import unwrapped
from .as_rows import as_rows
from .encode_each import encode_each
from .encoded_rows import IGNORE_INDEX, EncodedRows
from .token_sample import TOKEN_TYPES, Sample, other_inputs_error, sample_of_inputs


_SCORED_INPUTS = {"input_ids", "labels", "attention_mask", "position_ids"}
# Collators return these too. They say where a row ends, or what the labels say already. `Trainer` keeps the columns `label`
# and `label_ids` (the classes of a dataset for classification), which causal language models do not read.
_HARMLESS_INPUTS = {
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "seq_lengths", "length",
    "completion_mask", "assistant_masks", "special_tokens_mask", "num_items_in_batch",
    "label", "label_ids",
}  # fmt: skip
# This many rows are read and collated twice, to detect a dataset or a collator that is not deterministic.
_ROWS_READ_TWICE = 16


def encode_collated(
    dataset: Any,
    collate_fn: Callable[[list[Any]], Mapping[str, torch.Tensor]],
    model: nn.Module,
    max_length: int | None = None,
    disable_tqdm: bool = False,
    keep_end: bool = False,
    known: EncodedRows | None = None,
) -> EncodedRows:
    """Encode the rows of a training set through its own collator, one row at a time.

    Args:
        dataset (a map-style dataset):
            The rows as `train_dataloader.dataset` holds them, without id and audit columns.
        collate_fn (`Callable`):
            The collator of the data loader. It must return `input_ids` and `labels`.
        model (`nn.Module`):
            The model that is trained. Some inputs matter for some models only.
        max_length (`int`, *optional*):
            Rows with more tokens are truncated. By default, no row is truncated.
        disable_tqdm (`bool`, defaults to `False`):
            Whether to hide the progress bar.
        keep_end (`bool`, defaults to `False`):
            Whether to truncate on the left instead of the right.
        known ([`EncodedRows`], *optional*):
            Rows in memory that are probably the same. If they are, the result shares their arrays.

    Returns:
        [`EncodedRows`]: one sample per row, in the order of `dataset`.

    Raises:
        UnsupportedDatasetError: if the dataset is streamed or packed, or if the collator returns no labels for a single
            row.
        UnsupportedInputError: if the model is given inputs that are not scored, or a mask or positions that are not
            those of one run of tokens.
        RandomRowsError: if a row changes each time it is read.
        EncodingError: if the dataset is empty, or if a row is not a causal language modeling sample.
        ValueError: if `max_length` is not an integer of at least 2.
    """
    dataset = as_rows(dataset, "The training set")
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise UnsupportedDatasetError(
            "An IterableDataset has no fixed rows, so the loss of a row cannot be tracked. Load it as a map-style "
            "dataset (`datasets.load_dataset(..., streaming=False)`), or pass the rows to track: "
            "`ForgetTracker(noisy)`."
        )

    def encode_one(index: int) -> Sample:
        batch = collate_one(index)
        if index < _ROWS_READ_TWICE:
            # Cloned, because the dataset or the collator may reuse the same memory for the second batch.
            first = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
            batch = collate_one(index)
            if not _equal(first, batch):
                raise RandomRowsError(
                    "the dataset or the collator returns a different batch each time it reads the same row (random "
                    "masks, prompts or augmentation). Such a row has no fixed loss, and reading it for a record would "
                    "change the random numbers that training draws. Use a deterministic dataset and collator. Only a safety "
                    "session may be random: `ForgetTracker(trace_dir=..., session='safety')` does not read it."
                )
        return sample_of_batch(batch, model)

    def collate_one(index: int) -> Mapping[str, torch.Tensor]:
        # A list returns the user's own row, and a collator may change it. A `Dataset` creates each row when it is read.
        row = dataset[index] if isinstance(dataset, Dataset) else copy.deepcopy(dataset[index])
        try:
            batch = collate_fn([row])
        except Exception as error:  # the user's code, which may assert that there are several rows
            advice = "Use a collator that accepts a list of one row."
            if isinstance(row, Mapping):
                advice += f" If it cannot collate one of the columns ({', '.join(map(str, row))}), remove that column."
            raise UnsupportedDatasetError(
                f"the collator cannot collate a single row ({type(error).__name__}: {error}). {advice}"
            ) from error
        if not isinstance(batch, Mapping):
            raise UnsupportedDatasetError(
                f"the collator returns {type(batch).__name__}. It must return a mapping with `input_ids` and `labels`."
            )
        return batch

    return encode_each(range(len(dataset)), encode_one, len(dataset), max_length, disable_tqdm, keep_end, known)


def sample_of_batch(batch: Mapping[str, Any], model: nn.Module | None = None) -> Sample:
    """Return the sample of a batch of one row. Without a model, its other inputs are not checked."""
    if "input_ids" not in batch or "labels" not in batch:
        raise UnsupportedDatasetError(
            f"the collator returns {sorted(batch)}, but `input_ids` and `labels` are required. Use a collator that "
            "makes labels, such as `DataCollatorForLanguageModeling(tokenizer, mlm=False)`."
        )
    input_ids, labels = batch["input_ids"], batch["labels"]
    if input_ids.ndim != 2 or labels.shape != input_ids.shape:
        raise EncodingError(
            f"`input_ids` has shape {tuple(input_ids.shape)} and `labels` has shape {tuple(labels.shape)}. Both must "
            "be 2D and have the same shape, with one label per token. ForgetFilter supports causal language modeling "
            "only."
        )
    others = _other_inputs(batch, model) if model is not None else []
    if others:
        raise other_inputs_error(others)
    inputs = {name: batch[name].squeeze(0).numpy() for name in _SCORED_INPUTS if batch.get(name) is not None}
    if len(input_ids) == 1 and "attention_mask" not in inputs:
        inputs = _without_padding(inputs)
    if len(input_ids) != 1 or _is_packed(batch, inputs):
        raise UnsupportedDatasetError(
            "one row of the training set holds several samples (packing), so their losses cannot be told apart. Pass the "
            "noisy rows to a tracker: `ForgetTracker(noisy)` for a packed safety session, and `ForgetTracker(noisy, "
            "session='noisy')` for a packed noisy session. To remove rows before packing, use `FilteredSFTTrainer`. "
            "Otherwise, disable packing."
        )
    return sample_of_inputs(**inputs)


def model_inputs(model: nn.Module) -> Collection[str]:
    """Return the names of the inputs of a model. `Trainer` removes the columns of a dataset that are not among them."""
    model = unwrapped(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return inspect.signature(type(base).forward).parameters.keys()


def _other_inputs(batch: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Return the names of the inputs that are not scored although the model may read them."""
    names = {name for name, value in batch.items() if value is not None} - _SCORED_INPUTS - _HARMLESS_INPUTS
    config = cast(PreTrainedConfig, model.config)
    for name in names & set(TOKEN_TYPES):
        # Zeros mean text in multimodal models. GPT-2 adds the embedding of token 0 instead.
        is_text = config.get_text_config() is not config and not batch[name].any()
        if is_text or name not in model_inputs(model):
            names.remove(name)
    return sorted(names)


def _without_padding(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Remove the padding of a row without attention mask: trailing zeros of its positions (`pad_to_multiple_of`)."""
    positions, labels = inputs.get("position_ids"), inputs["labels"]
    if positions is None or positions.shape != labels.shape:
        return inputs
    length = max(1, len(np.trim_zeros((positions != 0) | (labels != IGNORE_INDEX), "b")))
    return {name: values[:length] for name, values in inputs.items()}


def _is_packed(batch: Mapping[str, Any], inputs: dict[str, np.ndarray]) -> bool:
    """Return whether a row holds several samples. Each starts at position 0."""
    positions, attended = inputs.get("position_ids"), inputs.get("attention_mask", np.ones_like(inputs["input_ids"]))
    if positions is not None:
        return positions.shape == attended.shape and int((positions[attended != 0] == 0).sum()) > 1
    if batch.get("seq_idx") is not None:
        return len(batch["seq_idx"].unique()) > 1
    return batch.get("cu_seq_lens_q") is not None and len(batch["cu_seq_lens_q"]) > 2


def _equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    tensors = [name for name, value in first.items() if isinstance(value, torch.Tensor)]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in tensors)
