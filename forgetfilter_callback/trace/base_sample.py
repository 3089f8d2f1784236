"""The samples that are recorded under the base model where a trace does not hold all of them."""

from __future__ import annotations

import numpy as np

from ..data.encoded_rows import EncodedRows


# Enough for the checks that a training run starts from the right model.
BASE_SAMPLES = 32


def base_sample(rows: EncodedRows) -> np.ndarray:
    """Choose 32 evenly spaced samples of `rows` among those with loss tokens, or all of them if there are fewer.

    Returns:
        `np.ndarray` of shape `(chosen,)`, integer: row numbers in increasing order.
    """
    scorable = np.flatnonzero(np.diff(rows.loss_offsets))
    count = min(BASE_SAMPLES, len(scorable))
    return scorable[np.linspace(0, len(scorable) - 1, count, dtype=int)]
