"""Check the files of a trace, for `forgetfilter doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.encode_each import encode_each
from ..data.token_sample import Sample
from ..errors import TraceError
from ..measures.common import by_window
from ..utils.arrow_arrays import to_numpy
from ..utils.counted import counted, counted_of
from ..utils.row_numbers import describe_rows
from .lock_folder import is_locked
from .records import Record
from .trace import Trace


class Findings(NamedTuple):
    """The result of [`validate_trace`]. Each entry names a file and what to do.

    Attributes:
        problems (`list[str]`): Errors in the files.
        notes (`list[str]`): Facts that may be intended.
    """

    problems: list[str]
    notes: list[str]


def validate_trace(folder: str | Path) -> Findings:
    """Check every file of the trace in `folder`."""
    folder = Path(folder)
    try:
        trace = Trace.open(folder)
    except TraceError as error:
        return Findings([str(error)], [])
    records = trace.records()
    record_files = {record.file_name for record in records}
    temporary_files = [] if is_locked(folder) else sorted(folder.rglob(".*.tmp"))  # a running process writes its own
    notes = [
        f"{file} is an unfinished file of a process that has ended. Nothing reads it. Delete it."
        for file in temporary_files
    ]
    problems = [
        f"{file} is not a record: its name is not `<session>-<step>.parquet`. Move it elsewhere."
        for file in sorted((folder / "records").glob("*"))
        if not file.name.startswith(".") and file.name not in record_files
    ]
    problems += _check_rows(trace)
    for record in records:
        check = _check_record(trace, record)
        problems += check.problems
        notes += check.notes
    problems += _check_safety_session(trace)
    return Findings(problems, notes)


def _check_rows(trace: Trace) -> list[str]:
    if len(pc.unique(trace.rows.ids)) < len(trace.rows):
        return ["rows.parquet contains a sample id twice. Record the trace again into another folder."]
    # An id is a hash of its row.
    count = len(trace.rows)

    def sample(index: int) -> Sample:
        span = slice(trace.rows.offsets[index], trace.rows.offsets[index + 1])
        return Sample(trace.rows.tokens[span], trace.rows.loss_mask[span], trace.rows.attention_mask[span])

    encoded = encode_each(range(count), sample, count, max_length=None, disable_tqdm=True, known=trace.rows)
    changed = np.flatnonzero(to_numpy(pc.not_equal(encoded.ids, trace.rows.ids)))
    if not len(changed):
        return []
    return [
        f"rows.parquet: {counted_of(len(changed), count, 'row', 'do')} not match the stored ids ({describe_rows(changed)}). "
        "Restore the file, or record again."
    ]


def _check_record(trace: Trace, record: Record) -> Findings:
    file = trace.folder / "records" / record.file_name
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            columns = parquet.schema_arrow.names
            for index in range(parquet.num_row_groups):  # one at a time, to bound memory
                parquet.read_row_group(index)
        sample = trace.sample(record)
        not_finite_of = by_window(_count_not_finite, trace.rows.loss_offsets, trace.stored_losses(record))
        not_finite = int((not_finite_of if sample is None else not_finite_of[sample]).sum())
        for column, read in (("state", trace.states), ("rouge1", trace.rouge1)):
            if column in columns:
                read(record)
    except (OSError, TraceError, pa.ArrowException) as error:
        return Findings(
            [f"{file}: {error} Move it to another folder. The next run of the session records it again."], []
        )
    notes = []
    if sample is not None:
        total = counted(len(trace.rows), "row")
        notes.append(f"{file} holds {len(sample)} of {total}. For all of them, record with `record_base=True`.")
    if not_finite:
        notes.append(
            f"{file}: the loss of {counted(not_finite, 'token')} is not finite: the model diverged. The rows are kept."
        )
    if record == Record("safety", 0) and "state" not in columns:
        notes.append(
            f"{file} has no hidden states, which the measures combined and smoothed need. Use another measure."
        )
    return Findings([], notes)


def _count_not_finite(offsets: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """How many losses of each sample are not finite: shape `(samples,)`, integer."""
    return np.diff(np.concatenate([[0], np.cumsum(~np.isfinite(losses))])[offsets])


def _check_safety_session(trace: Trace) -> list[str]:
    steps = [record.step for record in trace.records() if record.session == "safety"]
    if not steps or min(steps) == 0:
        return []
    return ["The safety session has no record at step 0, which forgetting needs. Run the session again."]
