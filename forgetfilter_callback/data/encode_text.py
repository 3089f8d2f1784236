"""Encode rows of text, messages or token ids as TRL's `SFTTrainer` does."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..errors import EncodingError, UnsupportedDatasetError
from .as_rows import as_rows, each_row, with_lists
from .encode_each import encode_each
from .encoded_rows import IGNORE_INDEX, EncodedRows, common_prefix_length
from .messages import (
    Form,
    Message,
    check_messages,
    check_text,
    fit_content,
    forms_of,
    messages_from_sharegpt,
    readable_form,
)
from .token_sample import Sample, plain_sample, refuse_other_inputs, sample_of_inputs
from .tokenizers import unwrap_tokenizer


def encode_rows(
    rows: Any,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    max_length: int | None = None,
    disable_tqdm: bool = False,
    text_column: str = "text",
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    keep_end: bool = False,
    chat_template: str | None = None,
    eos_token: str | None = None,
) -> EncodedRows:
    """Encode rows as TRL's `SFTTrainer` prepares them, one sample per row.

    A row has one of these forms:

    - `input_ids`, with `labels` or TRL's masks. Without either, all tokens but padding contribute to the loss.
    - `prompt` and `completion`, both strings or both lists of messages. Only the completion contributes to the loss.
    - `messages`, a list of messages. All tokens contribute to the loss.
    - `conversations`, a list of messages with `from` and `value` (ShareGPT). The same as `messages` with `role` and
      `content`.
    - `text`, a string. All tokens contribute to the loss.

    The EOS token is appended to `completion` and `text` strings. In rows with both, it is appended to `text` only, as in
    SFTTrainer: their completions are trained without EOS. Messages are formatted with the chat template, which receives the
    `tools` and `chat_template_kwargs` of the row. The content of a message is a string, a list of parts
    (`{"type": "text", "text": "hi"}`), or null beside `tool_calls`. Parts are joined if the template reads strings only.

    Args:
        rows (`Dataset`, `DataFrame` or a sequence of dicts):
            The rows to encode. Columns that are not named above are ignored.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            The tokenizer, or a processor that contains one. It is required unless the rows have `input_ids`.
        max_length (`int`, *optional*):
            Rows with more tokens are truncated. By default, no row is truncated.
        disable_tqdm (`bool`, defaults to `False`):
            Whether to hide the progress bar.
        text_column (`str`, defaults to `"text"`):
            The column with plain text (`dataset_text_field` in `SFTConfig`).
        completion_only_loss (`bool`, *optional*):
            Whether only the completion contributes to the loss. By default this is so for `prompt`/`completion` rows.
            The `completion_mask` of rows with `input_ids` is used only if this is `True`.
        assistant_only_loss (`bool`, defaults to `False`):
            Whether only the assistant's tokens contribute to the loss of messages. The chat template must mark them.
        keep_end (`bool`, defaults to `False`):
            Whether to truncate on the left instead of the right.
        chat_template (`str`, *optional*):
            A chat template that replaces the tokenizer's own.
        eos_token (`str`, *optional*):
            An EOS token that replaces the tokenizer's own, as `eos_token` in `SFTConfig`.

    Returns:
        [`EncodedRows`]: one sample per row, in the order of `rows`.

    Raises:
        UnsupportedDatasetError: if `rows` is an `IterableDataset`.
        EncodingError: if there are no rows, if `rows` is a `DatasetDict`, if a row has an unsupported form (preferences,
            images, content that is not text, or unknown columns), or if a tokenizer or chat template is required and
            missing.
        ValueError: if `max_length` is not an integer of at least 2.
    """
    given = unwrap_tokenizer(processing_class)
    if eos_token is not None and given is not None and given.eos_token != eos_token:
        processing_class = copy.deepcopy(processing_class)  # the given one stays as it is
        cast(PreTrainedTokenizerBase, unwrap_tokenizer(processing_class)).eos_token = eos_token

    @cache
    def form_to_pass(forms: tuple[tuple[str, Form], ...]) -> Form | None:
        if isinstance(processing_class, ProcessorMixin):
            return "parts"  # SFTTrainer passes parts to a processor
        assert processing_class is not None
        return readable_form(processing_class, chat_template, forms)

    def encode_one(row: Mapping[str, Any]) -> Sample:
        if not isinstance(row, Mapping):
            raise EncodingError(
                f"a row must be a dict, but this one is {type(row).__name__}. If the rows are a Dataset with another "
                "format, pass `dataset.with_format(None)`."
            )
        if any(isinstance(value, np.ndarray) and value.dtype == object for value in row.values()):
            row = with_lists(row)
        if "input_ids" in row:
            refuse_other_inputs(row)
            labels = row["labels"] if "labels" in row else _labels_from_masks(row, completion_only_loss)
            return sample_of_inputs(row["input_ids"], labels, row.get("attention_mask"), row.get("position_ids"))
        if "chosen" in row or "rejected" in row:
            raise EncodingError(
                "preference rows (`chosen`/`rejected`) are not supported. Pass the answers that you finetune on as "
                "`prompt`/`completion` rows."
            )
        if "image" in row or "images" in row:
            raise EncodingError("this row has images, which are not supported. Pass rows of text only.")
        tokenize = _tokenizer(processing_class, row, assistant_only_loss, chat_template)
        if "prompt" in row and "completion" in row:
            prompt, completion = _text_or_messages(row, "prompt"), _text_or_messages(row, "completion")
            if isinstance(prompt, str) is not isinstance(completion, str):
                raise EncodingError(
                    "one of `prompt` and `completion` is text and the other is messages. Use the same form for both."
                )
            if isinstance(prompt, list) and isinstance(completion, list):
                form = form_to_pass(forms_of(prompt + completion))
                prompt, completion = fit_content(prompt, form), fit_content(completion, form)
            elif isinstance(completion, str) and not _is_without_eos(row.get(text_column), processing_class):
                completion = _with_eos(completion, processing_class)
            prompt_tokens, _ = tokenize(prompt, add_generation_prompt=True)
            tokens, loss_mask = tokenize(prompt + completion)  # type: ignore[operator] # both have the same type
            if completion_only_loss is not False:
                loss_mask[: common_prefix_length(prompt_tokens, tokens)] = False
            return plain_sample(tokens, loss_mask)
        for column in ("conversations", "messages"):
            if column in row:
                value = messages_from_sharegpt(row[column]) if column == "conversations" else row[column]
                messages = check_messages(value, column)
                return plain_sample(*tokenize(fit_content(messages, form_to_pass(forms_of(messages)))))
        if text_column in row:
            text = row[text_column]
            if isinstance(text, list):
                raise EncodingError(
                    f"`{text_column}` is a list. If it contains messages, rename the column to `messages`."
                )
            if not isinstance(text, str):
                raise EncodingError(f"`{text_column}` must be text, but it is {text!r:.60}.")
            return plain_sample(*tokenize(_with_eos(check_text(text, f"`{text_column}`"), processing_class)))
        raise EncodingError(
            f"columns {sorted(row)} are not a supported form. Use `prompt` and `completion`, `messages`, `conversations`, "
            f"`{text_column}`, or `input_ids`. Convert other columns first. For `question` and `answer`: "
            'rows.map(lambda row: {"prompt": row["question"] + "\\n", "completion": row["answer"]})'
        )

    rows = as_rows(rows, "`rows`")
    if isinstance(rows, torch.utils.data.IterableDataset):
        raise UnsupportedDatasetError(
            "An IterableDataset has no fixed rows, so it is not supported. Pass a map-style dataset or a list of rows."
        )
    encoding = {
        "text_column": text_column,
        "completion_only_loss": completion_only_loss,
        "assistant_only_loss": assistant_only_loss,
        "keep_end": keep_end,
        "chat_template": chat_template,
        "eos_token": eos_token,
    }
    encoded = encode_each(each_row(rows), encode_one, len(rows), max_length, disable_tqdm, keep_end)
    return replace(encoded, encoding=encoding)


def truncate_rows(rows: EncodedRows, max_length: int | None, keep_end: bool = False) -> EncodedRows:
    """Truncate rows that are encoded already. The ids of truncated rows change. Without longer rows, all are unchanged."""
    if max_length is None or np.diff(rows.offsets).max(initial=0) <= max_length:
        return rows
    return encode_rows(rows, max_length=max_length, disable_tqdm=True, keep_end=keep_end)


def _text_or_messages(row: Mapping[str, Any], column: str) -> str | list[Message]:
    """Return the text or the messages in a column of `row`, after checking them."""
    value = row[column]
    return check_text(value, f"`{column}`") if isinstance(value, str) else check_messages(value, column)


def _labels_from_masks(row: Mapping[str, Any], completion_only_loss: bool | None) -> np.ndarray | None:
    """Return the labels of a tokenized row from TRL's masks, or `None` if it has none."""
    masks = ["completion_mask"] if completion_only_loss and "completion_mask" in row else []
    masks += ["assistant_masks"] if "assistant_masks" in row else []
    if not masks:
        return None
    loss_mask = np.all([np.asarray(row[mask], dtype=bool) for mask in masks], axis=0)
    return np.where(loss_mask, row["input_ids"], IGNORE_INDEX)


def _tokenizer(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    row: Mapping[str, Any],
    assistant_only_loss: bool,
    chat_template: str | None,
) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Return a function that tokenizes text or messages of `row` into token ids and a loss mask."""
    if processing_class is None or unwrap_tokenizer(processing_class) is None:
        raise EncodingError(
            "rows of text require a tokenizer, but `processing_class` is "
            f"{'None' if processing_class is None else f'of type {type(processing_class).__name__}'}. Pass a "
            "`PreTrainedTokenizerBase`, such as `AutoTokenizer.from_pretrained(...)`, or a processor that contains one. "
            "Trainers take it as `processing_class=tokenizer`."
        )
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")

    def tokenize(
        text_or_messages: str | list[dict[str, Any]], add_generation_prompt: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(text_or_messages, str):
            # A processor may return a batch of one row.
            tokens = np.asarray(processing_class(text=text_or_messages)["input_ids"], dtype=np.int32).reshape(-1)
            return tokens, np.ones(len(tokens), dtype=bool)
        if chat_template is None and processing_class.chat_template is None:
            raise EncodingError(
                "messages require a chat template, and this tokenizer has none. Set `tokenizer.chat_template`, or pass "
                "`text` or `prompt`/`completion` strings."
            )
        encoded: Any = processing_class.apply_chat_template(
            text_or_messages,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=assistant_only_loss and not add_generation_prompt,
            tools=tools,
            chat_template=chat_template,
            **(row.get("chat_template_kwargs") or {}),  # `datasets` stores `None` for rows without it
        )
        tokens = np.asarray(encoded["input_ids"], dtype=np.int32).reshape(-1)
        if not assistant_only_loss or add_generation_prompt:
            return tokens, np.ones(len(tokens), dtype=bool)
        loss_mask = np.asarray(encoded["assistant_masks"], dtype=bool).reshape(-1)
        if not loss_mask.any():
            raise EncodingError(
                "`assistant_only_loss=True`, but the chat template marks no token of this row as the assistant's. Use "
                "a template with `{% generation %}`, such as the one from TRL's "
                "`get_training_chat_template(tokenizer)`."
            )
        return tokens, loss_mask

    return tokenize


def _is_without_eos(text: Any, processing_class: PreTrainedTokenizerBase | ProcessorMixin | None) -> bool:
    return isinstance(text, str) and _with_eos(text, processing_class) != text


def _with_eos(text: str, processing_class: PreTrainedTokenizerBase | ProcessorMixin | None) -> str:
    tokenizer = unwrap_tokenizer(processing_class)
    eos = tokenizer.eos_token if tokenizer is not None else None
    return text if eos is None or text.endswith(eos) else text + eos
