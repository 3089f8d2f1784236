"""Audit labels: which rows are known to be unsafe. They are only compared with the results of a filter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import DataError


_TRUTH = {"true": True, "false": False, "1": True, "0": False}


def as_labels(values: Iterable[Any], where: str) -> np.ndarray:
    """Convert audit labels to Booleans.

    Args:
        values (`Iterable` of length `samples`):
            Booleans, or numbers: 0 is safe. Text may be "true", "false", "1" or "0", as in a CSV file.
        where (`str`):
            Where the values come from, such as "The column 'unsafe'". Errors begin with it.

    Returns:
        `np.ndarray` of shape `(samples,)`, bool: whether a row is unsafe.

    Raises:
        DataError: if a value is missing, NaN, or anything else. The message names the row.
    """
    return np.array([_is_unsafe(value, index, where) for index, value in enumerate(values)], bool)


def _is_unsafe(value: Any, index: int, where: str) -> bool:
    label = np.asarray(value)[()]  # also a scalar of NumPy or torch
    if isinstance(label, bool | int | float | np.bool_ | np.integer | np.floating) and not math.isnan(label):
        return bool(label)
    if isinstance(label, str) and label.lower() in _TRUTH:
        return _TRUTH[label.lower()]
    raise DataError(f"{where} must hold true/false or numbers in each row, but row {index} holds {value!r:.60}.")
