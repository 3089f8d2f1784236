"""[`LossTokens`]: the tokens that contribute to the loss, without an array of all of them."""

from __future__ import annotations

import numpy as np

from .encoded_rows import EncodedRows


class LossTokens:
    """Token ids of the losses of a record. A slice gathers them from the rows.

    [`EncodedRows.loss_tokens`] would take four more bytes per loss token.

    Args:
        rows ([`EncodedRows`]):
            The rows of the record.
    """

    def __init__(self, rows: EncodedRows):
        self._rows = rows

    def __getitem__(self, span: slice) -> np.ndarray:
        """Token ids: shape `(losses in the span,)`, int32. `span` has a start and a stop, as indices of losses."""
        offsets = self._rows.loss_offsets
        first = int(np.searchsorted(offsets, span.start, side="right")) - 1
        last = max(first, int(np.searchsorted(offsets, span.stop)))
        tokens = self._rows.between(first, last).loss_tokens
        return tokens[span.start - offsets[first] : span.stop - offsets[first]]
