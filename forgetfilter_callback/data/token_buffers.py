"""[`TokenBuffers`]: token ids and masks in buffers that grow."""

from __future__ import annotations

from array import array

import numpy as np

from .encoded_rows import without_padding


class TokenBuffers:
    """Collects token ids and masks of many rows. One Python object per row would take more memory than most rows."""

    def __init__(self) -> None:
        self._tokens, self._loss_mask = array("i"), bytearray()
        # Attention masks are stored up to the last padded row only. Most sets have no padding.
        self._attention_mask = bytearray()

    def __len__(self) -> int:
        """The number of tokens so far."""
        return len(self._tokens)

    def append(self, tokens: bytes, loss_mask: bytes, attention_mask: bytes | None) -> None:
        """Append the tokens (int32) and masks (bool) of one or more rows. `attention_mask` is `None` without padding."""
        if attention_mask is not None:
            self._attention_mask += b"\1" * (len(self) - len(self._attention_mask)) + attention_mask
        self._tokens.frombytes(tokens)
        self._loss_mask += loss_mask

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids (int32), loss mask (bool) and attention mask (bool), each of shape `(tokens,)`. They are not copies:
        nothing can be appended any more.
        """
        attention_mask = without_padding(len(self))
        if self._attention_mask:
            self._attention_mask += b"\1" * (len(self) - len(self._attention_mask))
            attention_mask = np.frombuffer(self._attention_mask, bool)
        return np.frombuffer(self._tokens, np.int32), np.frombuffer(self._loss_mask, bool), attention_mask
