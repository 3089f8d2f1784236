"""The schema of a trace's files: read them and check that they contain what they must."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.encoded_rows import EncodedRows
from ..data.token_buffers import TokenBuffers
from ..errors import TraceError
from ..utils.arrow_arrays import to_numpy
from .trace_folder import find_trace_folder


if TYPE_CHECKING:
    from ..scoring.scores import Scores

SCHEMA_VERSION = 2
# The column of a record that holds only a sample of the rows: whether a row is in it. The losses of all others are NaN.
IN_SAMPLE = "in_sample"
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
# `eos_token` is missing in traces of older versions.
_ENCODING_KEYS = {
    "text_column", "completion_only_loss", "assistant_only_loss", "keep_end", "chat_template", "eos_token",
}  # fmt: skip
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
WITHOUT_STATES = (
    "The input of the model's output head could not be read, so there are no hidden states. The measures combined (the "
    "default) and smoothed need them, and so do reviews (`ReviewQueue`, `forgetfilter review`). Use the measure pooled or "
    "loss, for example `measure='pooled'`."
)


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


def check_new_folder(folder: Path, rows: EncodedRows) -> None:
    """Check that a new trace of `rows` in `folder` would overwrite nothing.

    Raises:
        TraceError: if `folder` contains a trace or files of another, or if it is the output folder of a run with a trace.
    """
    if find_trace_folder(folder) != folder:
        raise TraceError(
            f"{folder} is the output folder of a run, whose trace is in {find_trace_folder(folder)}. Pass that folder to "
            "continue the trace, or choose another folder for a new one."
        )
    if (folder / "manifest.json").is_file():
        raise TraceError(f"{folder} already contains a trace. Continue it, or choose another folder.")
    if any((folder / "records").glob("*.parquet")):
        raise TraceError(f"{folder} has records, but no manifest.json. Restore it, or choose another folder.")
    if not _is_new_or_has_rows(folder / "rows.parquet", rows):
        raise TraceError(f"{folder} has a rows.parquet of other rows, which would be lost. Choose another folder.")


def _is_new_or_has_rows(file: Path, rows: EncodedRows) -> bool:
    """Whether `rows.parquet` does not exist, or holds `rows`: a crash has prevented the manifest from being written."""
    if not file.exists():
        return True
    try:
        with pq.ParquetFile(file) as parquet:
            return bool(parquet.read(["id"])["id"].combine_chunks().equals(rows.ids))
    except (OSError, KeyError, pa.ArrowException):
        return False


def record_tables(
    rows: EncodedRows,
    scores: Iterable[Scores],
    completions: Sequence[str] | None,
    rouge1: np.ndarray | None,
    sample: np.ndarray | None,
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
        if sample is not None:
            columns[IN_SAMPLE] = pa.array(np.isin(np.arange(start, stop), sample))
        start = stop
        yield pa.table(columns)


def read_rows(folder: Path, manifest: dict[str, Any]) -> EncodedRows:
    """Read and check `rows.parquet`.

    Raises:
        TraceError: if it cannot be read, if its columns are wrong, or if it does not match the manifest.
    """
    wrong_columns = TraceError(
        f"rows.parquet in {folder} must have the columns {', '.join(_ROW_TYPES)} without missing values. Restore the "
        "file, or record the trace again into another folder."
    )
    buffers, ids, lengths = TokenBuffers(), [], []
    try:
        with pq.ParquetFile(folder / "rows.parquet") as parquet:  # `read_table` would import pandas
            types = {field.name: field.type for field in parquet.schema_arrow}
            # In traces of older versions, no row has padding and there is no mask.
            expected = {name: dtype for name, dtype in _ROW_TYPES.items() if name in types or name != "attention_mask"}
            if {name: types.get(name) for name in expected} != expected:
                raise wrong_columns
            for index in range(parquet.num_row_groups):  # decoding takes several times the memory of the values
                table = parquet.read_row_group(index, list(expected))
                if any(map(has_nulls, table.columns)):
                    raise wrong_columns
                columns = {name: table[name].combine_chunks() for name in expected}
                lists = {name: columns[name].values for name in expected if name != "id"}
                ids.append(columns["id"])
                lengths.append(np.diff(to_numpy(columns["input_ids"].offsets)))
                attention = lists.get("attention_mask")
                is_padded = attention is not None and not pc.all(attention, min_count=0).as_py()
                buffers.append(
                    to_numpy(lists["input_ids"]).tobytes(),
                    to_numpy(lists["loss_mask"]).tobytes(),
                    to_numpy(attention).tobytes() if is_padded else None,
                )
    except TraceError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise TraceError(f"The trace in {folder} cannot be read: {error}") from error
    tokens, loss_mask, attention_mask = buffers.arrays()
    rows = EncodedRows(
        ids=pa.chunked_array(ids, pa.string()).combine_chunks(),
        tokens=tokens,
        loss_mask=loss_mask,
        attention_mask=attention_mask,
        offsets=np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64),
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


def has_column(file: Path, column: str) -> bool:
    """Whether a record has a column. Only the schema is read.

    Raises:
        TraceError: if the record cannot be read.
    """
    try:
        return column in pq.read_schema(file).names
    except (OSError, pa.ArrowException) as error:
        raise TraceError(f"The record {file} cannot be read: {error}") from error


def sampled_rows(file: Path) -> np.ndarray | None:
    """The numbers of the rows that a record holds. `None` if it holds all.

    Raises:
        TraceError: if the record cannot be read.
    """
    if not has_column(file, IN_SAMPLE):
        return None
    with pq.ParquetFile(file) as parquet:
        in_sample: np.ndarray = to_numpy(parquet.read([IN_SAMPLE])[IN_SAMPLE].combine_chunks())
    return np.flatnonzero(in_sample)


def _is_session(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), dtype) for key, dtype in _SESSION_TYPES.items())


def has_nulls(column: pa.Array | pa.ChunkedArray) -> bool:
    """Whether a column, or a list in it, has a missing value."""
    nested = pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    return column.null_count > 0 or (nested and pc.list_flatten(column).null_count > 0)
