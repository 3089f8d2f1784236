"""Accept rows in every kind of container, and name the ones that are not rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set, Sized, ValuesView
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict

from ..errors import EncodingError
from .encoded_rows import EncodedRows


def as_rows(rows: Any, name: str) -> Any:
    """Return rows as a dataset or a sequence. A `DataFrame` or [`EncodedRows`] are converted to a dataset, and all other
    rows are returned unchanged.

    Args:
        rows (`Dataset`, `torch.utils.data.Dataset`, `DataFrame`, [`EncodedRows`] or a sequence):
            The rows. A stream is returned unchanged.
        name (`str`):
            What the rows are, for messages.

    Raises:
        EncodingError: if `rows` is a `DatasetDict`, a `DataFrame` that `datasets` cannot convert, no table of rows at all,
            or empty.
    """
    if isinstance(rows, DatasetDict | IterableDatasetDict):
        raise EncodingError(
            f"{name} is a {type(rows).__name__} with the splits {', '.join(map(repr, rows))}. Choose a split, such as "
            f"`dataset[{next(iter(rows), 'train')!r}]`."
        )
    if isinstance(rows, EncodedRows):
        return rows.as_dataset()
    if isinstance(rows, pd.DataFrame):
        try:
            return Dataset.from_pandas(rows, preserve_index=False)
        except pa.ArrowException as error:
            raise EncodingError(
                f"{name} is a DataFrame that cannot be converted to a dataset: {error}. Pass a list of rows: "
                "`frame.to_dict('records')`."
            ) from error
    is_table = isinstance(rows, Sized | torch.utils.data.IterableDataset)
    if not is_table or isinstance(rows, str | Mapping | Set | ValuesView):
        raise EncodingError(f"{name} must be a dataset or a list of rows, but it is {type(rows).__name__}.")
    if isinstance(rows, Sized) and not len(rows):
        raise EncodingError(f"{name} has no rows. Pass at least one.")
    return rows


def with_lists(value: Any) -> Any:
    """Replace arrays of objects by lists, at every depth. pandas reads the lists in a Parquet file as such arrays."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [with_lists(each) for each in value]
    if isinstance(value, Mapping):
        return {name: with_lists(each) for name, each in value.items()}
    return [with_lists(each) for each in value] if isinstance(value, list) else value


def each_row(rows: Any) -> Iterator[Any]:
    """Iterate over the rows that [`as_rows`] returns, in order.

    A map-style dataset has `__len__` and `__getitem__`. Without `__iter__`, Python would go on until an `IndexError`, which
    such a dataset need not raise.
    """
    return iter(rows) if isinstance(rows, Dataset) else (rows[index] for index in range(len(rows)))
