"""All records of a run on disk: the rows, and the loss of each counted token at each checkpoint.

```
_forgetfilter/
  manifest.json              schema version, fingerprint, model, tokenizer, versions, sessions
  rows.parquet               id, input_ids, counted: the noisy set in its order
  records/noisy-00000000.parquet    loss (list<float> a sample) [, state] [, completion, rouge1]
  records/safety-00000026.parquet
```

Every file is written all or nothing, so that a crash loses at most the record in progress.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from ..data.encoded_rows import EncodedRows
from ..errors import TraceError
from ..measures.common import mean_losses
from ..measures.loss import loss_forgetting
from ..measures.names import DEFAULT_MEASURE, MEASURES, Measure
from ..measures.pooled import pooled_forgetting
from ..measures.relative import relative_forgetting
from ..measures.rouge import rouge_forgetting
from ..measures.smoothed import nats_per_unit, smoothed_forgetting
from ..scoring.scores import Scores
from ..utils.atomic_files import atomic_write, write_json, write_parquet
from ..utils.versions import library_versions
from .records import SESSIONS, Record, Session
from .schema import SCHEMA_VERSION, read_column, read_manifest, read_rows


logger = logging.getLogger(__name__)

TRACE_FOLDER = "_forgetfilter"  # `push_to_hub` leaves out what begins with "_": the rows are nobody else's business
# What a file system without locks answers (NFS without its lock daemon, some FUSE ones).
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Trace:
    """The records of one noisy set. Open one with `Trace.open(folder)`; [`ForgetTracker`] makes them.

    Attributes:
        folder (`Path`):
            Where it lies.
        rows ([`EncodedRows`]):
            The noisy set, in its order: what all arrays below run along.
        manifest (`dict`):
            `schema_version`, `fingerprint`, `samples`, `loss_tokens`, `truncated`, `model` (M0, where the trace begins
            with it), `tokenizer`, `max_length`, `encoding` (what else [`encode_rows`] was or must be told), `versions`,
            `sessions`, a list of what each session was (`session`, `output_dir`, `max_steps`), and, where the command line
            made it, `source`: the file, folder or Hub id of the rows.
    """

    def __init__(self, folder: str | os.PathLike[str], rows: EncodedRows, manifest: dict[str, Any]):
        self.folder = Path(folder)
        self.rows = rows
        self.manifest = manifest

    def __repr__(self) -> str:
        records = ", ".join(f"{record.session} step {record.step}" for record in self.records())
        return f"Trace({str(self.folder)!r}, {len(self.rows)} samples, records: {records or 'none'})"

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        rows: EncodedRows,
        model: str,
        tokenizer: str | None,
        max_length: int | None,
        encoding: dict[str, Any] | None = None,
    ) -> Trace:
        """Begins an empty trace of `rows` in `folder`, which must not hold one already."""
        if cls.exists(folder):
            raise TraceError(f"{folder} holds a trace already. Go on with it, or choose another folder.")
        (Path(folder) / "records").mkdir(parents=True, exist_ok=True)
        tables = (
            pa.table(
                {
                    "id": window.ids,
                    "input_ids": pa.LargeListArray.from_arrays(pa.array(window.offsets), pa.array(window.tokens)),
                    "loss_mask": pa.LargeListArray.from_arrays(pa.array(window.offsets), pa.array(window.loss_mask)),
                }
            )
            for window in rows.windows()
        )
        write_parquet(tables, Path(folder) / "rows.parquet")
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": rows.fingerprint,
            "samples": len(rows),
            "loss_tokens": int(rows.loss_mask.sum()),
            "truncated": rows.truncated,
            "model": model,
            "tokenizer": tokenizer,
            "max_length": max_length,
            "encoding": encoding or {},
            "versions": library_versions(),
            "sessions": [],
        }
        trace = cls(folder, rows, manifest)
        trace._write_manifest()
        return trace

    @staticmethod
    def lock(folder: str | os.PathLike[str]) -> FileLock | None:
        """Claims `folder` for this process, until the lock is released or the process ends, however it ends.

        Returns:
            [`filelock.FileLock`], or `None` where the file system has no locks (it is said, once a folder).

        Raises:
            TraceError: if another process has it.
        """
        lock = FileLock(Path(folder) / ".lock", timeout=0, thread_local=False, is_singleton=True)
        try:
            lock.acquire()
        except Timeout:
            raise TraceError(
                f"Another process is recording into {folder}. Give this run another `trace_dir` or `output_dir`, or end "
                "the other one first."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(f"{folder} lies where files cannot be locked ({error}). Let no other run record into it.")
            return None
        return lock

    @staticmethod
    def exists(folder: str | os.PathLike[str]) -> bool:
        """Whether `folder` holds a trace."""
        return (Path(folder) / "manifest.json").is_file()

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Trace:
        """Opens the trace in `folder`.

        Raises:
            TraceError: if there is none, if a newer version wrote it, or if its files do not fit together.
        """
        folder = Path(folder)
        if not cls.exists(folder):
            raise TraceError(
                f"{folder} holds no trace (no manifest.json). ForgetTracker writes one into `output_dir/_forgetfilter` "
                "of the first session's trainer, or into its `trace_dir`."
            )
        manifest = read_manifest(folder)
        return cls(folder, read_rows(folder, manifest), manifest)

    def begin_session(self, session: Session, output_dir: str, max_steps: int) -> list[Session]:
        """Notes in the manifest what a session is; an earlier run of the same session is replaced.

        Returns:
            `list[str]`: the sessions that had begun before.
        """
        begun = [entry["session"] for entry in self.manifest["sessions"]]
        others = [entry for entry in self.manifest["sessions"] if entry["session"] != session]
        entry = {"session": session, "output_dir": os.path.abspath(output_dir), "max_steps": max_steps}
        self.manifest["sessions"] = [*others, entry]
        self._write_manifest()
        return begun

    def note_model(self, model: str, tokenizer: str | None) -> None:
        """Notes in the manifest which model the trace begins with anew, and the versions of now."""
        noted = {"model": model, "tokenizer": tokenizer or self.manifest["tokenizer"], "versions": library_versions()}
        if not noted.items() <= self.manifest.items():
            self.manifest |= noted
            self._write_manifest()

    def note_source(self, source: str, truncated: int) -> None:
        """Notes in the manifest where the rows came from, as [`load_rows`] takes it, and how many of them were cut."""
        self.manifest |= {"source": source, "truncated": truncated}
        self._write_manifest()

    def append(
        self,
        record: Record,
        scores: Iterable[Scores],
        completions: Sequence[str] | None = None,
        rouge1: np.ndarray | None = None,
        restart: bool = False,
    ) -> list[Record]:
        """Writes one record, of which no more than a window is held.

        Args:
            record ([`Record`]):
                Session and step.
            scores (`Iterable[Scores]`):
                Loss of each counted token, nats, and perhaps the states of the samples, window by window as
                `rows.windows()` has them.
            completions (`Sequence[str]`, *optional*):
                One greedy completion a sample.
            rouge1 (`np.ndarray` of shape `(samples,)`, *optional*):
                ROUGE-1 of each completion.
            restart (`bool`, defaults to `False`):
                Whether the session begins anew with this record: once it is on disk, and not before, the session's other
                records go, and those of later sessions.

        Returns:
            `list[Record]`: what was deleted.
        """
        stale = self._stale(record) if restart else []
        tables = self._record_windows(scores, completions, rouge1)
        write_parquet(tables, self.folder / "records" / record.file_name, partial(self._delete, stale))
        return stale

    def _record_windows(
        self, scores: Iterable[Scores], completions: Sequence[str] | None, rouge1: np.ndarray | None
    ) -> Iterator[pa.Table]:
        start = 0
        for window, scored in zip(self.rows.windows(), scores, strict=True):
            columns = {"loss": pa.LargeListArray.from_arrays(pa.array(window.loss_offsets), pa.array(scored.losses))}
            if scored.states is not None:
                flat = pa.array(scored.states.reshape(-1))
                columns["state"] = pa.FixedSizeListArray.from_arrays(flat, scored.states.shape[1])
            where = slice(start, start := start + len(window))
            if completions is not None and rouge1 is not None:
                columns |= {
                    "completion": pa.array(completions[where], pa.large_string()),
                    "rouge1": pa.array(rouge1[where]),
                }
            yield pa.table(columns)

    def repeat(self, record: Record, again: Record, restart: bool = False) -> list[Record]:
        """Writes `record` once more, as `again`: the model has not changed in between. `restart` as in [`append`]."""
        stale = self._stale(again) if restart else []
        with atomic_write(self.folder / "records" / again.file_name, partial(self._delete, stale)) as unfinished:
            shutil.copyfile(self.folder / "records" / record.file_name, unfinished)
        return stale

    def _stale(self, record: Record) -> list[Record]:
        """What a session that begins anew with `record` leaves behind."""
        records = self.records()
        if all(other.session != record.session for other in records):
            return []
        from_it_on = SESSIONS[SESSIONS.index(record.session) :]
        return [other for other in records if other.session in from_it_on and other != record]

    def drop_after(self, session: Session, step: int) -> list[Record]:
        """Deletes the records of `session` past `step`, and those of later sessions if any was deleted. Returns them."""
        stale = [r for r in self.records() if r.session == session and r.step > step]
        if stale:
            stale += [r for r in self.records() if SESSIONS.index(r.session) > SESSIONS.index(session)]
        self._delete(stale)
        return stale

    def _delete(self, records: list[Record]) -> None:
        # The last first: cut off in the middle, what is left of a session says that its successors are stale too.
        for record in sorted(records, reverse=True):
            (self.folder / "records" / record.file_name).unlink()

    def identity(self) -> str:
        """Of the rows and of the records that forgetting is measured between: a decision on one trace fits no other."""
        digest = hashlib.blake2b(self.manifest["fingerprint"].encode(), digest_size=16)
        for record in self.first_and_last():
            digest.update(self.token_losses(record).tobytes())
        return digest.hexdigest()

    def records(self) -> list[Record]:
        """All records, in order of session and step."""
        found = []
        for file in (self.folder / "records").glob("*.parquet"):
            session, _, step = file.stem.rpartition("-")
            if session in SESSIONS and step.isdecimal():
                found.append(Record(session, int(step)))
        return sorted(found)

    def token_losses(self, record: Record) -> np.ndarray:
        """Losses of one record: shape `(counted_tokens,)`, float32, nats, in the order of `rows.counted_tokens`."""
        return self._read(record, "loss").values.to_numpy()

    def states(self, record: Record) -> np.ndarray:
        """States of the samples (see [`Scores`]) in one record: shape `(samples, size)`, float16."""
        column = self._read(record, "state")
        return column.values.to_numpy().reshape(len(column), -1)

    def rouge1(self, record: Record) -> np.ndarray:
        """ROUGE-1 of the greedy completions of one record: shape `(samples,)`, float64, 0..1."""
        return self._read(record, "rouge1").to_numpy(zero_copy_only=False)

    def losses(self) -> np.ndarray:
        """Mean loss of each sample in each record.

        Returns:
            `np.ndarray` of shape `(records, samples)`, float64, nats per token, in the order of [`records`] and of the
            noisy set; NaN where no token counts.
        """
        offsets = self.rows.loss_offsets
        means = [mean_losses(self.token_losses(record), offsets) for record in self.records()]
        return np.array(means).reshape(-1, len(self.rows))

    def forgetting(self, measure: Measure = DEFAULT_MEASURE, step: int | None = None) -> np.ndarray:
        """How much each sample was forgotten during S1+; higher is more.

        Args:
            measure (`"loss"`, `"relative"`, `"pooled"`, `"smoothed"` or `"rouge1"`):
                See [`forgetting`](forgetting.py). `relative` needs M0's record (the tracker was there in S1), `rouge1`
                needs `ForgetTracker(rouge1=True)`.
            step (`int`, *optional*):
                Which record of S1+ to compare with its first; the last one by default.

        Returns:
            `np.ndarray` of shape `(samples,)`, float64; NaN where no token counts.

        Raises:
            TraceError: if the records it needs are not there.
        """
        if measure not in MEASURES:
            raise ValueError(f"measure={measure!r} is none of {', '.join(MEASURES)}.")
        before, after = self.first_and_last(step)
        if measure == "rouge1":
            return rouge_forgetting(self.rouge1(before), self.rouge1(after))
        before_losses, after_losses = self.token_losses(before), self.token_losses(after)
        offsets = self.rows.loss_offsets
        if measure == "smoothed":
            return smoothed_forgetting(self.rows.loss_tokens, offsets, before_losses, after_losses, self.states(before))
        if measure == "pooled":
            return pooled_forgetting(self.rows.loss_tokens, offsets, before_losses, after_losses)
        before_means, after_means = mean_losses(before_losses, offsets), mean_losses(after_losses, offsets)
        if measure == "loss":
            return loss_forgetting(before_means, after_means)
        if self.base_record is None:
            raise TraceError(
                "Relative forgetting needs the base model's losses, and this trace has no record at step 0 of S1. Carry "
                "the tracker through both sessions, or use measure='loss' or 'pooled'."
            )
        return relative_forgetting(mean_losses(self.token_losses(self.base_record), offsets), before_means, after_means)

    def nats_per_unit(self, values: np.ndarray, step: int | None = None) -> float:
        """By how many nats a sample becomes less likely with each unit of forgetting: how far `smoothed` is to be believed.

        Args:
            values (`np.ndarray` of shape `(samples,)`):
                What [`forgetting`] gave.
            step (`int`, *optional*):
                The same as there.

        Returns:
            `float`: see [`nats_per_unit`](forgetting.py).
        """
        before, after = (self.token_losses(record) for record in self.first_and_last(step))
        return nats_per_unit(values, before, after, self.rows.loss_offsets)

    @property
    def base_record(self) -> Record | None:
        """The record of M0: step 0 of S1."""
        return Record("noisy", 0) if Record("noisy", 0) in self.records() else None

    def first_and_last(self, step: int | None = None) -> tuple[Record, Record]:
        """The records forgetting is measured between: S1+ at step 0 and at `step` (by default its last)."""
        of_safety = [record for record in self.records() if record.session == "safety"]
        if not of_safety:
            raise TraceError(
                f"The trace in {self.folder} has records of the session on the noisy set only, so nothing can have been "
                "forgotten yet. Carry the same tracker into a second trainer on a safety set. (If you wanted to track "
                "rows that the model learnt earlier, name them: `ForgetTracker(noisy)`.)"
            )
        before, after = of_safety[0], Record("safety", step) if step is not None else of_safety[-1]
        if after not in of_safety:
            raise TraceError(f"S1+ has no record at step {step}, only at {[record.step for record in of_safety]}.")
        if before.step != 0:
            raise TraceError(
                f"S1+ has no record at step 0 (its first is at step {before.step}), so there is nothing to compare "
                "with. Run the safety session with the tracker from its beginning."
            )
        if before == after and len(of_safety) > 1:
            raise TraceError("Forgetting is measured from step 0 of S1+ on, so there is none at step 0.")
        if before == after:
            raise TraceError(
                "S1+ has a record at step 0 only: the safety session has not ended, or was stopped. Finish it."
            )
        return before, after

    def _read(self, record: Record, column: str) -> Any:
        return read_column(self.folder / "records" / record.file_name, column, self.rows)

    def _write_manifest(self) -> None:
        write_json(self.manifest, self.folder / "manifest.json")


def find_trace_folder(path: str | os.PathLike[str]) -> Path:
    """The trace in `path`: itself, or where a run's output folder has it."""
    inside = Path(path) / TRACE_FOLDER
    return inside if Trace.exists(inside) and not Trace.exists(path) else Path(path)
