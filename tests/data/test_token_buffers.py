"""Token ids and masks in buffers, compared with rows that are in memory."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import sample_ids

from forgetfilter_callback.data.encoded_rows import EncodedRows, without_padding
from forgetfilter_callback.data.token_buffers import TokenBuffers


LENGTHS = [3, 0, 4, 1, 5]


def random_arrays(padded: bool) -> list[np.ndarray]:
    rng, total = np.random.default_rng(0), sum(LENGTHS)
    attention_mask = rng.random(total) < 0.7 if padded else without_padding(total)
    return [rng.integers(0, 90, total, dtype=np.int32), rng.random(total) < 0.5, attention_mask]


def filled(buffers: TokenBuffers, arrays: list[np.ndarray], rows: int) -> tuple[np.ndarray, ...]:
    start = 0
    for length in LENGTHS[:rows]:
        tokens, loss_mask, attention_mask = (values[start : start + length] for values in arrays)
        padded = None if attention_mask.all() else attention_mask.tobytes()
        buffers.append(tokens.tobytes(), loss_mask.tobytes(), padded)
        start += length
        assert len(buffers) == start
    return buffers.arrays()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("changed", [None, 0, 1, 2], ids=["same", "tokens", "loss mask", "attention mask"])
@pytest.mark.parametrize("place", [0, 4, 12])
@pytest.mark.parametrize("rows", [5, 4])
def test_the_arrays_are_those_of_the_rows(padded, changed, place, rows):
    """Whether the known rows are the same, differ in one value, or have one more row."""
    arrays, total = random_arrays(padded), sum(LENGTHS[:rows])
    known = [values.copy() for values in arrays]
    if changed is not None:
        known[changed][place] = 91 if changed == 0 else not known[changed][place]
    known_rows = EncodedRows(sample_ids(len(LENGTHS)), *known, np.cumsum([0, *LENGTHS]))
    for buffers in (TokenBuffers(), TokenBuffers(known_rows)):
        for found, values in zip(filled(buffers, arrays, rows), arrays, strict=True):
            np.testing.assert_array_equal(found, values[:total], strict=True)
    is_known = changed is None or place >= total
    assert np.shares_memory(filled(TokenBuffers(known_rows), arrays, rows)[0], known[0]) == is_known
