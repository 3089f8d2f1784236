"""Convert Arrow arrays to NumPy without pandas."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def to_numpy(array: pa.Array) -> np.ndarray:
    """View a numeric or Boolean Arrow array without nulls as a read-only NumPy array. Booleans are copied.

    `array.to_numpy()` imports pandas, which takes longer than reading a trace.
    """
    if pa.types.is_boolean(array.type):
        return np.from_dlpack(array.cast(pa.uint8())).view(np.bool_)
    return np.from_dlpack(array)
