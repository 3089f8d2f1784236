"""[`TokenBuffers`]: token ids and masks in buffers that grow."""

from __future__ import annotations

from array import array

import numpy as np

from .encoded_rows import EncodedRows, without_padding


class TokenBuffers:
    """Collects token ids and masks of many rows. One Python object per row would take more memory than most rows.

    Args:
        known ([`EncodedRows`], *optional*):
            Rows in memory that are probably the same. While all tokens and masks equal theirs, nothing is stored.
    """

    def __init__(self, known: EncodedRows | None = None) -> None:
        self._known, self._known_tokens = known, 0
        self._tokens, self._loss_mask = array("i"), bytearray()
        # Attention masks are stored up to the last padded row only. Most sets have no padding.
        self._attention_mask = bytearray()

    def __len__(self) -> int:
        """The number of tokens so far."""
        return self._known_tokens if self._known is not None else len(self._tokens)

    def append(self, tokens: bytes, loss_mask: bytes, attention_mask: bytes | None) -> None:
        """Append the tokens (int32) and masks (bool) of one or more rows. `attention_mask` is `None` without padding."""
        if self._known is not None:
            start, stop = self._known_tokens, self._known_tokens + len(loss_mask)
            if _bytes_of(self._known, start, stop) == (tokens, loss_mask, attention_mask):
                self._known_tokens = stop
                return
            stored, self._known = _bytes_of(self._known, 0, start), None
            self._store(*stored)
        self._store(tokens, loss_mask, attention_mask)

    def _store(self, tokens: bytes, loss_mask: bytes, attention_mask: bytes | None) -> None:
        if attention_mask is not None:
            self._attention_mask += b"\1" * (len(self._tokens) - len(self._attention_mask)) + attention_mask
        self._tokens.frombytes(tokens)
        self._loss_mask += loss_mask

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids (int32), loss mask (bool) and attention mask (bool), each of shape `(tokens,)`. They are not copies:
        nothing can be appended any more.
        """
        if self._known is not None:
            span = slice(self._known_tokens)
            return self._known.tokens[span], self._known.loss_mask[span], self._known.attention_mask[span]
        attention_mask = without_padding(len(self))
        if self._attention_mask:
            self._attention_mask += b"\1" * (len(self) - len(self._attention_mask))
            attention_mask = np.frombuffer(self._attention_mask, bool)
        return np.frombuffer(self._tokens, np.int32), np.frombuffer(self._loss_mask, bool), attention_mask


def _bytes_of(rows: EncodedRows, start: int, stop: int) -> tuple[bytes, bytes, bytes | None]:
    """Tokens and masks from one token to another, as [`TokenBuffers.append`] takes them."""
    attention_mask = rows.attention_mask[start:stop]
    padded = None if attention_mask.all() else attention_mask.tobytes()
    return rows.tokens[start:stop].tobytes(), rows.loss_mask[start:stop].tobytes(), padded
