"""Rows → token ids and which of them count; stable sample ids and a dataset fingerprint.

There are two ways in, and both give the same [`EncodedRows`]:

- [`encode_collated`] takes the rows a trainer trains on and its own collator, so that exactly the tokens count which
  count in training, whoever made the labels.
- [`encode_rows`] takes rows as people write them (`prompt`/`completion`, `messages`, `text`, `input_ids`), after TRL's
  conventions.

What cannot be one causal-language-modelling sample (packed rows, preferences, images, streams) is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import EncodingError, UnsupportedDatasetError
from .encoded_rows import IGNORE_INDEX, EncodedRows, common_prefix_length
from .row_encoder import _encode


def encode_rows(
    rows: Any,
    processing_class: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    disable_tqdm: bool = False,
    text_column: str = "text",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    keep_end: bool = False,
    chat_template: str | None = None,
) -> EncodedRows:
    """Encodes rows as people write them, after TRL's conventions (SFTTrainer's preparation, one row a sample).

    A row holds one of: `input_ids` (with `labels` or masks, or all tokens count), `prompt` and `completion` (strings or
    lists of messages; the completion counts), `messages` (all tokens count), `text` (all tokens count). Strings get the EOS
    token appended; messages go through the chat template, with the row's `tools` and `chat_template_kwargs`.

    Args:
        rows (`Dataset` or a sequence of dicts):
            The noisy set. Other columns are ignored.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; needed unless the rows hold `input_ids`.
        max_length (`int`, *optional*):
            Longer rows are cut at the right and counted.
        disable_tqdm (`bool`, defaults to `False`):
            Whether to hide the progress bar.
        text_column (`str`, defaults to `"text"`):
            The column of plain text (SFTConfig's `dataset_text_field`).
        completion_only_loss (`bool`, *optional*):
            Whether only the completion counts. By default it does in `prompt`/`completion` rows; the `completion_mask` of
            rows of `input_ids` is heeded only if this is `True`.
        assistant_only_loss (`bool`, defaults to `False`):
            Whether, of messages, only the assistant's tokens count. The chat template must mark them.
        keep_end (`bool`, defaults to `False`):
            Whether longer rows are cut at the left instead.
        chat_template (`str`, *optional*):
            Instead of the tokenizer's own.

    Raises:
        EncodingError: for an empty set, preference rows, images, an unknown form, a missing tokenizer or chat template.
    """

    def encode_one(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(row, Mapping):
            raise EncodingError(f"a row is a dict, this one is {type(row).__name__}.")
        if "input_ids" in row:
            tokens = _token_ids(row["input_ids"])
            labels = (
                np.asarray(row["labels"]) if "labels" in row else _labels_from_masks(tokens, row, completion_only_loss)
            )
            if "attention_mask" in row:
                real = np.asarray(row["attention_mask"], dtype=bool)
                tokens, labels = tokens[real], labels[real]
            if labels.shape != tokens.shape or not np.all((labels == tokens) | (labels == IGNORE_INDEX)):
                raise EncodingError("`labels` must be the row's own `input_ids`, or -100 where a token does not count.")
            return tokens, labels != IGNORE_INDEX
        if "chosen" in row or "rejected" in row:
            raise EncodingError(
                "this is a preference row (`chosen`/`rejected`). Pass the answers you finetune on as "
                "`prompt`/`completion` rows."
            )
        if "image" in row or "images" in row:
            raise EncodingError("this row holds images, which are not supported. Pass text rows.")
        tokenize = _tokenizer(processing_class, row, assistant_only_loss, chat_template)
        if "prompt" in row and "completion" in row:
            prompt, completion = _validated_text(row, "prompt"), _validated_text(row, "completion")
            if isinstance(prompt, str) is not isinstance(completion, str):
                raise EncodingError("`prompt` is text and `completion` messages, or the other way round. Use one form.")
            if isinstance(completion, str):
                completion = _with_eos(completion, processing_class)
            prompt_tokens, _ = tokenize(prompt, add_generation_prompt=True)
            tokens, loss_mask = tokenize(prompt + completion)  # type: ignore[operator] # of one kind
            if completion_only_loss is not False:
                loss_mask[: common_prefix_length(prompt_tokens, tokens)] = False
            return tokens, loss_mask
        if "messages" in row:
            return tokenize(_validated_text(row, "messages"))
        if text_column in row:
            text = _validated_text(row, text_column)
            if not isinstance(text, str):
                raise EncodingError(f"`{text_column}` holds messages. Name the column `messages`.")
            return tokenize(_with_eos(text, processing_class))
        raise EncodingError(
            f"columns {sorted(row)} hold no sample. Use `prompt` and `completion`, `messages`, `text`, or `input_ids`."
        )

    if isinstance(rows, torch.utils.data.IterableDataset):
        raise UnsupportedDatasetError(
            "An IterableDataset has no fixed rows. Pass a map-style dataset or a list of rows."
        )
    if isinstance(rows, str) or not isinstance(rows, Dataset | torch.utils.data.Dataset | Sequence):
        raise EncodingError(f"The noisy set is {type(rows).__name__}, not a dataset or a list of rows.")
    known = cast(Sequence[Any], rows)
    return _encode(known, encode_one, len(known), max_length, disable_tqdm, keep_end)


def _validated_text(row: Mapping[str, Any], column: str) -> str | list[dict[str, Any]]:
    """The text, or the messages, in a column of `row`."""
    value = row[column]
    if isinstance(value, str) and column != "messages":
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise EncodingError(f"`{column}` is no valid text ({error.reason} at {error.start}). Repair it.") from error
        return value
    messages = isinstance(value, list) and bool(value)
    if not messages or not all(isinstance(each, Mapping) and isinstance(each.get("role"), str) for each in value):
        what = "not" if column == "messages" else "neither text nor"
        raise EncodingError(f"`{column}` holds {value!r:.60}, {what} a list of messages with `role` and `content`.")
    return value


def _token_ids(values: Any) -> np.ndarray:
    """Token ids of a row as int32."""
    tokens = np.asarray(values)
    if tokens.ndim != 1 or (len(tokens) and tokens.dtype.kind not in "iu"):
        raise EncodingError(f"`input_ids` is no list of whole numbers ({tokens.dtype} of shape {tokens.shape}).")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < 2**31:
        raise EncodingError(f"`input_ids` run from {tokens.min()} to {tokens.max()}, which are no token ids.")
    return tokens.astype(np.int32)


def _labels_from_masks(tokens: np.ndarray, row: Mapping[str, Any], completion_only_loss: bool | None) -> np.ndarray:
    """Labels of a pre-tokenised row that has TRL's masks, or none."""
    masks = ["completion_mask"] if completion_only_loss and "completion_mask" in row else []
    masks += ["assistant_masks"] if "assistant_masks" in row else []
    loss_mask = np.all([np.asarray(row[mask], dtype=bool) for mask in masks], axis=0)
    return np.where(loss_mask, tokens, IGNORE_INDEX)


def _tokenizer(
    processing_class: PreTrainedTokenizerBase | None,
    row: Mapping[str, Any],
    assistant_only_loss: bool,
    chat_template: str | None,
) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """A function of a text or messages of `row` → token ids and which of them count."""
    if processing_class is None:
        raise EncodingError("text needs a tokenizer. Pass `processing_class=tokenizer` to the trainer.")
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")

    def tokenize(
        text_or_messages: str | list[dict[str, Any]], add_generation_prompt: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(text_or_messages, str):
            tokens = np.asarray(processing_class(text=text_or_messages)["input_ids"], dtype=np.int32)
            return tokens, np.ones(len(tokens), dtype=bool)
        if processing_class.chat_template is None:
            raise EncodingError(
                "messages need a chat template, and this tokenizer has none. Set `tokenizer.chat_template`, or pass "
                "`text` or `prompt`/`completion` strings."
            )
        encoded = processing_class.apply_chat_template(
            text_or_messages,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=assistant_only_loss and not add_generation_prompt,
            tools=tools,
            chat_template=chat_template,
            **(row.get("chat_template_kwargs") or {}),  # datasets fills in `None` where some rows have none
        )
        tokens = np.asarray(encoded["input_ids"], dtype=np.int32)
        if not assistant_only_loss or add_generation_prompt:
            return tokens, np.ones(len(tokens), dtype=bool)
        loss_mask = np.asarray(encoded["assistant_masks"], dtype=bool)
        if not loss_mask.any():
            raise EncodingError(
                "no token of this row is the assistant's (`assistant_only_loss=True`): its chat template marks none. Use "
                "one with `{% generation %}`, such as TRL's `get_training_chat_template(tokenizer)` gives."
            )
        return tokens, loss_mask

    return tokenize


def _with_eos(text: str, processing_class: PreTrainedTokenizerBase | None) -> str:
    eos = processing_class.eos_token if processing_class is not None else None
    return text if eos is None or text.endswith(eos) else text + eos
