"""Token ids of losses, gathered in slices."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import sample_ids

from forgetfilter_callback.data.encoded_rows import EncodedRows
from forgetfilter_callback.data.loss_tokens import LossTokens


@pytest.mark.parametrize("lengths", [[3, 0, 4, 1, 0, 0, 5, 2], [0, 0, 6, 0], [0, 0]])
def test_slices_are_those_of_all_loss_tokens(lengths):
    """Rows without tokens, rows without loss tokens, and slices that begin and end inside of rows."""
    rng, total = np.random.default_rng(0), sum(lengths)
    tokens, loss_mask = rng.integers(0, 90, total, dtype=np.int32), rng.random(total) < 0.6
    rows = EncodedRows(
        sample_ids(len(lengths)), tokens, loss_mask, np.ones(total, bool), np.cumsum([0, *lengths], dtype=np.int64)
    )
    expected = np.array([token for token, counts in zip(tokens, loss_mask, strict=True) if counts], np.int32)
    for start in range(len(expected) + 1):
        for stop in range(start, len(expected) + 1):
            np.testing.assert_array_equal(LossTokens(rows)[start:stop], expected[start:stop], strict=True)
