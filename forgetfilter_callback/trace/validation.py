"""What is wrong with a trace on disk: `forgetfilter doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.encoded_rows import IGNORE_INDEX
from ..data.text_rows import encode_rows
from ..errors import TraceError
from .records import SESSIONS, Record, has_states
from .trace import Trace


class Findings(NamedTuple):
    """What [`validate_trace`] found, each with the file and what to do about it.

    Attributes:
        problems (`list[str]`): What is wrong.
        notes (`list[str]`): What may be meant.
    """

    problems: list[str]
    notes: list[str]


def validate_trace(folder: str | Path) -> Findings:
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
        for file in sorted((folder / "records").glob("*"))
        if not file.name.startswith(".") and file.name not in {record.file_name for record in trace.records()}
    ]
    found += _examine_rows(trace)
    for record in trace.records():
        its_problems, its_notes = _examine_record(trace, record)
        found, notes = found + its_problems, notes + its_notes
    its_problems, its_notes = _examine_sessions(trace)
    return Findings(found + its_problems, notes + its_notes)


def _examine_rows(trace: Trace) -> list[str]:
    if len(pc.unique(trace.rows.ids)) < len(trace.rows):
        return ["rows.parquet names a sample twice. Record anew."]
    # An id is a hash of what its row holds.
    rows = map(trace.rows.sample, range(len(trace.rows)))
    held = [{"input_ids": tokens, "labels": np.where(loss_mask, tokens, IGNORE_INDEX)} for tokens, loss_mask in rows]
    others = pc.not_equal(encode_rows(held, disable_tqdm=True).ids, trace.rows.ids).true_count
    if not others:
        return []
    return [f"rows.parquet: {others} of {len(held)} rows are not what their ids say. Restore the file, or record anew."]


def _examine_record(trace: Trace, record: Record) -> Findings:
    file = trace.folder / "records" / record.file_name
    again = "Delete it: the session's next run takes it anew."
    try:
        names = pq.read_table(file, page_checksum_verification=True).column_names
        losses = trace.token_losses(record)
        for column, read in (("state", trace.states), ("rouge1", trace.rouge1)):
            if column in names:
                read(record)
    except (OSError, TraceError, pa.ArrowException) as error:
        return Findings([f"{file}: {error} {again}"], [])
    notes = []
    unknown = int((~np.isfinite(losses)).sum())
    if unknown:
        notes.append(f"{file} has {unknown} losses that are not finite: the model diverged. Its samples are kept.")
    if has_states(record) and "state" not in names:
        notes.append(f"{file} has no states, which `smoothed` forgetting needs. Use another measure.")
    return Findings([], notes)


def _examine_sessions(trace: Trace) -> Findings:
    records = trace.records()
    found: list[str] = []
    problems: list[str] = []
    last_step = {entry["session"]: entry["max_steps"] for entry in trace.manifest["sessions"]}
    for session in SESSIONS:
        steps = [record.step for record in records if record.session == session]
        if steps and session in last_step and max(steps) < last_step[session]:
            found.append(
                f"{session} has no record of its end: the last one is at step {max(steps)} of {last_step[session]}. It was "
                "stopped (early, or by a crash). Finish it with `resume_from_checkpoint`, unless it was meant."
            )
        if session == "safety" and steps and min(steps) > 0:
            problems.append("S1+ has no record at step 0, which forgetting is measured from. Run the session anew.")
    if not records:
        found.append("There are no records yet.")
    return Findings(problems, found)
