"""Which rows a session trains on, and which are followed: encoded from what the trainer has, as it takes them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..data.collated_rows import encode_collated
from ..data.encoded_rows import EncodedRows
from ..data.text_rows import encode_rows
from ..data.tokenizers import context_length
from ..errors import UnsupportedDatasetError
from .recorder import hide_progress


# Columns of a pre-tokenised row that a collator reads; the others are ids and audit columns.
_MODEL_COLUMNS = ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks")


def encode_noisy_rows(
    noisy: Any,
    args: TrainingArguments,
    processing_class: PreTrainedTokenizerBase | None,
    train_dataloader: torch.utils.data.DataLoader,
    max_length: int | None,
) -> EncodedRows:
    """The rows to follow: `noisy`, or the training set where that is `None`."""
    if noisy is None:
        return encode_training_rows(args, train_dataloader, max_length)
    disable_tqdm = hide_progress(args)
    streamed = isinstance(noisy, torch.utils.data.IterableDataset)  # which `encode_rows` refuses
    if not streamed and not _is_of_trl(args) and len(noisy) and "input_ids" in noisy[0]:
        if isinstance(noisy, Dataset) and "input_ids" in noisy.column_names:  # not where a transform makes them
            columns: Any = noisy.select_columns([name for name in _MODEL_COLUMNS if name in noisy.column_names])
        else:
            columns = [{name: row[name] for name in _MODEL_COLUMNS if name in row} for row in noisy]
        # Which tokens count is the collator's business, so the one of this trainer is asked, if it knows such rows.
        with suppress(UnsupportedDatasetError):
            return encode_collated(columns, train_dataloader.collate_fn, max_length, disable_tqdm)
    return encode_rows(
        noisy, processing_class, max_length, disable_tqdm, **sft_encoding_options(args, processing_class)
    )


def encode_training_rows(
    args: TrainingArguments, train_dataloader: torch.utils.data.DataLoader, max_length: int | None
) -> EncodedRows:
    """The rows that a session trains on.

    Raises:
        EncodingError: where they cannot be told apart, or are no causal-language-modelling samples.
    """
    if args.to_dict().get("packing", False):  # TRL's SFTConfig
        raise UnsupportedDatasetError(
            "The training set is packed (`packing=True`), so a loader row is not one sample. A safety session may be, if "
            "the noisy rows are named, `ForgetTracker(noisy)`; where the noisy set is learnt, set `packing=False`."
        )
    return encode_collated(train_dataloader.dataset, train_dataloader.collate_fn, max_length, hide_progress(args))


def sft_encoding_options(args: TrainingArguments, processing_class: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """What [`encode_rows`] must be told to read rows as this trainer does. The trace keeps it."""
    if not _is_of_trl(args):
        return {}
    settings = args.to_dict()
    return {
        "text_column": settings["dataset_text_field"],
        "completion_only_loss": settings["completion_only_loss"],
        "assistant_only_loss": settings["assistant_only_loss"],
        "keep_end": settings["truncation_mode"] == "keep_end",
        "chat_template": (
            _training_chat_template(processing_class)
            if settings["assistant_only_loss"] and processing_class is not None
            else None
        ),
    }


def _is_of_trl(args: TrainingArguments) -> bool:
    """Whether they are SFTTrainer's: it encodes rows itself."""
    return "completion_only_loss" in args.to_dict()


def scoring_max_length(model: PreTrainedModel, args: TrainingArguments, max_length: int | None) -> int | None:
    """How many tokens of a row are scored: `max_length`, or as many as the model has places for; no more than SFTTrainer
    trains on."""
    lengths = [max_length if max_length is not None else context_length(model.config)]
    lengths += [args.to_dict()["max_length"]] if _is_of_trl(args) else []
    return min((length for length in lengths if length is not None), default=None)


def count_overlap(rows: EncodedRows, others: EncodedRows) -> int:
    """How many of `rows` are among the `others`, with the same tokens counted."""
    return pc.is_in(rows.ids, value_set=others.ids).true_count


def count_same_tokens(rows: EncodedRows, others: EncodedRows) -> int:
    """How many of `rows` have the tokens of one of the `others`, whichever of them count."""

    def hashes(some: EncodedRows) -> np.ndarray:
        return np.fromiter((hash(some.sample(index)[0].tobytes()) for index in range(len(some))), np.int64, len(some))

    return int(np.isin(hashes(rows), hashes(others)).sum())


def _training_chat_template(processing_class: PreTrainedTokenizerBase) -> str | None:
    """SFTTrainer's choice where only the assistant's tokens count: another template if the own one does not mark them."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers  # there is an SFTConfig

    if has_generation_markers(processing_class.chat_template):
        return None
    return get_training_chat_template(processing_class)
