"""Arrays are the same in Arrow and NumPy, and their conversion does not import pandas."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from forgetfilter_callback.utils.arrow_arrays import from_numpy, to_numpy


ARRAYS = [
    np.array([1.5, np.nan, -np.inf]),
    np.array([0.5, np.nan], dtype=np.float16),
    np.arange(5, dtype=np.int32)[::2],
    np.array([True, False, True, True]),
    np.zeros(0, dtype=bool),
]


@pytest.mark.parametrize("values", ARRAYS)
def test_arrays_are_the_same_in_arrow_and_numpy(values):
    array = from_numpy(values)
    assert array.type == pa.array(values).type and array.null_count == 0
    np.testing.assert_array_equal(to_numpy(array), values)
    np.testing.assert_array_equal(to_numpy(array[1:]), values[1:])  # with an offset
    assert to_numpy(array).dtype == values.dtype


def test_converting_arrays_does_not_import_pandas():
    code = (
        "import sys, numpy as np; from forgetfilter_callback.utils.arrow_arrays import from_numpy, to_numpy; "
        "to_numpy(from_numpy(np.ones(3))); to_numpy(from_numpy(np.ones(3, bool))); sys.exit('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
