"""[`StoredColumn`]: the losses, states or scores of a record, read from its file in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.encoded_rows import EncodedRows
from ..errors import TraceError
from ..utils.arrow_arrays import to_numpy
from ..utils.atomic_files import file_version
from ..utils.counted import counted
from .schema import WITHOUT_STATES, has_nulls


_IS_TYPE: dict[str, Callable[[pa.DataType], bool]] = {
    "loss": lambda dtype: dtype == pa.large_list(pa.float32()),
    "rouge1": lambda dtype: dtype == pa.float64(),
    "state": lambda dtype: pa.types.is_fixed_size_list(dtype) and dtype.value_type == pa.float16(),
}
_DTYPES = {"loss": np.float32, "rouge1": np.float64, "state": np.float16}
# What to do if a record has no such column.
_ADVICE = {
    "loss": "The file is not a record of this library.",
    "rouge1": "Record with `ForgetTracker(rouge1=True)`.",
    "state": WITHOUT_STATES,
}


class StoredColumn:
    """One column of a record. A slice reads its values from the file, so that few of them are in memory.

    The file has one row group per window of rows. The values of the row group that was read last are kept, so that
    consecutive slices read each row group once.

    Args:
        file (`Path`):
            The Parquet file of the record.
        column (`str`):
            `"loss"`, `"state"` or `"rouge1"`.
        rows ([`EncodedRows`]):
            The rows of the trace.

    Raises:
        TraceError: if the file cannot be read, if the column is missing, or if it does not match the rows. A slice raises
            it too.
    """

    def __init__(self, file: Path, column: str, rows: EncodedRows):
        self._file, self._column, self._loss_offsets = file, column, rows.loss_offsets
        self._version = file_version(file)
        with self._open() as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
            if column not in schema.names:
                raise TraceError(f"The record {file} has no column {column!r}. {_ADVICE[column]}")
            if metadata.num_rows != len(rows):
                count = counted(metadata.num_rows, "row")
                raise TraceError(f"The record {file} has {count}, but the trace has {len(rows):,}.")
            dtype = schema.field(column).type
            if not _IS_TYPE[column](dtype):
                raise self._wrong_type()
            self._shape = (dtype.list_size,) if column == "state" else ()
            counts = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        self._rows = np.cumsum([0, *counts])  # the sample at which each row group starts
        self._starts = self._loss_offsets[self._rows] if column == "loss" else self._rows
        self._last = -1, np.zeros(0)

    def __getitem__(self, span: slice) -> np.ndarray:
        """Losses of tokens, states of samples or scores of samples, in order. Read-only."""
        start, stop, _ = span.indices(int(self._starts[-1]))
        values = np.empty((max(stop - start, 0), *self._shape), _DTYPES[self._column])
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for index in range(first, int(np.searchsorted(self._starts, stop))):
            group_start, group_stop = self._starts[index], self._starts[index + 1]
            from_, to = max(start, group_start), min(stop, group_stop)
            values[from_ - start : to - start] = self._row_group(index)[from_ - group_start : to - group_start]
        values.setflags(write=False)
        return values

    def _row_group(self, index: int) -> np.ndarray:
        """Values are copied out of Arrow, because its memory pool keeps what it has freed."""
        if self._last[0] != index:
            self._last = -1, np.zeros(0)  # freed before the next one is read
            with self._open() as parquet:
                part = parquet.read_row_group(index, [self._column])[self._column].combine_chunks()
            if has_nulls(part):
                raise self._wrong_type()
            loss_offsets = self._loss_offsets[self._rows[index] : self._rows[index + 1] + 1]
            if self._column == "loss" and not np.array_equal(to_numpy(part.offsets), loss_offsets - loss_offsets[0]):
                raise TraceError(f"The record {self._file} does not have one loss per loss token of the trace.")
            flat = to_numpy(part if self._column == "rouge1" else part.values)
            self._last = index, flat.reshape(-1, *self._shape).copy()
        return self._last[1]

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        """Open the file for one read only: a file that stays open cannot be replaced on Windows."""
        try:
            with pq.ParquetFile(self._file) as parquet:
                if file_version(self._file) != self._version:  # another process records again
                    raise TraceError(f"The record {self._file} was replaced while it was read. Run this again.")
                yield parquet
        except (OSError, pa.ArrowException) as error:
            raise TraceError(f"The record {self._file} cannot be read: {error}") from error

    def _wrong_type(self) -> TraceError:
        return TraceError(f"The column {self._column!r} of the record {self._file} has a wrong type or missing values.")
