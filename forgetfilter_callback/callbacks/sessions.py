"""Tell noisy finetuning from safety finetuning by the rows a run trains on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow.compute as pc
from accelerate.logging import get_logger

from ..data.encoded_rows import EncodedRows
from ..errors import TraceError
from ..trace.records import Record, Session
from ..trace.trace import Trace


logger = get_logger(__name__)

SessionArgument = Literal["auto", "noisy", "safety"]

# A run is the noisy session if it trains on at least this fraction of the noisy set, and if these rows are more than this
# fraction of its training set. (A safety set may contain some rows of the noisy set.)
MIN_OVERLAP = 0.5


@dataclass(frozen=True)
class DetectedSession:
    """Which session a training run is.

    Attributes:
        session (`"noisy"` or `"safety"`):
            The session.
        overlap (`int`):
            How many rows of the training set are in the noisy set; 0 if the training set could not be encoded.
        certain (`bool`):
            Whether the user named the session, or the training set is exactly the noisy set.
    """

    session: Session
    overlap: int
    certain: bool


def detect_session(
    requested: SessionArgument, training_rows: EncodedRows | None, noisy_rows: EncodedRows
) -> DetectedSession:
    """Tell noisy finetuning from safety finetuning by the rows a run trains on.

    Args:
        requested (`"auto"`, `"noisy"` or `"safety"`):
            The session the user named, or `"auto"`.
        training_rows ([`EncodedRows`], *optional*):
            The training set. `None` if it cannot be encoded row by row, which means safety finetuning.
        noisy_rows ([`EncodedRows`]):
            The noisy set.

    Raises:
        TraceError: if the run trains on the texts of the noisy set with another loss mask.
    """
    overlap = 0 if training_rows is None else count_overlap(training_rows, noisy_rows)
    if requested != "auto":
        return DetectedSession(requested, overlap, certain=True)
    if training_rows is None:
        return DetectedSession("safety", overlap, certain=False)
    if overlap == len(training_rows) == len(noisy_rows):
        return DetectedSession("noisy", overlap, certain=True)
    if overlap >= MIN_OVERLAP * len(noisy_rows):
        if overlap > MIN_OVERLAP * len(training_rows):
            return DetectedSession("noisy", overlap, certain=False)
    elif _count_same_tokens(noisy_rows, training_rows) >= MIN_OVERLAP * len(noisy_rows):
        raise TraceError(
            "This run trains on the texts of the noisy set, but with a loss on other tokens than in the rows that were "
            "given to the tracker. Give the tracker the rows as the trainer uses them (`input_ids` and `labels`), or use "
            "`ForgetTracker()` without rows."
        )
    return DetectedSession("safety", overlap, certain=False)


def check_session(
    detected: DetectedSession,
    training_rows: EncodedRows | None,
    trace: Trace,
    records: Sequence[Record],
    *,
    output_dir: str,
    already_recorded: bool,
    resumed: bool,
) -> None:
    """Refuse a session that does not fit the trace. Warn about noisy rows in the safety set.

    Args:
        detected ([`DetectedSession`]):
            The session that begins.
        training_rows ([`EncodedRows`], *optional*):
            Its training set, if it could be encoded.
        trace ([`Trace`]):
            The trace.
        records (`Sequence[Record]`):
            The records of the trace, as the main process sees them.
        output_dir (`str`):
            Output folder of the run.
        already_recorded (`bool`):
            Whether this tracker has recorded the whole session before.
        resumed (`bool`):
            Whether the run resumes from a checkpoint.

    Raises:
        TraceError: if the session was recorded already, or if records would be replaced because of a guess.
    """
    session = detected.session
    if already_recorded:
        raise TraceError(
            f"This tracker has already recorded a {session} session (in {trace.folder}). A tracker records at most "
            "one noisy and one safety session. Create a new ForgetTracker with another `trace_dir` or `output_dir`. If this "
            f"run is the other session of the same trace, use `ForgetTracker(trace_dir={str(trace.folder)!r}, session=...)`."
        )
    # Repeating a session supersedes its records, which must not happen because of a guess. A run that resumes its own
    # session, or repeats a safety session in the same output folder, is no guess.
    output_dirs = {entry["session"]: entry["output_dir"] for entry in trace.manifest["sessions"]}
    is_same_run = session == "safety" and output_dirs.get("safety") == os.path.abspath(output_dir)
    is_guess = not detected.certain and not resumed and not is_same_run
    if is_guess and any(record.session == session for record in records):
        raise TraceError(
            f"The trace in {trace.folder} already has records of the {session} session, and it is not certain that this run "
            f"repeats it: it trains on {detected.overlap} of the {len(trace.rows)} tracked rows. Pass "
            "`ForgetTracker(session='noisy')` or `ForgetTracker(session='safety')`, or choose another `trace_dir`."
        )
    if session == "safety" and training_rows is not None and detected.overlap:
        logger.warning(
            f"{detected.overlap} of the {len(training_rows)} rows of the safety set are in the noisy set too. The model "
            "trains on them again, so it cannot forget them. Remove them from the safety set."
        )


def warn_if_noisy_session_is_unfinished(trace: Trace, records: Sequence[Record]) -> None:
    """Warn if a safety session begins when the noisy session has only its first record."""
    if not any(record.session == "noisy" and record.step > 0 for record in records):
        logger.warning(
            f"This run is treated as safety finetuning, but the trace in {trace.folder} has only the first record of the "
            "noisy session: it was interrupted, or it trained on other rows. Finish the noisy session first, or choose "
            "another `trace_dir` or `output_dir`."
        )


def count_overlap(rows: EncodedRows, other_rows: EncodedRows) -> int:
    """Number of `rows` that are among `other_rows`, with the same loss mask."""
    return pc.is_in(rows.ids, value_set=other_rows.ids).true_count


def _count_same_tokens(rows: EncodedRows, other_rows: EncodedRows) -> int:
    """Number of `rows` that have the tokens of one of `other_rows`, with any loss mask."""

    def token_hashes(encoded: EncodedRows) -> np.ndarray:
        hashes = (hash(encoded.sample(index)[0].tobytes()) for index in range(len(encoded)))
        return np.fromiter(hashes, np.int64, len(encoded))

    return int(np.isin(token_hashes(rows), token_hashes(other_rows)).sum())
