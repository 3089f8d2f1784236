"""The schema of a trace's files: read them and check that they contain what they must."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.encoded_rows import EncodedRows, without_padding
from ..errors import TraceError
from ..utils.arrow_arrays import to_numpy
from ..utils.counted import counted


if TYPE_CHECKING:
    from ..scoring.scores import Scores

SCHEMA_VERSION = 2
_MANIFEST_TYPES: dict[str, type | UnionType] = {
    "schema_version": int,
    "fingerprint": str,
    "samples": int,
    "loss_tokens": int,
    "truncated": int,
    "model": str,
    "tokenizer": str | None,
    "max_length": int | None,
    "encoding": dict,
    "versions": dict,
    "sessions": list,
}
_ENCODING_KEYS = {"text_column", "completion_only_loss", "assistant_only_loss", "keep_end", "chat_template"}
# `training_rows` is missing in traces of older versions.
_SESSION_TYPES: dict[str, type | UnionType] = {
    "session": str,
    "output_dir": str,
    "max_steps": int,
    "training_rows": str | None,
}
_ROW_TYPES = {
    "id": pa.string(),
    "input_ids": pa.large_list(pa.int32()),
    "loss_mask": pa.large_list(pa.bool_()),
    "attention_mask": pa.large_list(pa.bool_()),
}
_IS_RECORD_TYPE: dict[str, Callable[[pa.DataType], bool]] = {
    "loss": lambda dtype: dtype == pa.large_list(pa.float32()),
    "rouge1": lambda dtype: dtype == pa.float64(),
    "state": lambda dtype: pa.types.is_fixed_size_list(dtype) and dtype.value_type == pa.float16(),
}
_RECORD_DTYPES = {"loss": np.float32, "rouge1": np.float64, "state": np.float16}
WITHOUT_STATES = (
    "The input of the model's output head could not be read, so there are no hidden states. The measures combined (the "
    "default) and smoothed need them, and so do reviews (`ReviewQueue`, `forgetfilter review`). Use the measure pooled or "
    "loss: `FilterConfig(measure='pooled')`."
)
# What to do if a record has no such column.
_ADVICE = {
    "loss": "The file is not a record of this library.",
    "rouge1": "Record with `ForgetTracker(rouge1=True)`.",
    "state": WITHOUT_STATES,
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check `manifest.json`.

    Raises:
        TraceError: if it cannot be read, if a key is missing or has the wrong type, or if another version of the library
            wrote it.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TraceError(f"The trace in {folder} cannot be read: {error}") from error
    content = manifest if isinstance(manifest, dict) else {}
    schema_version = content.get("schema_version")
    if isinstance(schema_version, int) and schema_version > SCHEMA_VERSION:
        raise TraceError(
            f"The trace in {folder} was written by a newer forgetfilter-callback (schema {schema_version}; this version "
            f"reads schema {SCHEMA_VERSION}). Upgrade forgetfilter-callback."
        )
    if schema_version == 1:
        raise TraceError(
            f"The trace in {folder} was written by an older forgetfilter-callback (schema 1; this version reads schema "
            f"{SCHEMA_VERSION}). Record it again into another folder."
        )
    wrong = [key for key, dtype in _MANIFEST_TYPES.items() if not isinstance(content.get(key, ...), dtype)]
    if "encoding" not in wrong and not content["encoding"].keys() <= _ENCODING_KEYS:
        wrong.append("encoding")
    if "sessions" not in wrong and not all(_is_session(entry) for entry in content["sessions"]):
        wrong.append("sessions")
    if "schema_version" not in wrong and schema_version != SCHEMA_VERSION:
        wrong.append("schema_version")
    if wrong:
        raise TraceError(
            f"In manifest.json in {folder}, these keys are missing or have a wrong value: {', '.join(wrong)}. Restore the "
            "file, or record the trace again into another folder."
        )
    return content


def rows_table(rows: EncodedRows) -> pa.Table:
    """Return the table of `rows.parquet`."""
    columns = {"input_ids": rows.tokens, "loss_mask": rows.loss_mask, "attention_mask": rows.attention_mask}
    offsets = pa.array(rows.offsets)
    lists = {name: pa.LargeListArray.from_arrays(offsets, pa.array(values)) for name, values in columns.items()}
    return pa.table({"id": rows.ids, **lists})


def is_new_or_has_rows(file: Path, rows: EncodedRows) -> bool:
    """Whether `rows.parquet` does not exist, or holds `rows`: a crash has prevented the manifest from being written."""
    if not file.exists():
        return True
    try:
        with pq.ParquetFile(file) as parquet:
            return bool(parquet.read(["id"])["id"].combine_chunks().equals(rows.ids))
    except (OSError, KeyError, pa.ArrowException):
        return False


def record_tables(
    rows: EncodedRows, scores: Iterable[Scores], completions: Sequence[str] | None, rouge1: np.ndarray | None
) -> Iterator[pa.Table]:
    """Yield the table of a record, one window of rows at a time. See [`Trace.append`] for the arguments."""
    start = 0
    for window, scored in zip(rows.windows(), scores, strict=True):
        columns = {"loss": pa.LargeListArray.from_arrays(pa.array(window.loss_offsets), pa.array(scored.losses))}
        if scored.states is not None:
            flat = pa.array(scored.states.reshape(-1))
            columns["state"] = pa.FixedSizeListArray.from_arrays(flat, scored.states.shape[1])
        stop = start + len(window)
        if completions is not None and rouge1 is not None:
            columns["completion"] = pa.array(completions[start:stop], pa.large_string())
            columns["rouge1"] = pa.array(rouge1[start:stop])
        start = stop
        yield pa.table(columns)


def read_rows(folder: Path, manifest: dict[str, Any]) -> EncodedRows:
    """Read and check `rows.parquet`.

    Raises:
        TraceError: if it cannot be read, if its columns are wrong, or if it does not match the manifest.
    """
    try:
        with pq.ParquetFile(folder / "rows.parquet") as parquet:  # `read_table` would import pandas
            table = _read_table(parquet)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise TraceError(f"The trace in {folder} cannot be read: {error}") from error
    types = {name: table.schema.field(name).type for name in table.column_names}
    is_older = "attention_mask" not in types  # no row has padding
    expected = {name: dtype for name, dtype in _ROW_TYPES.items() if not is_older or name != "attention_mask"}
    if {name: types.get(name) for name in expected} != expected or any(map(_has_nulls, table.columns)):
        raise TraceError(
            f"rows.parquet in {folder} must have the columns {', '.join(_ROW_TYPES)} without missing values. Restore the "
            "file, or record the trace again into another folder."
        )
    input_ids, loss_mask = (table[name].combine_chunks() for name in ("input_ids", "loss_mask"))
    attention_mask = without_padding(len(input_ids.values))
    if not is_older:
        stored = table["attention_mask"].combine_chunks().values
        if not pc.all(stored, min_count=0).as_py():
            attention_mask = to_numpy(stored)
    rows = EncodedRows(
        ids=table["id"].combine_chunks(),
        tokens=to_numpy(input_ids.values),
        loss_mask=to_numpy(loss_mask.values),
        attention_mask=attention_mask,
        offsets=to_numpy(input_ids.offsets),
        truncated=manifest["truncated"],
        max_length=manifest["max_length"],
        encoding=manifest["encoding"],
    )
    found = {"fingerprint": rows.fingerprint, "samples": len(rows), "loss_tokens": int(rows.loss_mask.sum())}
    for name, value in found.items():
        if value != manifest[name]:
            raise TraceError(
                f"rows.parquet in {folder} does not match manifest.json: {name} is {value}, but the manifest says "
                f"{manifest[name]}. Restore the file, or record the trace again into another folder."
            )
    return rows


def read_column(file: Path, column: str, rows: EncodedRows) -> np.ndarray:
    """Read and check one column of a record.

    Values are copied out of Arrow one row group at a time. Its decoder takes several times the memory of the values, and its
    memory pool keeps what it has freed.

    Args:
        file (`Path`):
            The Parquet file of the record.
        column (`str`):
            `"loss"`, `"state"` or `"rouge1"`.
        rows ([`EncodedRows`]):
            The rows of the trace.

    Returns:
        `np.ndarray`: the values of all samples in order, without the boundaries of lists. Read-only.

    Raises:
        TraceError: if the file cannot be read, if the column is missing, or if it does not match the rows.
    """
    wrong_type = TraceError(f"The column {column!r} of the record {file} has a wrong type or missing values.")
    try:
        with pq.ParquetFile(file) as parquet:
            schema, count = parquet.schema_arrow, parquet.metadata.num_rows
            if column not in schema.names:
                raise TraceError(f"The record {file} has no column {column!r}. {_ADVICE[column]}")
            if count != len(rows):
                raise TraceError(f"The record {file} has {counted(count, 'sample')}, but the trace has {len(rows):,}.")
            dtype = schema.field(column).type
            if not _IS_RECORD_TYPE[column](dtype):
                raise wrong_type
            width = dtype.list_size if column == "state" else 1
            size = int(rows.loss_offsets[-1]) if column == "loss" else count * width
            values = np.empty(size, _RECORD_DTYPES[column])
            row = position = 0
            for index in range(parquet.num_row_groups):
                part = parquet.read_row_group(index, [column])[column].combine_chunks()
                if _has_nulls(part):
                    raise wrong_type
                loss_offsets = rows.loss_offsets[row : row + len(part) + 1]
                if column == "loss" and not np.array_equal(to_numpy(part.offsets), loss_offsets - loss_offsets[0]):
                    raise TraceError(f"The record {file} does not have one loss per loss token of the trace.")
                flat = to_numpy(part if column == "rouge1" else part.values)
                values[position : position + len(flat)] = flat
                row, position = row + len(part), position + len(flat)
    except (OSError, pa.ArrowException) as error:
        raise TraceError(f"The record {file} cannot be read: {error}") from error
    values.setflags(write=False)
    return values


def has_column(file: Path, column: str) -> bool:
    """Whether a record has a column. Only the schema is read."""
    return column in pq.read_schema(file).names


def _read_table(parquet: pq.ParquetFile) -> pa.Table:
    """Read one row group at a time, because decoding takes several times the memory of the values."""
    return pa.concat_tables(parquet.read_row_group(index) for index in range(parquet.num_row_groups))


def _is_session(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), dtype) for key, dtype in _SESSION_TYPES.items())


def _has_nulls(column: pa.Array | pa.ChunkedArray) -> bool:
    nested = pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    return column.null_count > 0 or (nested and pc.list_flatten(column).null_count > 0)
