"""Rows → token ids and which of them count; stable sample ids and a dataset fingerprint.

There are two ways in, and both give the same [`EncodedRows`]:

- [`encode_collated`] takes the rows a trainer trains on and its own collator, so that exactly the tokens count which
  count in training, whoever made the labels.
- [`encode_rows`] takes rows as people write them (`prompt`/`completion`, `messages`, `text`, `input_ids`), after TRL's
  conventions.

What cannot be one causal-language-modelling sample (packed rows, preferences, images, streams) is refused here.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase


IGNORE_INDEX = -100
# Work that needs memory for each row is done on so many rows at a time.
WINDOW = 16_384
_DIGEST_BYTES = 12
# So many rows are read and collated twice, to see whether the dataset and the collator always say the same.
_READ_TWICE = 16


class EncodingError(ValueError):
    """Rows that cannot be read as samples. The message names the cause, the row and the way out."""


class NotOneSampleARow(EncodingError):
    """A loader row is not one sample: it holds several (packing) or none (preferences), or the rows come as a stream."""


@dataclass(frozen=True)
class EncodedRows:
    """The noisy set as the model sees it, flat, in the order of the noisy set.

    Attributes:
        ids (`pa.StringArray` of length `samples`):
            One id a sample: a hash of its token ids and of which of them count, then an occurrence number, so that a
            row is found again whatever its position and duplicates stay apart.
        tokens (`np.ndarray` of shape `(total_tokens,)`, int32):
            Token ids of all samples, one after another.
        counted (`np.ndarray` of shape `(total_tokens,)`, bool):
            Whether a token's loss counts. Never true for a sample's first token, which nothing predicts.
        offsets (`np.ndarray` of shape `(samples + 1,)`, int64):
            Sample `i` is `tokens[offsets[i]:offsets[i + 1]]`.
        truncated (`int`):
            How many samples were cut at the right to fit the context.
    """

    ids: pa.StringArray
    tokens: np.ndarray
    counted: np.ndarray
    offsets: np.ndarray
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32) and counted mask (bool) of one sample."""
        where = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[where], self.counted[where]

    def select(self, indices: Sequence[int] | np.ndarray) -> EncodedRows:
        """The samples at `indices`, in that order, with their ids unchanged."""
        indices = np.asarray(indices, dtype=np.int64)
        lengths = np.diff(self.offsets)[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.offsets[:-1][indices] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return EncodedRows(self.ids.take(pa.array(indices)), self.tokens[places], self.counted[places], offsets)

    def windows(self) -> Iterator[EncodedRows]:
        """The samples in order, some 16,000 at a time, without copying tokens."""
        for start in range(0, len(self), WINDOW):
            offsets = self.offsets[start : start + WINDOW + 1]
            where = slice(offsets[0], offsets[-1])
            yield EncodedRows(
                self.ids[start : start + WINDOW], self.tokens[where], self.counted[where], offsets - offsets[0]
            )

    def as_dataset(self) -> Dataset:
        """The samples as a trainer takes them: `input_ids`, and `labels` that are -100 where a token does not count."""
        samples = (self.sample(index) for index in range(len(self)))
        return Dataset.from_list(
            [
                {"input_ids": tokens.tolist(), "labels": np.where(counted, tokens, IGNORE_INDEX).tolist()}
                for tokens, counted in samples
            ]
        )

    @property
    def counted_tokens(self) -> np.ndarray:
        """Token ids of the counted tokens of all samples: what the losses of a record belong to."""
        return self.tokens[self.counted]

    @cached_property
    def counted_offsets(self) -> np.ndarray:
        """Offsets, of shape `(samples + 1,)`, int64, of the samples in [`counted_tokens`]."""
        offsets = np.zeros_like(self.offsets)
        for start in range(0, len(self), WINDOW):
            begins = self.offsets[start : start + WINDOW + 1]
            counts = np.zeros(len(begins) - 1, np.int64)
            with_tokens = np.flatnonzero(np.diff(begins))
            window = self.counted[begins[0] : begins[-1]]
            counts[with_tokens] = np.add.reduceat(window, begins[with_tokens] - begins[0], dtype=np.int64)
            offsets[start + 1 : start + 1 + len(counts)] = offsets[start] + np.cumsum(counts)
        return offsets

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all ids in order: two sets share it when they train the same tokens in the same order."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self), WINDOW):
            digest.update("".join(f"{sample}\n" for sample in self.ids[start : start + WINDOW].to_pylist()).encode())
        return digest.hexdigest()


def _encode(
    rows: Iterable[Any],
    encode_one: Callable[[Any], tuple[np.ndarray, np.ndarray]],
    total: int,
    max_length: int | None,
    disable_tqdm: bool,
    keep_end: bool = False,
) -> EncodedRows:
    if total == 0:
        raise EncodingError("The noisy set is empty: there is nothing to track. Pass the rows you finetune on.")
    # Grown in place: a Python object a row would be larger than most rows.
    all_tokens, all_counted, offsets, ids = array("i"), bytearray(), array("q", [0]), bytearray()
    truncated = 0
    for index, row in enumerate(tqdm(rows, total=total, desc="Encoding", disable=disable_tqdm, leave=False)):
        try:
            tokens, counted = encode_one(row)
        except EncodingError as error:
            raise type(error)(f"Row {index}: {error}") from error
        except (TypeError, ValueError, OverflowError, TemplateError) as error:
            raise EncodingError(f"Row {index}: {error} ({type(error).__name__})") from error
        if max_length is not None and len(tokens) > max_length:
            within = slice(-max_length, None) if keep_end else slice(max_length)
            tokens, counted = tokens[within], counted[within]
            truncated += 1
        counted[:1] = False
        token_bytes, counted_bytes = tokens.tobytes(), counted.tobytes()
        ids += hashlib.blake2b(token_bytes + counted_bytes, digest_size=_DIGEST_BYTES).hexdigest().encode() + b"-0"
        all_tokens.frombytes(token_bytes)
        all_counted += counted_bytes
        offsets.append(len(all_tokens))
    return EncodedRows(
        ids=_numbered(ids),
        tokens=np.frombuffer(all_tokens, np.int32),
        counted=np.frombuffer(all_counted, bool),
        offsets=np.frombuffer(offsets, np.int64),
        truncated=truncated,
    )


def _numbered(ids: bytearray) -> pa.StringArray:
    """The ids, which all end in `-0`, with the number of times a row stood before: `…-1` for its first duplicate."""
    width = 2 * _DIGEST_BYTES + 2
    rows = np.frombuffer(ids, f"S{width}")
    order = np.argsort(rows, kind="stable")
    # Places in that order whose row is that of the place before; few, in most sets.
    windows = ((start, rows[order[start : start + WINDOW + 1]]) for start in range(0, len(rows), WINDOW))
    repeats = np.concatenate([np.flatnonzero(some[1:] == some[:-1]) + start + 1 for start, some in windows])
    begins = np.flatnonzero(np.diff(repeats, prepend=-1) != 1)
    numbers = 1 + np.arange(len(repeats)) - np.repeat(begins, np.diff(begins, append=len(repeats)))
    repeats = order[repeats]
    del order
    ends = np.full(len(rows) + 1, width, np.int32)
    ends[0] = 0
    if len(repeats):
        numbered, begin = bytearray(), 0
        for place, number in sorted(zip(repeats.tolist(), numbers.tolist(), strict=True)):
            digits = str(number).encode()
            numbered += ids[begin : (place + 1) * width - 1] + digits
            begin = (place + 1) * width
            ends[place + 1] += len(digits) - 1
        ids = numbered + ids[begin:]
    np.cumsum(ends, out=ends)
    return pa.StringArray.from_buffers(len(rows), pa.py_buffer(ends), pa.py_buffer(ids))


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
        raise NotOneSampleARow(
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
            raise NotOneSampleARow(
                f"the collator makes no batch of one row ({type(error).__name__}: {error})."
            ) from error
        if not isinstance(batch, Mapping):
            raise NotOneSampleARow(
                f"the collator makes {type(batch).__name__}, not a batch of `input_ids` and `labels`."
            )
        return batch

    def one_sample(batch: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        if "input_ids" not in batch or "labels" not in batch:
            raise NotOneSampleARow(
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
            raise NotOneSampleARow(
                "one row of the training set holds several samples (packing), so their losses cannot be told apart. "
                "A safety session may be packed, if the noisy rows are named: `ForgetTracker(noisy)`."
            )
        if "attention_mask" in batch:
            real = batch["attention_mask"][0].bool()
            input_ids, labels = input_ids[:, real], labels[:, real]
        counted = labels[0] != IGNORE_INDEX
        if not torch.equal(labels[0][counted], input_ids[0][counted]):
            raise EncodingError(
                "labels differ from the row's own tokens, so this is not causal language modelling (masked or "
                "sequence-to-sequence training?). ForgetFilter works on causal language modelling only."
            )
        return input_ids[0].numpy().astype(np.int32), counted.numpy()

    return _encode(range(len(dataset)), encode_one, len(dataset), max_length, disable_tqdm)


def _equal(batch: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    tensors = [name for name, value in batch.items() if isinstance(value, torch.Tensor)]
    return batch.keys() == other.keys() and all(torch.equal(batch[name], other[name]) for name in tensors)


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
            labels = np.asarray(row["labels"]) if "labels" in row else _masked(tokens, row, completion_only_loss)
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
            prompt, completion = _checked(row, "prompt"), _checked(row, "completion")
            if isinstance(prompt, str) is not isinstance(completion, str):
                raise EncodingError("`prompt` is text and `completion` messages, or the other way round. Use one form.")
            if isinstance(completion, str):
                completion = _with_eos(completion, processing_class)
            prompt_tokens, _ = tokenize(prompt, add_generation_prompt=True)
            tokens, counted = tokenize(prompt + completion)  # type: ignore[operator] # of one kind
            if completion_only_loss is not False:
                counted[: common_prefix_length(prompt_tokens, tokens)] = False
            return tokens, counted
        if "messages" in row:
            return tokenize(_checked(row, "messages"))
        if text_column in row:
            text = _checked(row, text_column)
            if not isinstance(text, str):
                raise EncodingError(f"`{text_column}` holds messages. Name the column `messages`.")
            return tokenize(_with_eos(text, processing_class))
        raise EncodingError(
            f"columns {sorted(row)} hold no sample. Use `prompt` and `completion`, `messages`, `text`, or `input_ids`."
        )

    if isinstance(rows, torch.utils.data.IterableDataset):
        raise NotOneSampleARow("An IterableDataset has no fixed rows. Pass a map-style dataset or a list of rows.")
    if isinstance(rows, str) or not isinstance(rows, Dataset | torch.utils.data.Dataset | Sequence):
        raise EncodingError(f"The noisy set is {type(rows).__name__}, not a dataset or a list of rows.")
    known = cast(Sequence[Any], rows)
    return _encode(known, encode_one, len(known), max_length, disable_tqdm, keep_end)


def _checked(row: Mapping[str, Any], column: str) -> str | list[dict[str, Any]]:
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


def _masked(tokens: np.ndarray, row: Mapping[str, Any], completion_only_loss: bool | None) -> np.ndarray:
    """Labels of a pre-tokenised row that has TRL's masks, or none."""
    masks = ["completion_mask"] if completion_only_loss and "completion_mask" in row else []
    masks += ["assistant_masks"] if "assistant_masks" in row else []
    counted = np.all([np.asarray(row[mask], dtype=bool) for mask in masks], axis=0)
    return np.where(counted, tokens, IGNORE_INDEX)


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
        counted = np.asarray(encoded["assistant_masks"], dtype=bool)
        if not counted.any():
            raise EncodingError(
                "no token of this row is the assistant's (`assistant_only_loss=True`): its chat template marks none. Use "
                "one with `{% generation %}`, such as TRL's `get_training_chat_template(tokenizer)` gives."
            )
        return tokens, counted

    return tokenize


def _with_eos(text: str, processing_class: PreTrainedTokenizerBase | None) -> str:
    eos = processing_class.eos_token if processing_class is not None else None
    return text if eos is None or text.endswith(eos) else text + eos


def common_prefix_length(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two rows begin with alike."""
    shorter = min(len(first), len(second))
    different = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(different[0]) if len(different) else shorter
