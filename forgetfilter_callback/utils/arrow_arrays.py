"""Convert between Arrow and NumPy without pandas.

`pa.Array.to_numpy` and `pa.array` import pandas, which takes longer than reading a trace.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def to_numpy(array: pa.Array) -> np.ndarray:
    """View a numeric or Boolean Arrow array without nulls as a read-only NumPy array. Booleans are copied."""
    if pa.types.is_boolean(array.type):
        return np.from_dlpack(array.cast(pa.uint8())).view(np.bool_)
    return np.from_dlpack(array)


def from_numpy(values: np.ndarray) -> pa.Array:
    """View a numeric or Boolean NumPy array of shape `(samples,)` as an Arrow array. Booleans are copied."""
    if values.dtype == np.bool_:
        return from_numpy(values.view(np.uint8)).cast(pa.bool_())
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, buffer])
