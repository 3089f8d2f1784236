"""What is wrong with a trace on disk: `forgetfilter doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .recorder import has_states
from .trace import SESSIONS, Record, Trace, TraceError


class Findings(NamedTuple):
    """What [`examine`] found, each with the file and what to do about it.

    Attributes:
        problems (`list[str]`): What is wrong.
        notes (`list[str]`): What may be meant.
    """

    problems: list[str]
    notes: list[str]


def examine(folder: str | Path) -> Findings:
    """Looks at every file of the trace in `folder`."""
    folder = Path(folder)
    try:
        trace = Trace.open(folder)
    except TraceError as error:
        return Findings([str(error)], [])
    notes = [
        f"{file} was being written when the process ended. Nothing reads it; delete it."
        for file in sorted(folder.rglob(".*.tmp"))
    ]
    found = [
        f"{file} is no record: its name is not `<session>-<step>.parquet`. Move it elsewhere."
        for file in sorted((folder / "records").iterdir())
        if not file.name.startswith(".") and file.name not in {record.file_name for record in trace.records()}
    ]
    if len(pc.unique(trace.rows.ids)) < len(trace.rows):
        found.append("rows.parquet names a sample twice. Record anew.")
    for record in trace.records():
        its_problems, its_notes = _examine_record(trace, record)
        found, notes = found + its_problems, notes + its_notes
    return Findings(found, notes + _examine_sessions(trace))


def _examine_record(trace: Trace, record: Record) -> Findings:
    file = trace.folder / "records" / record.file_name
    again = "Delete it: the session's next run takes it anew."
    try:
        table = pq.read_table(file)
        losses = table["loss"].combine_chunks()
    except (OSError, KeyError, pa.ArrowException) as error:
        return Findings([f"{file} cannot be read ({error}). {again}"], [])
    if len(table) != len(trace.rows) or not np.array_equal(losses.offsets.to_numpy(), trace.rows.counted_offsets):
        return Findings([f"{file} is of other rows: {len(table)} samples, or other tokens that count. {again}"], [])
    notes = []
    unknown = int((~np.isfinite(losses.values.to_numpy())).sum())
    if unknown:
        notes.append(f"{file} has {unknown} losses that are not finite: the model diverged. Its samples are kept.")
    if has_states(record) and "state" not in table.column_names:
        notes.append(f"{file} has no states, which `smoothed` forgetting needs. Use another measure.")
    return Findings([], notes)


def _examine_sessions(trace: Trace) -> list[str]:
    records = trace.records()
    found = []
    last_step = {entry["session"]: entry["max_steps"] for entry in trace.manifest["sessions"]}
    for session in SESSIONS:
        steps = [record.step for record in records if record.session == session]
        if steps and session in last_step and max(steps) < last_step[session]:
            found.append(
                f"{session} has no record of its end: the last one is at step {max(steps)} of {last_step[session]}. It was "
                "stopped (early, or by a crash). Finish it with `resume_from_checkpoint`, unless it was meant."
            )
        if session == "S1+" and steps and min(steps) > 0:
            found.append("S1+ has no record at step 0, which forgetting is measured from. Run the session anew.")
    if not records:
        found.append("There are no records yet.")
    return found
