"""[`Trace`]: the encoded noisy set and the loss of each of its tokens at every checkpoint, on disk.

```
_forgetfilter/
  manifest.json                     schema version, fingerprint, model, tokenizer, versions, sessions
  rows.parquet                      id, input_ids, loss_mask, attention_mask: the noisy set in its order
  records/noisy-00000000.parquet    loss (one list of floats per sample) [, state] [, completion, rouge1] [, in_sample]
  records/safety-00000026.parquet
  superseded/1/...                  records that a restarted session has replaced
```

Every file is written atomically, so a crash loses at most the record in progress. Restarting a session deletes no record.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from ..data.encoded_rows import EncodedRows
from ..errors import TraceError
from ..measures.common import mean_losses, windows
from ..measures.names import DEFAULT_MEASURE, Measure
from ..utils.argument_checks import check_minimum
from ..utils.atomic_files import atomic_write, write_json, write_parquet
from ..utils.counted import counted
from ..utils.html_table import html_table
from ..utils.paths import short_model_name
from ..utils.versions import library_versions
from .forgetting import compute_forgetting
from .lock_folder import lock_folder
from .plot_trace import plot_trace
from .records import BASE_RECORD, SESSIONS, Record, Session
from .schema import (
    SCHEMA_VERSION,
    check_new_folder,
    read_manifest,
    read_rows,
    record_tables,
    rows_table,
    sampled_rows,
)
from .stored_column import StoredColumn
from .superseded import supersede
from .trace_folder import find_trace_folder, has_trace


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..scoring.scores import Scores


class Trace:
    """The records of one noisy set. [`ForgetTracker`] writes a trace; `Trace.open(folder)` reads it.

    Attributes:
        folder (`Path`):
            The folder of the trace.
        rows ([`EncodedRows`]):
            The encoded noisy set in its order. All arrays below follow this order.
        manifest (`dict`):
            `schema_version`, `fingerprint`, `samples`, `loss_tokens`, `truncated`, `model` (the base model, if the trace
            starts with it), `tokenizer`, `max_length`, `encoding` (further arguments of [`encode_rows`]), `versions`,
            `sessions` (a list of `session`, `output_dir`, `max_steps`, `training_rows`) and, if the command line created
            the trace, `source`, `source_digest` and `source_column`: the file, folder or Hub id of the rows, the hash of the
            file, and the column that says where a row came from.
    """

    def __init__(self, folder: str | os.PathLike[str], rows: EncodedRows, manifest: dict[str, Any]):
        self.folder = Path(folder)
        self.rows = rows
        self.manifest = manifest

    def __repr__(self) -> str:
        records = "; ".join(map(str, self.records()))
        return f"Trace({str(self.folder)!r}, {counted(len(self.rows), 'row')}, records: {records or 'none'})"

    def _repr_html_(self) -> str:
        content = {
            "folder": self.folder,
            "model": short_model_name(self.manifest["model"]),
            "noisy set": f"{counted(len(self.rows), 'row')}, {counted(self.manifest['loss_tokens'], 'loss token')}",
            "records": "; ".join(map(str, self.records())) or "none",
        }
        return html_table("Trace", content)

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
        """Create an empty trace of `rows` in `folder`.

        Raises:
            TraceError: if `folder` contains a trace or files of another, or if no token contributes to the loss.
        """
        check_new_folder(Path(folder), rows)
        if not rows.loss_mask.any():
            raise TraceError("No sample has a token that contributes to the loss. Check the labels and `max_length`.")
        (Path(folder) / "records").mkdir(parents=True, exist_ok=True)
        write_parquet(map(rows_table, rows.windows()), Path(folder) / "rows.parquet")
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": rows.fingerprint,
            "samples": len(rows),
            "loss_tokens": int(rows.loss_mask.sum()),
            "truncated": rows.truncated,
            "model": model,
            "tokenizer": tokenizer or None,  # the name is empty if it was built in memory
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
        """Lock `folder` for this process until the lock is released or the process ends.

        Returns:
            [`filelock.FileLock`], or `None` if the file system does not support locks (logged as a warning).

        Raises:
            TraceError: if another process holds the lock.
        """
        return lock_folder(folder)

    @staticmethod
    def exists(folder: str | os.PathLike[str]) -> bool:
        """Whether `folder` itself is the folder of a trace."""
        return has_trace(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Trace:
        """Open the trace in `folder`, which can also be the output folder of the run that wrote it.

        Raises:
            TraceError: if there is no trace, if another version of the library wrote it, or if its files do not match.
        """
        folder = find_trace_folder(folder)
        if folder.is_file():
            raise TraceError(f"{folder} is a file. Pass the folder of a trace.")
        if not cls.exists(folder) and (folder / "rows.parquet").exists():
            raise TraceError(f"{folder} contains files of a trace, but no manifest.json. Restore it, or record again.")
        if not cls.exists(folder):
            raise TraceError(
                f"{folder} contains no trace (no manifest.json). A trace is the folder `_forgetfilter` in the output folder "
                "of `forgetfilter run` or of the first trainer with a ForgetTracker, or the tracker's `trace_dir`."
            )
        manifest = read_manifest(folder)
        return cls(folder, read_rows(folder, manifest), manifest)

    def begin_session(
        self, session: Session, output_dir: str, max_steps: int, rows: str | None = None, loads_best: bool = False
    ) -> list[Session]:
        """Add a session to the manifest. An earlier entry of the same session is replaced. `rows` is a hash of the rows
        that the run trains on, if they could be encoded. `loads_best` is `load_best_model_at_end` of the run.

        Returns:
            `list[str]`: the sessions that had begun before.
        """
        begun = [entry["session"] for entry in self.manifest["sessions"]]
        others = [entry for entry in self.manifest["sessions"] if entry["session"] != session]
        entry = {"session": session, "output_dir": os.path.abspath(output_dir), "max_steps": max_steps}
        self.manifest["sessions"] = [*others, entry | {"training_rows": rows, "loads_best": loads_best}]
        self._write_manifest()
        return begun

    def set_model(self, model: str, tokenizer: str | None) -> None:
        """Write the model that the trace starts with, and the current library versions, to the manifest."""
        changes = {"model": model, "tokenizer": tokenizer or self.manifest["tokenizer"], "versions": library_versions()}
        if not changes.items() <= self.manifest.items():
            self.manifest |= changes
            self._write_manifest()

    def set_source(self, source: str, digest: str | None, truncated: int, source_column: str | None = None) -> None:
        """Write the source of the rows (as [`load_rows`] takes it), its [`file_digest`] and the number of truncated rows."""
        self.manifest |= {"source": source, "source_digest": digest, "truncated": truncated}
        self.manifest["source_column"] = source_column
        self._write_manifest()

    def append(
        self,
        record: Record,
        scores: Iterable[Scores],
        completions: Sequence[str] | None = None,
        rouge1: np.ndarray | None = None,
        restart: bool = False,
        sample: np.ndarray | None = None,
    ) -> list[Record]:
        """Write one record, one window of rows at a time. A record that it replaces is kept in `superseded`.

        Args:
            record ([`Record`]):
                Session and step.
            scores (`Iterable[Scores]`):
                Losses of the tokens in nats, and optionally the samples' states, one item per window of `rows.windows()`.
            completions (`Sequence[str]`, *optional*):
                One greedy completion per sample.
            rouge1 (`np.ndarray` of shape `(samples,)`, *optional*):
                ROUGE-1 of each completion.
            restart (`bool`, defaults to `False`):
                Whether the session starts again with this record. Once the record is on disk, the older records of this
                session and of later sessions are moved to `superseded`.
            sample (`np.ndarray`, *optional*):
                Numbers of the rows that the record holds, if it does not hold all.

        Returns:
            `list[Record]`: the records that were moved.
        """
        stale = self._stale(record) if restart else []
        tables = record_tables(self.rows, scores, completions, rouge1, sample)
        write_parquet(tables, self._file(record), before_commit=partial(self._supersede, stale, record))
        return stale

    def copy_record(self, source: Record, target: Record, restart: bool = False) -> list[Record]:
        """Write the record `source` again as `target`, for a model that has not changed. `restart` as in [`append`]."""
        stale = self._stale(target) if restart else []
        with atomic_write(self._file(target), partial(self._supersede, stale, target)) as temporary_file:
            shutil.copyfile(self._file(source), temporary_file)
        return stale

    def drop_after(self, session: Session, step: int) -> list[Record]:
        """Move records of `session` past `step` and all of later sessions to `superseded`. Returns the moved records."""
        stale = [record for record in self.records() if record.session == session and record.step > step]
        if stale:
            stale += [r for r in self.records() if SESSIONS.index(r.session) > SESSIONS.index(session)]
            self._supersede(stale)
        return stale

    def _stale(self, record: Record) -> list[Record]:
        """The records that are out of date once a session starts again with `record`."""
        records = self.records()
        if all(other.session != record.session for other in records):
            return []
        sessions = SESSIONS[SESSIONS.index(record.session) :]
        return [other for other in records if other.session in sessions and other != record]

    def _supersede(self, stale: list[Record], replaced: Record | None = None) -> None:
        """Move stale records to a new folder in `superseded`, and copy the record that is about to be replaced there."""
        # Last record first: after a crash here, the remaining records of a session show that later ones are stale too.
        moved = [self._file(record) for record in sorted(stale, reverse=True)]
        supersede(self.folder, moved, [] if replaced is None else [self._file(replaced)])

    def identity(self, measure: Measure = DEFAULT_MEASURE) -> str:
        """Hash of the rows and of the records that `measure` compares. It ties a reviewer's decision to its trace."""
        records = list(self.first_and_last())
        if measure == "relative" and self.base_record is not None:
            records.append(self.base_record)
        digest = hashlib.blake2b(self.manifest["fingerprint"].encode(), digest_size=16)
        for losses in map(self.stored_losses, records):
            for _, span in windows(self.rows.loss_offsets):
                digest.update(losses[span].data)
        return digest.hexdigest()

    def records(self) -> list[Record]:
        """All records, ordered by session and step."""
        records = []
        for file in (self.folder / "records").glob("*.parquet"):
            session, _, step = file.stem.rpartition("-")
            if session in SESSIONS and step.isdecimal():
                records.append(Record(session, int(step)))
        return sorted(records)

    def token_losses(self, record: Record) -> np.ndarray:
        """Losses of a record in nats: shape `(loss_tokens,)`, float32, in the order of `rows.loss_tokens`. Read-only."""
        return self.stored_losses(record)[:]

    def stored_losses(self, record: Record) -> StoredColumn:
        """[`token_losses`], read from disk in parts: all of them take four bytes per loss token."""
        return self._column(record, "loss")

    def states(self, record: Record) -> np.ndarray:
        """Hidden states of the samples in a record (see [`Scores`]): shape `(samples, size)`, float16."""
        return self.stored_states(record)[:]

    def stored_states(self, record: Record) -> StoredColumn:
        """[`states`], read from disk in parts."""
        return self._column(record, "state")

    def rouge1(self, record: Record) -> np.ndarray:
        """ROUGE-1 of the greedy completions of a record: shape `(samples,)`, float64, between 0 and 1."""
        return self._column(record, "rouge1")[:]

    def mean_losses(self, record: Record) -> np.ndarray:
        """Mean loss per sample in a record: shape `(samples,)`, float64, nats per token; NaN if not recorded."""
        return mean_losses(self.stored_losses(record), self.rows.loss_offsets)

    def losses(self) -> np.ndarray:
        """[`mean_losses`] of all records: shape `(records, samples)`, in the order of [`records`] and of the noisy set."""
        return np.array([self.mean_losses(record) for record in self.records()]).reshape(-1, len(self.rows))

    def forgetting(self, measure: Measure = DEFAULT_MEASURE, step: int | None = None) -> np.ndarray:
        """How much each sample was forgotten during safety finetuning. Higher means more forgotten.

        Args:
            measure (`"combined"`, `"loss"`, `"relative"`, `"pooled"`, `"smoothed"` or `"rouge1"`, defaults to `"combined"`):
                The measure. `"relative"` needs all rows under the base model. `"rouge1"` needs
                `ForgetTracker(rouge1=True)`.
            step (`int`, *optional*):
                The record of the safety session that is compared with its first record. Defaults to the last one.

        Returns:
            `np.ndarray` of shape `(samples,)`, float64. NaN for samples without loss tokens.

        Raises:
            TraceError: if the trace does not hold the records that the measure needs.
            ValueError: if the measure is unknown, or if `step` is not a whole number of at least 0.
        """
        return compute_forgetting(self, measure, step)[0]

    def plot(self, measure: Measure = DEFAULT_MEASURE) -> Figure:
        """Plot the losses of the noisy set by record and, after the safety session, a histogram of forgetting.

        Args:
            measure (`"combined"`, `"loss"`, `"relative"`, `"pooled"`, `"smoothed"` or `"rouge1"`, defaults to `"combined"`):
                The measure of forgetting.

        Returns:
            [`matplotlib.figure.Figure`]: a notebook shows it. `figure.savefig(file)` writes it to a file.

        Raises:
            ImportError: if matplotlib is not installed (the extra `[report]`).
            TraceError: if a record cannot be read, or if the measure needs others than those of the safety session.
            ValueError: if the measure is unknown.
        """
        return plot_trace(self, measure)

    @property
    def base_record(self) -> Record | None:
        """The record of the base model, step 0 of the noisy session. `None` if the trace does not hold it for all rows."""
        return BASE_RECORD if BASE_RECORD in self.records() and self.sample(BASE_RECORD) is None else None

    def sample(self, record: Record) -> np.ndarray | None:
        """The numbers of the rows that a record holds. `None` for all rows: only that of the base model may be limited."""
        return sampled_rows(self._file(record))

    def first_and_last(self, step: int | None = None) -> tuple[Record, Record]:
        """The two records that forgetting compares: step 0 of the safety session, and `step` (by default its last).

        Raises:
            TraceError: if the trace does not hold both.
            ValueError: if `step` is not a whole number of at least 0.
        """
        check_minimum("step", step, 0)
        safety = [record for record in self.records() if record.session == "safety"]
        if not safety:
            held = "records of noisy finetuning only" if self.records() else "no records yet"
            raise TraceError(
                f"The trace in {self.folder} has {held}, so forgetting cannot be measured yet. "
                "Pass the same tracker to a second trainer that trains on a safety set. To follow rows that the model has "
                "already learned, name them: `ForgetTracker(noisy)`."
            )
        before, after = safety[0], Record("safety", int(step)) if step is not None else safety[-1]
        if after not in safety:
            raise TraceError(
                f"The safety session has no record at step {step}. Its records are at steps {[r.step for r in safety]}."
            )
        if before.step != 0:
            raise TraceError(
                f"The safety session has no record at step 0 (its first record is at step {before.step}), so there is "
                "nothing to compare with. Record the model before safety finetuning too."
            )
        if before == after and len(safety) > 1:
            raise TraceError("Forgetting is measured from step 0 of the safety session. Choose a later step.")
        if before == after:
            raise TraceError(
                "The safety session has a record at step 0 only: it has not finished, or it was stopped. Finish it."
            )
        return before, after

    def _file(self, record: Record) -> Path:
        return self.folder / "records" / record.file_name

    def _column(self, record: Record, column: str) -> StoredColumn:
        return StoredColumn(self._file(record), column, self.rows)

    def _write_manifest(self) -> None:
        write_json(self.manifest, self.folder / "manifest.json")
