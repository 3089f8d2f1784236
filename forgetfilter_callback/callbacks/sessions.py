"""Tell noisy finetuning from safety finetuning by the rows a run trains on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import pyarrow.compute as pc
from accelerate.logging import get_logger
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..data.encode_text import truncate_rows
from ..data.encoded_rows import WINDOW, EncodedRows, content_hashes
from ..errors import TraceError
from ..trace.records import Record, Session
from ..trace.trace import Trace
from ..utils.counted import counted, counted_of


logger = get_logger(__name__)

SessionArgument = Literal["auto", "noisy", "safety"]

# A run is the noisy session if it trains on at least this fraction of the noisy set, and if these rows are more than this
# fraction of its training set, which may contain them several times. (A safety set may contain some rows of the noisy set.)
MIN_OVERLAP = 0.5

_WHY_NOT_FOUND = (
    "the tracker and the trainer encode the rows differently. The usual causes are an EOS token that only one of them adds, "
    "and another chat template, max_length or tokenizer. Give the tracker the rows that the trainer trains on (`input_ids` "
    "and `labels`), or use `ForgetTracker()` without rows"
)


def has_smaller_batch(args: TrainingArguments, state: TrainerState, earlier_batch_size: int) -> bool:
    """Whether `auto_find_batch_size` has started a trainer again, with a smaller batch than at its earlier start."""
    return args.auto_find_batch_size and cast(int, state.train_batch_size) < earlier_batch_size


@dataclass(frozen=True, eq=False)
class RunningSession:
    """The session that a tracker is recording.

    Attributes:
        session (`"noisy"` or `"safety"`):
            The session.
        control ([`~transformers.TrainerControl`]):
            Of its trainer. It identifies the trainer.
        batch_size (`int`):
            The training batch size of its current attempt.
    """

    session: Session
    control: TrainerControl
    batch_size: int

    def is_retried(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> bool:
        """Whether a training run that begins is the same run again, with the smaller batch of `auto_find_batch_size`.

        Otherwise the earlier run has ended with an error or an interrupt, and its trainer may have been changed since.
        """
        return control is self.control and has_smaller_batch(args, state, self.batch_size)


@dataclass(frozen=True)
class DetectedSession:
    """Which session a training run is.

    Attributes:
        session (`"noisy"` or `"safety"`):
            The session.
        overlap (`int`):
            How many rows of the noisy set are in the training set; 0 if the training set could not be encoded.
        certain (`bool`):
            Whether the user named the session, or the training set is exactly the noisy set.
    """

    session: Session
    overlap: int
    certain: bool


def detect_session(
    requested: SessionArgument, training_rows: EncodedRows | None, noisy_rows: EncodedRows, keep_end: bool = False
) -> DetectedSession:
    """Tell noisy finetuning from safety finetuning by the rows a run trains on.

    Args:
        requested (`"auto"`, `"noisy"` or `"safety"`):
            The session the user named, or `"auto"`.
        training_rows ([`EncodedRows`], *optional*):
            The training set. `None` if it cannot be encoded row by row, which means safety finetuning.
        noisy_rows ([`EncodedRows`]):
            The noisy set. It is compared as if it had been truncated as the training set was.
        keep_end (`bool`, defaults to `False`):
            Whether the training set was truncated on the left instead of the right.

    Raises:
        TraceError: if the run trains on the texts of the noisy set with another loss mask.
    """
    overlap = 0
    if training_rows is not None:
        noisy_rows = truncate_rows(noisy_rows, training_rows.max_length, keep_end)
        overlap = count_overlap(training_rows, noisy_rows)
    if requested != "auto":
        return DetectedSession(requested, overlap, certain=True)
    if training_rows is None:
        return DetectedSession("safety", overlap, certain=False)
    if overlap == len(training_rows) == len(noisy_rows):
        return DetectedSession("noisy", overlap, certain=True)
    if overlap >= MIN_OVERLAP * len(noisy_rows):
        if _count_with_copies(training_rows, noisy_rows) > MIN_OVERLAP * len(training_rows):
            return DetectedSession("noisy", overlap, certain=False)
    elif _count_same_tokens(noisy_rows, training_rows) >= MIN_OVERLAP * len(noisy_rows):
        raise TraceError(
            "This run trains on the texts of the noisy set, but with a loss on other tokens than in the rows that were "
            "given to the tracker. Give the tracker the rows as the trainer uses them (`input_ids` and `labels`), or use "
            "`ForgetTracker()` without rows."
        )
    return DetectedSession("safety", overlap, certain=False)


def describe_session(detected: DetectedSession, training_rows: EncodedRows | None, rows: EncodedRows) -> str:
    """Say which session begins and, if its training set is known, on how many of the tracked `rows` it trains."""
    text = f"{detected.session} session."
    if training_rows is None:
        return text
    tracked = counted(len(rows), "tracked row")
    if detected.session == "safety" and not detected.overlap:
        return f"{text} It trains on none of the {tracked}, as it should."
    return f"{text} It trains on {detected.overlap:,} of {tracked}."


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
    """Refuse a session that does not fit the trace. Warn about noisy rows in the safety set, and about tracked rows that
    are not found in a training set.

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
        TraceError: if the tracker has recorded the session already, or if records would be replaced because of a guess.
    """
    session = detected.session
    tracked = counted(len(trace.rows), "tracked row")
    is_guessed_safety = session == "safety" and not detected.certain
    lacks_noisy_session = is_guessed_safety and not _has_noisy_session(trace, records)
    explanation = ""
    if lacks_noisy_session:
        explanation = (
            f" The trace has no noisy session: no run trained on most of the {tracked}. If the earlier run was noisy "
            f"finetuning, {_WHY_NOT_FOUND}, and run both sessions again with another `trace_dir` or `output_dir`."
        )
    if already_recorded:
        raise TraceError(
            f"This tracker has already recorded a {session} session (in {trace.folder}).{explanation} A tracker records at "
            "most one noisy and one safety session. To train without recording, call `trainer.remove_callback(tracker)`. To "
            "record this run, create a new ForgetTracker with another `trace_dir` or `output_dir`. If this run is the "
            f"other session of the same trace, use `ForgetTracker(trace_dir={str(trace.folder)!r}, session=...)`."
        )
    # Repeating or resuming a session supersedes records, which must not happen because of a guess.
    recorded = any(record.session == session for record in records)
    if recorded and not detected.certain and not _is_same_run(trace, session, training_rows, output_dir, resumed):
        reason = "its rows could not be encoded"
        if training_rows is not None:
            other = "rows that cannot be compared with those of the earlier run"
            if any(_recorded_rows(trace, session)):
                other = "other rows"
            reason = f"it trains on {other}, with {detected.overlap:,} of {tracked} among them"
        verb = "resumes" if resumed else "repeats"
        raise TraceError(
            f"The trace in {trace.folder} already has records of the {session} session, and it is not certain that this "
            f"run {verb} it: {reason}.{explanation} Pass `ForgetTracker(session='noisy')` or "
            "`ForgetTracker(session='safety')`, or choose another `trace_dir`."
        )
    if lacks_noisy_session and training_rows is not None and not detected.overlap:
        logger.warning(
            f"This run trains on 0 of {tracked}, so it is treated as safety finetuning of a model that has learned them "
            "already. If that is right, pass `session='safety'`; this warning then does not appear. If it is noisy "
            f"finetuning, {_WHY_NOT_FOUND}."
        )
    if session == "noisy" and training_rows is not None and detected.overlap < MIN_OVERLAP * len(trace.rows):
        logger.warning(
            f"This noisy session trains on {detected.overlap:,} of {tracked}, so the others cannot be learned. Give the "
            "tracker the rows that the trainer trains on."
        )
    if session == "safety" and training_rows is not None and detected.overlap:
        logger.warning(
            f"{counted_of(detected.overlap, len(training_rows), 'row', 'are')} in both the safety set and the noisy set. "
            "The model trains on such rows again, so it cannot forget them. Remove them from the safety set."
        )


def _has_noisy_session(trace: Trace, records: Sequence[Record]) -> bool:
    """Whether a noisy session has begun. The record at its step 0 can also come from a safety session with adapters."""
    is_in_manifest = any(entry["session"] == "noisy" for entry in trace.manifest["sessions"])
    return is_in_manifest or any(record.session == "noisy" and record.step > 0 for record in records)


def _is_same_run(
    trace: Trace, session: Session, training_rows: EncodedRows | None, output_dir: str, resumed: bool
) -> bool:
    """Whether a run trains on the rows of a recorded session.

    If the rows of both cannot be encoded, only a run that resumes in the same output folder is the same run.
    """
    recorded_rows = _recorded_rows(trace, session)
    if training_rows is not None:
        return digest_of_rows(training_rows) in recorded_rows
    output_dirs = [entry["output_dir"] for entry in trace.manifest["sessions"] if entry["session"] == session]
    return resumed and recorded_rows == [None] and output_dirs == [os.path.abspath(output_dir)]


def _recorded_rows(trace: Trace, session: Session) -> list[str | None]:
    """The hash of the rows of a recorded session, if there is one, or `None` if its rows are not known."""
    return [entry.get("training_rows") for entry in trace.manifest["sessions"] if entry["session"] == session]


def warn_if_noisy_session_is_unfinished(trace: Trace, records: Sequence[Record]) -> None:
    """Warn if a safety session begins when the noisy session has only its first record."""
    if not any(record.session == "noisy" and record.step > 0 for record in records):
        logger.warning(
            f"This run is treated as safety finetuning, but the trace in {trace.folder} has only the first record of the "
            "noisy session: it was interrupted, or it trained on other rows. Finish the noisy session first, or choose "
            "another `trace_dir` or `output_dir`."
        )


def digest_of_rows(rows: EncodedRows) -> str:
    """Hash of the ids of `rows`. It does not depend on their order."""
    digest = hashlib.blake2b(digest_size=16)
    ids = rows.ids.sort()
    for start in range(0, len(ids), WINDOW):
        digest.update("".join(f"{sample}\n" for sample in ids[start : start + WINDOW].to_pylist()).encode())
    return digest.hexdigest()


def count_overlap(rows: EncodedRows, other_rows: EncodedRows) -> int:
    """Number of `rows` that are among `other_rows`, with the same loss mask."""
    return pc.is_in(rows.ids, value_set=other_rows.ids).true_count


def _count_with_copies(rows: EncodedRows, other_rows: EncodedRows) -> int:
    """Number of `rows` that equal one of `other_rows`. Unlike [`count_overlap`], a row counts each time it occurs."""
    return pc.is_in(content_hashes(rows.ids), value_set=content_hashes(other_rows.ids)).true_count


def _count_same_tokens(rows: EncodedRows, other_rows: EncodedRows) -> int:
    """Number of `rows` that have the tokens of one of `other_rows`, with any loss mask."""

    def token_hashes(encoded: EncodedRows) -> np.ndarray:
        hashes = (hash(encoded.sample(index)[0].tobytes()) for index in range(len(encoded)))
        return np.fromiter(hashes, np.int64, len(encoded))

    return int(np.isin(token_hashes(rows), token_hashes(other_rows)).sum())
