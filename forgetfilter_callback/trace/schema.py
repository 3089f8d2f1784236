"""The files of a trace, read and checked: what each must hold, and what is said where it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.encoded_rows import EncodedRows
from ..errors import TraceError


SCHEMA_VERSION = 1
_WAY_OUT = {
    "loss": "The file is not one of a record.",
    "rouge1": "Record with `ForgetTracker(rouge1=True)`.",
    "state": "An earlier version made it, or the model's output head cannot be reached. Use measure='pooled' or 'loss'.",
}
_MANIFEST: dict[str, type | UnionType] = {
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
_OF_AN_ENCODING = {"text_column", "completion_only_loss", "assistant_only_loss", "keep_end", "chat_template"}
_OF_A_SESSION = {"session": str, "output_dir": str, "max_steps": int}
_OF_ROWS = {"id": pa.string(), "input_ids": pa.large_list(pa.int32()), "loss_mask": pa.large_list(pa.bool_())}
_OF_RECORDS: dict[str, Callable[[pa.DataType], bool]] = {
    "loss": lambda kind: kind == pa.large_list(pa.float32()),
    "rouge1": lambda kind: kind == pa.float64(),
    "state": lambda kind: pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float16(),
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `manifest.json` holds.

    Raises:
        TraceError: if it cannot be read, lacks something, or a newer version wrote it.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TraceError(f"The trace in {folder} cannot be read: {error}") from error
    known = manifest if isinstance(manifest, dict) else {}
    known.setdefault("encoding", {})  # traces made before it was kept
    wrong = [key for key, kind in _MANIFEST.items() if key not in known or not isinstance(known[key], kind)]
    if "encoding" not in wrong and not known["encoding"].keys() <= _OF_AN_ENCODING:
        wrong.append("encoding")
    if "sessions" not in wrong and not all(_is_session(entry) for entry in known["sessions"]):
        wrong.append("sessions")
    if wrong:
        raise TraceError(
            f"manifest.json in {folder} lacks {', '.join(wrong)}, or has something else there. Restore it, or record anew."
        )
    if manifest["schema_version"] < 1:
        raise TraceError(f"manifest.json in {folder} names no schema version. Restore it, or record anew.")
    if manifest["schema_version"] > SCHEMA_VERSION:
        raise TraceError(
            f"The trace in {folder} was written by a newer forgetfilter-callback (schema {manifest['schema_version']}, this "
            f"one reads up to {SCHEMA_VERSION}). Upgrade forgetfilter-callback."
        )
    return manifest


def read_rows(folder: Path, manifest: dict[str, Any]) -> EncodedRows:
    """What `rows.parquet` holds.

    Raises:
        TraceError: if it cannot be read, has other columns, or is not the one that the manifest was written for.
    """
    try:
        table = pq.read_table(folder / "rows.parquet")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise TraceError(f"The trace in {folder} cannot be read: {error}") from error
    types = {name: table.schema.field(name).type for name in table.column_names}
    if {name: types.get(name) for name in _OF_ROWS} != _OF_ROWS or any(map(_has_gaps, table.columns)):
        raise TraceError(
            f"rows.parquet of the trace in {folder} does not have a trace's columns ({', '.join(_OF_ROWS)}), or has gaps in "
            "them. Restore the file, or record anew."
        )
    input_ids, loss_mask = (table[name].combine_chunks() for name in ("input_ids", "loss_mask"))
    rows = EncodedRows(
        ids=table["id"].combine_chunks(),
        tokens=input_ids.values.to_numpy(),
        loss_mask=loss_mask.values.to_numpy(zero_copy_only=False),
        offsets=input_ids.offsets.to_numpy(),
        truncated=manifest["truncated"],
    )
    found = {"fingerprint": rows.fingerprint, "samples": len(rows), "loss_tokens": int(rows.loss_mask.sum())}
    for name, value in found.items():
        if value != manifest[name]:
            raise TraceError(
                f"rows.parquet of the trace in {folder} is not the one its manifest was written for ({name} {value}, "
                f"manifest {manifest[name]}). Restore the file, or record anew."
            )
    return rows


def read_column(file: Path, column: str, rows: EncodedRows) -> Any:
    """One column of a record of `rows`.

    Raises:
        TraceError: if it cannot be read, is not there, or is of other data.
    """
    try:
        if column not in pq.read_schema(file).names:
            raise TraceError(f"The record {file} has no {column}. {_WAY_OUT[column]}")
        table = pq.read_table(file, columns=[column])
    except (OSError, pa.ArrowException) as error:
        raise TraceError(f"The record {file} cannot be read: {error}") from error
    if len(table) != len(rows):
        raise TraceError(f"The record {file} has {len(table)} samples, the trace {len(rows)}: it is of other data.")
    found = table[column].combine_chunks()
    if not _OF_RECORDS[column](found.type) or _has_gaps(found):
        raise TraceError(f"The record {file} has a {column} of another type, or gaps in it. {_WAY_OUT['loss']}")
    if column == "loss" and not np.array_equal(found.offsets.to_numpy(), rows.loss_offsets):
        raise TraceError(f"The record {file} does not have one loss for each counted token: it is of other data.")
    return found


def _is_session(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in _OF_A_SESSION.items())


def _has_gaps(column: pa.Array | pa.ChunkedArray) -> bool:
    nested = pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    return column.null_count > 0 or (nested and pc.list_flatten(column).null_count > 0)
