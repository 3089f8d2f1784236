"""TODO"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from datasets import Dataset


IGNORE_INDEX = -100
# Work that needs memory for each row is done on so many rows at a time.
WINDOW = 16_384


@dataclass(frozen=True)
class EncodedRows:
    """The noisy set as the model sees it, flat, in the order of the noisy set.

    Attributes:
        ids (`pa.StringArray` of length `samples`):
            One id a sample: a hash of its token ids and of which of them count, then an occurrence number, so that a
            row is found again whatever its position and duplicates stay apart.
        tokens (`np.ndarray` of shape `(total_tokens,)`, int32):
            Token ids of all samples, one after another.
        loss_mask (`np.ndarray` of shape `(total_tokens,)`, bool):
            Whether a token's loss counts. Never true for a sample's first token, which nothing predicts.
        offsets (`np.ndarray` of shape `(samples + 1,)`, int64):
            Sample `i` is `tokens[offsets[i]:offsets[i + 1]]`.
        truncated (`int`):
            How many samples were cut at the right to fit the context.
    """

    ids: pa.StringArray
    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32) and counted mask (bool) of one sample."""
        where = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[where], self.loss_mask[where]

    def select(self, indices: Sequence[int] | np.ndarray) -> EncodedRows:
        """The samples at `indices`, in that order, with their ids unchanged."""
        indices = np.asarray(indices, dtype=np.int64)
        lengths = np.diff(self.offsets)[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.offsets[:-1][indices] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return EncodedRows(self.ids.take(pa.array(indices)), self.tokens[places], self.loss_mask[places], offsets)

    def windows(self) -> Iterator[EncodedRows]:
        """The samples in order, some 16,000 at a time, without copying tokens."""
        for start in range(0, len(self), WINDOW):
            offsets = self.offsets[start : start + WINDOW + 1]
            where = slice(offsets[0], offsets[-1])
            yield EncodedRows(
                self.ids[start : start + WINDOW], self.tokens[where], self.loss_mask[where], offsets - offsets[0]
            )

    def as_dataset(self) -> Dataset:
        """The samples as a trainer takes them: `input_ids`, and `labels` that are -100 where a token does not count."""
        samples = (self.sample(index) for index in range(len(self)))
        return Dataset.from_list(
            [
                {"input_ids": tokens.tolist(), "labels": np.where(loss_mask, tokens, IGNORE_INDEX).tolist()}
                for tokens, loss_mask in samples
            ]
        )

    @property
    def loss_tokens(self) -> np.ndarray:
        """Token ids of the counted tokens of all samples: what the losses of a record belong to."""
        return self.tokens[self.loss_mask]

    @cached_property
    def loss_offsets(self) -> np.ndarray:
        """Offsets, of shape `(samples + 1,)`, int64, of the samples in [`loss_tokens`]."""
        offsets = np.zeros_like(self.offsets)
        for start in range(0, len(self), WINDOW):
            begins = self.offsets[start : start + WINDOW + 1]
            counts = np.zeros(len(begins) - 1, np.int64)
            with_tokens = np.flatnonzero(np.diff(begins))
            window = self.loss_mask[begins[0] : begins[-1]]
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


def common_prefix_length(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two rows begin with alike."""
    shorter = min(len(first), len(second))
    different = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(different[0]) if len(different) else shorter
