"""Encoded rows: token ids, loss masks and sample ids in flat arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..utils.counted import counted_of
from ..utils.windows import window_bounds


if TYPE_CHECKING:  # reading a trace does not need `datasets`, which takes a second to import
    from datasets import Dataset


IGNORE_INDEX = -100
# Rows are processed in windows of at most this many rows and tokens, to bound the memory of intermediate results.
WINDOW, WINDOW_TOKENS = 16_384, 2**22


def without_padding(tokens: int) -> np.ndarray:
    """Return the attention mask of rows without padding: shape `(tokens,)`, bool, all `True`. It takes no memory and is
    read-only.
    """
    return np.broadcast_to(np.True_, tokens)


def content_hash(id_: str) -> str:
    """A sample id without its occurrence number: equal for rows that are trained on the same tokens."""
    return id_.rpartition("-")[0]


def content_hashes(ids: pa.StringArray) -> pa.StringArray:
    """The [`content_hash`] of each id."""
    return pc.replace_substring_regex(ids, "-[^-]*$", "")


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """Tokenized samples as the model sees them, in flat arrays and in the order of the dataset.

    Attributes:
        ids (`pa.StringArray` of length `samples`):
            One id per sample: a hash of its token ids and its masks, followed by an occurrence number. An id does not
            depend on the position of the row. The occurrence number distinguishes duplicates.
        tokens (`np.ndarray` of shape `(total_tokens,)`, int32):
            Token ids of all samples, concatenated.
        loss_mask (`np.ndarray` of shape `(total_tokens,)`, bool):
            Whether a token contributes to the loss. It is always `False` for the first token of a sample, because
            nothing predicts that token.
        attention_mask (`np.ndarray` of shape `(total_tokens,)`, bool):
            Whether other tokens of the sample attend to a token. It is `False` for padding, which is part of a sample
            only if it contributes to the loss.
        offsets (`np.ndarray` of shape `(samples + 1,)`, int64):
            Sample `i` is `tokens[offsets[i]:offsets[i + 1]]`.
        truncated (`int`, defaults to 0):
            Number of samples that were truncated to the maximum length.
        left_padded (`int`, defaults to 0):
            Number of samples whose padding on the left was removed. Models with absolute positions count it.
        max_length (`int`, *optional*):
            The number of tokens above which samples were truncated.
        encoding (`dict`, defaults to `{}`):
            Further arguments of [`encode_rows`] that encode the rows again. They are stored in the trace.
    """

    ids: pa.StringArray
    tokens: np.ndarray
    loss_mask: np.ndarray
    attention_mask: np.ndarray
    offsets: np.ndarray
    truncated: int = 0
    left_padded: int = 0
    max_length: int | None = None
    encoding: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids (int32) and the loss mask (bool) of one sample, both of shape `(tokens,)`."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span], self.loss_mask[span]

    def select(self, indices: Sequence[int] | np.ndarray) -> EncodedRows:
        """Return the samples at `indices`, in that order and with their ids unchanged."""
        indices = np.asarray(indices, dtype=np.int64)
        lengths = np.diff(self.offsets)[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.repeat(self.offsets[:-1][indices] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return EncodedRows(
            self.ids.take(pa.array(indices)),
            self.tokens[positions],
            self.loss_mask[positions],
            self.attention_mask[positions],
            offsets,
            max_length=self.max_length,
            encoding=self.encoding,
        )

    def windows(self) -> Iterator[EncodedRows]:
        """Iterate over the samples in order, in windows of up to 16,384 samples and 4,194,304 tokens.

        A longer sample is a window of its own. Tokens are not copied.
        """
        for start, stop in window_bounds(self.offsets, WINDOW_TOKENS, WINDOW):
            yield self.between(start, stop)

    def between(self, start: int, stop: int) -> EncodedRows:
        """Return the samples from `start` to `stop` (exclusive). Tokens and masks are not copied."""
        offsets = self.offsets[start : stop + 1]
        span = slice(offsets[0], offsets[-1])
        return EncodedRows(
            self.ids[start:stop],
            self.tokens[span],
            self.loss_mask[span],
            self.attention_mask[span],
            offsets - offsets[0],
        )

    def sharing_memory(self, other: EncodedRows) -> EncodedRows:
        """Return these rows with the arrays of `other`, if both have the same samples in the same order. Otherwise return
        them unchanged. Samples with equal ids have equal tokens and masks, so one copy of them is enough.
        """
        if not self.ids.equals(other.ids):
            return self
        return replace(
            self,
            ids=other.ids,
            tokens=other.tokens,
            loss_mask=other.loss_mask,
            attention_mask=other.attention_mask,
            offsets=other.offsets,
        )

    @cached_property
    def is_padded(self) -> np.ndarray:
        """Whether a sample has padding that contributes to the loss: shape `(samples,)`, bool."""
        padding = np.flatnonzero(~self.attention_mask)
        is_padded = np.zeros(len(self), dtype=bool)
        is_padded[np.searchsorted(self.offsets, padding, side="right") - 1] = True
        return is_padded

    def describe_padding(self) -> str | None:
        """A sentence for a warning that says how many loss tokens are padding, or `None` if there are none."""
        padding = int(np.count_nonzero(self.loss_mask > self.attention_mask))
        if not padding:
            return None
        return (
            f"{counted_of(padding, int(self.loss_offsets[-1]), 'loss token', 'are')} padding with a label other than -100. "
            "Training counts such tokens, so the records do too. To train and score the text only, set the labels to -100 "
            "where `attention_mask` is 0."
        )

    def as_dataset(self) -> Dataset:
        """Return a dataset to train on, with the columns `input_ids` and `labels`.

        Labels are -100 for tokens that do not contribute to the loss. If any sample is padded, there is a column
        `attention_mask` too.
        """
        from datasets import Dataset

        # The types that `datasets` gives to lists of integers in columns of these names.
        schema = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int64())})
        if not self.attention_mask.all():
            schema = schema.append(pa.field("attention_mask", pa.list_(pa.int8())))
        batches = []
        for window in self.windows():
            attended = window.attention_mask.view(np.int8)
            offsets, columns = window.offsets.astype(np.int32), [window.tokens, window.labels, attended]
            lists = [pa.ListArray.from_arrays(offsets, values) for values in columns[: len(schema)]]
            batches.append(pa.record_batch(lists, schema=schema))
        table = pa.Table.from_batches(batches, schema)
        return Dataset(table, fingerprint=self.fingerprint)  # without it, `datasets` copies the table to hash it

    @property
    def labels(self) -> np.ndarray:
        """Labels to train on: shape `(total_tokens,)`, int64. The token id, or -100 for tokens that do not contribute to the
        loss.
        """
        labelled, starts = self.loss_mask.copy(), self.offsets[:-1][np.diff(self.offsets) > 0]
        labelled[starts] |= ~self.attention_mask[starts]  # nothing predicts this token, but its label keeps the padding
        return np.where(labelled, self.tokens, np.int64(IGNORE_INDEX))

    @property
    def loss_tokens(self) -> np.ndarray:
        """Ids of the tokens that contribute to the loss, for all samples in order: shape `(loss_tokens,)`, int32.

        A record holds one loss for each of them.
        """
        return self.tokens[self.loss_mask]

    @cached_property
    def loss_offsets(self) -> np.ndarray:
        """Offsets of the samples in `loss_tokens`: shape `(samples + 1,)`, int64.

        Sample `i` is `loss_tokens[loss_offsets[i]:loss_offsets[i + 1]]`.
        """
        loss_offsets = np.zeros_like(self.offsets)
        for start, stop in window_bounds(self.offsets, WINDOW_TOKENS, WINDOW):
            offsets = self.offsets[start : stop + 1]
            counts = np.zeros(len(offsets) - 1, np.int64)
            not_empty = np.flatnonzero(np.diff(offsets))  # `reduceat` returns a wrong sum for an empty sample
            loss_mask = self.loss_mask[offsets[0] : offsets[-1]]
            counts[not_empty] = np.add.reduceat(loss_mask, offsets[not_empty] - offsets[0], dtype=np.int64)
            loss_offsets[start + 1 : stop + 1] = loss_offsets[start] + np.cumsum(counts)
        return loss_offsets

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all ids in order: equal for two datasets that train the same tokens in the same order."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self), WINDOW):
            digest.update("".join(f"{sample}\n" for sample in self.ids[start : start + WINDOW].to_pylist()).encode())
        return digest.hexdigest()


def common_prefix_length(first: np.ndarray, second: np.ndarray) -> int:
    """Return the length of the longest common prefix of two token sequences."""
    shorter = min(len(first), len(second))
    differences = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differences[0]) if len(differences) else shorter
