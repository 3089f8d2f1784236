"""Encode the tracked rows and the training rows of a session as its trainer does."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments

from ..data.as_rows import as_rows, each_row
from ..data.encode_collated import encode_collated, model_inputs
from ..data.encode_text import encode_rows
from ..data.encoded_dataset import EncodedDataset
from ..data.encoded_rows import EncodedRows
from ..data.tokenizers import context_length
from ..errors import EncodingError, RandomRowsError, UnsupportedDatasetError, UnsupportedInputError
from .sessions import SessionArgument


if TYPE_CHECKING:
    from trl import SFTConfig

logger = get_logger(__name__)

# Columns that SFTTrainer reads of a tokenized row.
_SFT_COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks")


def encode_noisy_rows(
    noisy: Any,
    session: SessionArgument,
    args: TrainingArguments,
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    train_dataloader: torch.utils.data.DataLoader,
    max_length: int | None,
) -> EncodedRows:
    """Encode the rows to track: `noisy`, or the training set if `noisy` is `None`."""
    if noisy is None:
        return encode_training_rows(args, model, train_dataloader, max_length)
    noisy = as_rows(noisy, "`noisy`")
    disable_tqdm = hide_progress(args)
    is_stream = isinstance(noisy, torch.utils.data.IterableDataset)  # refused by `encode_rows`
    is_tokenized = not is_stream and "input_ids" in noisy[0]
    if is_tokenized:
        noisy = _columns_that_are_read(noisy, args, model)
    # SFTTrainer reads the labels of tokenized rows. Elsewhere, the collator decides which tokens contribute to the loss, and
    # it may tokenize the rows itself. So try this trainer's collator first.
    if not is_stream and not (is_tokenized and is_sft_config(args)):
        try:
            _, collate_fn = rows_and_collator(train_dataloader)
            return encode_collated(noisy, collate_fn, model, max_length, disable_tqdm)
        except (UnsupportedInputError, RandomRowsError):
            raise
        except UnsupportedDatasetError:
            pass  # this trainer has no collator, it does not tokenize, or it cannot collate a single row
        except EncodingError:
            # The collator of a safety session may be another one than that of the noisy session.
            if session != "safety" or (is_tokenized and "labels" not in noisy[0]):
                raise
    return encode_rows(
        noisy, processing_class, max_length, disable_tqdm, **sft_encoding_options(args, processing_class)
    )


def _columns_that_are_read(noisy: Any, args: TrainingArguments, model: PreTrainedModel) -> Any:
    """Remove the columns of tokenized rows that this trainer removes, such as ids and audit columns."""
    if is_sft_config(args):
        names: Collection[str] = _SFT_COLUMNS
    elif args.remove_unused_columns:
        names = {*model_inputs(model), *_SFT_COLUMNS, *(args.label_names or [])}
    else:
        return noisy
    if isinstance(noisy, Dataset) and "input_ids" in noisy.column_names:  # false if a transform creates it
        return noisy.select_columns([name for name in noisy.column_names if name in names])
    return [{name: value for name, value in row.items() if name in names} for row in each_row(noisy)]


def encode_training_rows(
    args: TrainingArguments,
    model: PreTrainedModel,
    train_dataloader: torch.utils.data.DataLoader,
    max_length: int | None,
) -> EncodedRows:
    """Encode the rows a session trains on.

    Raises:
        UnsupportedDatasetError: if the training set is packed or streamed, if the model is given inputs that are not
            scored, or if the data loader has no dataset and collator.
        RandomRowsError: if a row changes each time it is read.
        EncodingError: if a row is not a sample of causal language modeling.
    """
    if is_sft_config(args) and args.packing:
        raise UnsupportedDatasetError(
            "The training set is packed (`packing=True`), so its rows are not single samples. Set `packing=False`, or "
            "name the rows to track: `ForgetTracker(noisy)` for a packed safety session, `ForgetTracker(noisy, "
            "session='noisy')` for a packed noisy session."
        )
    dataset, collate_fn = rows_and_collator(train_dataloader)
    known = dataset.rows if isinstance(dataset, EncodedDataset) else None
    keep_end = truncates_on_the_left(args)
    rows = encode_collated(dataset, collate_fn, model, max_length, hide_progress(args), keep_end, known)
    return rows if known is None else rows.sharing_memory(known)


def encode_training_rows_if_possible(
    session: SessionArgument,
    args: TrainingArguments,
    model: PreTrainedModel,
    train_dataloader: torch.utils.data.DataLoader,
    max_length: int | None,
) -> EncodedRows | None:
    """Encode the rows a session trains on, or return `None` if they cannot be followed. They tell the session, and which of
    the tracked rows are among them.

    Raises:
        RandomRowsError: if a row changes each time it is read, unless the user says that this is the safety session.
    """
    try:
        if session == "safety":
            return _encode_stored_rows(args, model, train_dataloader, max_length)
        return encode_training_rows(args, model, train_dataloader, max_length)
    except RandomRowsError:
        raise
    except EncodingError as error:
        if session == "auto":
            logger.warning(f"The rows of this run cannot be followed, so it is treated as safety finetuning. ({error})")
    return None


def _encode_stored_rows(
    args: TrainingArguments,
    model: PreTrainedModel,
    train_dataloader: torch.utils.data.DataLoader,
    max_length: int | None,
) -> EncodedRows | None:
    """Encode rows that are stored with their labels, or return `None` for others.

    Code of the user (a dataset, a transform or a collator) is not called: it may be random, and reading a row would change
    the random numbers that training draws.
    """
    dataset, _ = rows_and_collator(train_dataloader)
    if isinstance(dataset, EncodedDataset):
        return dataset.rows
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom" or "labels" not in dataset.column_names:
        return None
    if is_sft_config(args) and args.packing:
        return None
    stored = _columns_that_are_read(dataset.with_format(None), args, model)
    return encode_rows(stored, None, max_length, hide_progress(args), **sft_encoding_options(args, None))


def rows_and_collator(train_dataloader: torch.utils.data.DataLoader) -> tuple[Any, Callable[[list[Any]], Any]]:
    """The dataset and the collator of a trainer's data loader.

    Raises:
        UnsupportedDatasetError: if it has none: `get_train_dataloader` of a trainer may return any iterable of batches.
    """
    try:
        return train_dataloader.dataset, train_dataloader.collate_fn
    except AttributeError as error:
        raise UnsupportedDatasetError(
            f"The data loader of this trainer ({type(train_dataloader).__name__}) has no dataset and no collator, so its "
            "rows are not known. Return a `torch.utils.data.DataLoader` from `get_train_dataloader`. A tracker can also be "
            "given its rows: `ForgetTracker(noisy)` for a safety session, and `ForgetTracker(noisy, session='noisy')` for a "
            "noisy session."
        ) from error


def sft_encoding_options(
    args: TrainingArguments, processing_class: PreTrainedTokenizerBase | ProcessorMixin | None
) -> dict[str, Any]:
    """Arguments of [`encode_rows`] that encode rows as this trainer does. They are stored in the trace."""
    if not is_sft_config(args):
        return {}
    # The tokenizer that is loaded later may have another template or none, such as the one inside a processor.
    given = None if processing_class is None else processing_class.chat_template
    chat_template = given if isinstance(given, str) else None
    if args.assistant_only_loss and processing_class is not None:
        chat_template = _training_chat_template(processing_class) or chat_template
    return {
        "text_column": args.dataset_text_field,
        "completion_only_loss": args.completion_only_loss,
        "assistant_only_loss": args.assistant_only_loss,
        "keep_end": args.truncation_mode == "keep_end",
        "chat_template": chat_template,
        "eos_token": args.eos_token,
    }


def scoring_max_length(
    model: PreTrainedModel, args: TrainingArguments, max_length: int | None, trace_max_length: int | None = None
) -> int | None:
    """Number of tokens of a row that are scored: `max_length` or the model's context, and at most SFTTrainer's limit and the
    trace's.
    """
    lengths = [max_length if max_length is not None else context_length(model.config), trace_max_length]
    if is_sft_config(args):
        lengths.append(args.max_length)
    return min((length for length in lengths if length is not None), default=None)


def hide_progress(args: TrainingArguments) -> bool:
    """Whether this process shows no progress bars."""
    return args.disable_tqdm or args.process_index > 0


def is_sft_config(args: TrainingArguments) -> TypeGuard[SFTConfig]:
    """Whether the arguments belong to TRL's SFTTrainer, which encodes rows itself."""
    return "completion_only_loss" in vars(args)


def truncates_on_the_left(args: TrainingArguments) -> bool:
    """Whether this trainer keeps the end of long rows."""
    return is_sft_config(args) and args.truncation_mode == "keep_end"


def _training_chat_template(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> str | None:
    """The template that SFTTrainer uses if the tokenizer's own does not mark the assistant's tokens."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers  # trl provided the SFTConfig

    if has_generation_markers(cast(str, processing_class.chat_template)):  # SFTTrainer has checked that there is one
        return None
    return get_training_chat_template(processing_class)
