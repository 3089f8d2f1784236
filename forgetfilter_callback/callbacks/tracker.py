"""[`ForgetTracker`]: when to record, and leaving training exactly as it found it."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from filelock import FileLock
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..data.encoded_rows import EncodedRows
from ..errors import TraceError, UnsupportedDatasetError
from ..scoring.packing import needed_lengths
from ..scoring.token_losses import token_losses
from ..trace.records import Record, Session
from ..trace.trace import TRACE_FOLDER, Trace
from ..utils.distributed import gather_from_all, run_on_main
from ..utils.model_state import is_sharded, preserve_state, why_unsupported
from ..utils.paths import absolute_path_or_hub_id
from ..utils.validation import check_record_steps
from .early_stopping import RankingMonitor, followed, is_checked
from .integrations import Reporting, summarize_record
from .recorder import Recorder, hide_progress
from .session_rows import (
    count_overlap,
    count_same_tokens,
    encode_noisy_rows,
    encode_training_rows,
    scoring_max_length,
    sft_encoding_options,
)


logger = get_logger(__name__)  # says things once, on the main process

# A disk that is full (or a quota), read-only, failing or gone (NFS); other errors are of the caller's making.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
# A session is S1 if it trains on at least this share of the noisy set.
NOISY_SESSION_OVERLAP = 0.5


class ForgetTracker(TrainerCallback):
    """Records the losses of the noisy set while a model learns it (S1) and during the safety finetuning that follows
    (S1+). Carry one tracker through both trainers:

    ```python
    tracker = ForgetTracker()
    Trainer(model, args1, train_dataset=noisy, callbacks=[tracker]).train()
    Trainer(model, args2, train_dataset=safety, callbacks=[tracker]).train()
    tracker.trace.forgetting()
    ```

    Records are taken at the beginning and at the end of each session, and in between as `record_steps` says. Training is
    untouched: weights, optimizer, random generators and logs are the same as without the tracker.

    Args:
        noisy (`Dataset` or a sequence of dicts, *optional*):
            The rows to follow, as `input_ids` (with `labels`, or as the trainer's collator makes them), `prompt` and
            `completion`, `messages`, or `text`. By default the training set of the first session is adopted.
        trace_dir (`str`, *optional*):
            Where the trace lies; a trace that is there already is gone on with, so that S1 and S1+ may be two
            processes. Defaults to `output_dir/_forgetfilter` of the first session.
        record_steps (`int` or `float`, *optional*):
            Records also every so many optimizer steps; below 1, as a share of the session.
        stop_early (`bool`, defaults to `False`):
            Whether to end S1+ (`control.should_training_stop`) once the ranking of a fixed tenth of the samples (at least
            20, at most 128) has settled: checked 4, 6, 8, 12, 16, 24, … steps after the warm-up, so after 12 at the
            earliest, see [`early_stopping`](settling.py). The full record is taken then.
        rouge1 (`bool`, defaults to `False`):
            Whether to generate greedy completions at each record too, for the paper's measure. Slow.
        max_new_tokens (`int`, *optional*):
            Where generation ends; by default at the longest reference of the noisy set.
        max_length (`int`, *optional*):
            Longer rows are cut at the right; by default at the model's context.
        batch_tokens (`int`, *optional*):
            Padded tokens in a scoring batch; by default 2048 on a CPU, 16384 elsewhere.
        audit_column (`str`, *optional*):
            A column of `noisy` that is true for unsafe rows, to log AUROC and F1 by. It decides nothing.
        raise_on_disk_error (`bool`, defaults to `False`):
            Whether a full, failing or read-only disk ends training. By default the rest of the session is not tracked, an
            error says so once, and training goes on.

    Attributes:
        trace ([`Trace`]):
            The records. Set when the first session begins.

    Raises, when a session begins:
        EncodingError: if the rows are no causal-language-modelling samples, the set is empty, or a row is another one each
            time that it is read.
        NotOneSampleARow: without `noisy`, if the training set is packed or streamed.
        TraceError: if the trace in the folder is of other data, or the sessions do not fit together.
        NotImplementedError: where weights are sharded over processes otherwise than by FSDP2 (FSDP1, DeepSpeed, tensor
            parallelism), and with `rouge1` by FSDP2 too.
    """

    def __init__(
        self,
        noisy: Any = None,
        *,
        trace_dir: str | os.PathLike[str] | None = None,
        record_steps: int | float | None = None,
        stop_early: bool = False,
        rouge1: bool = False,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        audit_column: str | None = None,
        raise_on_disk_error: bool = False,
    ):
        if audit_column is not None and (noisy is None or not len(noisy) or audit_column not in noisy[0]):
            raise ValueError(
                f"audit_column={audit_column!r} names a column of the rows given to the tracker: "
                f"{'none are given' if noisy is None or not len(noisy) else sorted(noisy[0])}."
            )
        if audit_column is not None and isinstance(noisy[0][audit_column], str):  # the text "False" would be true
            raise ValueError(f"audit_column={audit_column!r} holds text. It must be true or false, or numbers.")
        check_record_steps(record_steps)
        for name, value, least in (
            ("max_length", max_length, 2), ("batch_tokens", batch_tokens, 1), ("max_new_tokens", max_new_tokens, 1)
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be {least} or larger.")
        self.noisy = noisy
        self.trace_dir = trace_dir
        self.record_steps = record_steps
        self.stop_early = stop_early
        self.rouge1 = rouge1
        self.max_new_tokens = max_new_tokens
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self.audit_column = audit_column
        self.raise_on_disk_error = raise_on_disk_error
        self._trace: Trace | None = None
        self._session: Session | None = None  # the running one, None between sessions
        self._running_control: TrainerControl | None = None  # of the trainer that it runs in
        self._ended: list[Session] = []
        self._ranking_monitor: RankingMonitor | None = None
        self._recorded_step = -1
        self._lock: FileLock | None = None  # on the trace's folder, while a session runs; the main process's
        self._disk_failed = False  # the disk failed
        self._unsafe = None if audit_column is None else np.array([bool(row[audit_column]) for row in noisy])
        self._recorder: Recorder  # of the trace, and
        self._reporting: Reporting  # of the running trainer: both from the first session on

    @property
    def trace(self) -> Trace:
        """The records so far."""
        if self._trace is None:
            raise TraceError(
                "This tracker has not seen a session yet. Pass it to a trainer (`callbacks=[tracker]`) and train, or "
                "open a trace on disk: `Trace.open(folder)`."
            )
        return self._trace

    # ---- events of the trainer ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._disk_failed and self._trace is None:
            return  # the noisy set was never seen: this session must not be taken for the one that learns it
        with self._survive_disk_errors():
            self._on_train_begin(args, state, control, **kwargs)

    def _on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, processing_class = kwargs["model"], kwargs["processing_class"]
        reason = why_unsupported(model)
        if reason is not None:
            raise NotImplementedError(
                f"ForgetTracker does not record here ({reason}). Train with DDP, FSDP2 or on one process, or without it."
            )
        if self.rouge1 and is_sharded(model):
            raise NotImplementedError("rouge1=True generates, which does not work with sharded weights (FSDP) yet.")
        # Again with a smaller batch (`auto_find_batch_size`): the same session, whose record at step 0 stands.
        session = self._session if self._running_control is control else None
        again = session is not None
        self._session = self._ranking_monitor = None
        self._recorded_step = -1
        if session is None:
            self._reporting = Reporting(args)
            with preserve_state(model):
                self._reporting.begin(state, control, model)
                session = self._begin_session(args, state, model, processing_class, kwargs["train_dataloader"])
        self._session, self._running_control = session, control
        here = Record(session, state.global_step)
        restart = here.step == 0 and not again
        if not restart:
            self._recorder.drop_after(session, here.step)
        known = not restart and here in self._recorder.records()
        if known and here.step == 0:  # again; the trainer has begun a new log
            self._log(here, self._recorder.means(here), state, control)
        elif not known and (here.step == 0 or here.step >= state.max_steps):
            self._record(args, state, control, **kwargs)
        if self.stop_early and session == "safety":
            self._begin_early_stopping(args, state)

    def _begin_early_stopping(self, args: TrainingArguments, state: TrainerState) -> None:
        if Record("safety", 0) in self._recorder.records():
            self._ranking_monitor = RankingMonitor(self.trace, _since_warmup(args, state))
        else:
            logger.warning("S1+ will not end early: it has no record at step 0, which forgetting is measured from.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        with self._survive_disk_errors():
            self._on_step_end(args, state, control, **kwargs)

    def _on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._ranking_monitor is not None and self._is_to_check(args, state):
            with preserve_state(kwargs["model"]):
                losses = token_losses(kwargs["model"], self._ranking_monitor.rows, self.batch_tokens, disable_tqdm=True)
            if self._ranking_monitor.check(_since_warmup(args, state), losses):
                logger.warning(
                    f"S1+ ends at step {state.global_step} of {state.max_steps}: the ranking of forgetting has settled."
                )
                control.should_training_stop = True
        if state.global_step >= state.max_steps or control.should_training_stop or self._is_due(state):
            self._record(args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Another callback may have stopped the training after `on_step_end`. This line is the last thing before the weights
        # of the best checkpoint are loaded; `on_train_end` would be too late.
        if "train_runtime" in kwargs["logs"] and self._recorded_step != state.global_step < state.max_steps:
            with self._survive_disk_errors():
                self._record(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._session is not None:
            self._ended.append(self._session)
            self._reporting.end(state, control)
        self._session = self._ranking_monitor = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @contextmanager
    def _survive_disk_errors(self) -> Iterator[None]:
        """Training goes on where the disk does not; the rest of the session is not tracked."""
        try:
            yield
        except OSError as error:
            if self.raise_on_disk_error or error.errno not in _DISK_ERRORS:
                raise
            self._session = self._ranking_monitor = None
            self._disk_failed = True
            logger.error(
                f"FORGETTING IS NO LONGER TRACKED: the trace could not be written ({error}). Training goes on without it. "
                "The records before this one are intact. Free the disk, and run the session again from a checkpoint "
                "(`resume_from_checkpoint`) or anew. To stop training instead: "
                "`ForgetTracker(raise_on_disk_error=True)`."
            )

    # ---- sessions ----

    def _begin_session(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | None,
        train_dataloader: torch.utils.data.DataLoader,
    ) -> Session:
        """Says which session this is, and notes it in the trace."""
        run_on_main(partial(self._claim, self._folder(args)))
        begun = self._trace is None
        if self._trace is None:
            self._trace = self._open_trace(args, model, processing_class, train_dataloader)
            self._recorder = Recorder(self._trace, self.batch_tokens, self.rouge1, self.max_new_tokens)
        trained_on: EncodedRows | None = None
        if begun and self.noisy is None and self.trace_dir is None:  # adopted from this very loader
            trained_on = self._trace.rows
        else:
            try:
                trained_on = encode_training_rows(
                    args, train_dataloader, scoring_max_length(model, args, self.max_length)
                )
            except UnsupportedDatasetError as error:
                logger.warning(
                    f"The rows of this session cannot be followed, so it is taken for the safety session, S1+. ({error}) If "
                    "it trains on the noisy set itself, track the safety session only."
                )
        if any(gather_from_all(trained_on is None)):  # all processes must take it for the same
            trained_on = None
        session: Session = "safety"
        shared = 0
        if trained_on is not None:
            noisy = self._trace.rows
            shared = gather_from_all(count_overlap(trained_on, noisy))[0]
            if shared >= NOISY_SESSION_OVERLAP * len(noisy):
                session = "noisy"
            elif count_same_tokens(noisy, trained_on) >= NOISY_SESSION_OVERLAP * len(noisy):
                raise TraceError(
                    "This session trains on the tokens of the noisy set, but other ones of them count in its loss than in "
                    "the rows that the tracker was given. Give it the rows as the trainer takes them (`input_ids` and "
                    "`labels`), or use `ForgetTracker()` without rows."
                )
        if session in self._ended and state.global_step == 0:
            raise TraceError(
                f"This tracker has recorded {session} already (in {self._trace.folder}), and one tracker follows one S1 "
                "and one S1+. Make a new ForgetTracker, with another `trace_dir` or `output_dir`."
            )
        if session == "safety" and trained_on is not None and shared:
            logger.warning(
                f"{shared} of the {len(trained_on)} rows of the safety set are in the noisy set too. They are "
                "trained on twice and cannot be forgotten; take them out of the safety set."
            )
        begun_earlier = run_on_main(partial(self._trace.begin_session, session, args.output_dir, state.max_steps))
        if (
            session == "safety"
            and "noisy" in begun_earlier
            and not _has_more_than_its_beginning("noisy", self._recorder.records())
        ):
            logger.warning(
                "This session trains on other rows than those tracked, so it is taken for the safety session, S1+. But S1 "
                f"has a record of its beginning only (in {self._trace.folder}): it was interrupted, or other rows were to "
                "be finetuned on. Finish S1 first, or choose another `trace_dir` or `output_dir`."
            )
        if state.global_step == 0 and (session == "noisy" or "noisy" not in begun_earlier):
            run_on_main(partial(self._trace.note_model, *_names(model, processing_class)))
        if not hide_progress(args):
            shares = ""
            if trained_on is not None:
                shares = f" (trains on {shared or 'none'} of the {len(self._trace.rows)} rows tracked)"
            print(f"ForgetTracker: {session}{shares}. {self._cost(args, state, model, trained_on)}")
        return session

    def _cost(
        self, args: TrainingArguments, state: TrainerState, model: PreTrainedModel, trained_on: EncodedRows | None
    ) -> str:
        """What the records of this session will cost, in words. Generation (`rouge1=True`) is not in it."""
        rows = self.trace.rows
        records = 2 if self.record_steps is None else 1 + math.ceil(state.max_steps / self._record_every(state))
        read = sum(int(needed_lengths(window).sum()) for window in rows.windows())
        words = f"Up to {records} records of {len(rows):,} samples, up to {read:,} tokens each"
        tokens = records * read
        if self.stop_early:
            checks = sum(map(is_checked, range(1, state.max_steps - args.get_warmup_steps(state.max_steps))))
            words += f", and up to {checks} checks of {followed(len(rows))} samples"
            tokens += checks * math.ceil(read * followed(len(rows)) / len(rows))
        if trained_on is None:
            return words
        samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        trained = samples * len(trained_on.tokens) / len(trained_on)  # in a step
        # A backward pass costs two forward ones, or one where nearly all weights are frozen (adapters).
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        passes = 3 if trainable > 0.5 * sum(p.numel() for p in model.parameters()) else 2
        steps = math.ceil(tokens / (passes * trained))
        fraction = f"{steps / state.max_steps:.0%} of this session's {state.max_steps:,}"
        return f"{words}: at most the compute of {steps:,} training steps ({fraction})"

    def _folder(self, args: TrainingArguments) -> Path:
        if self._trace is not None:
            return self._trace.folder
        return Path(self.trace_dir if self.trace_dir is not None else Path(args.output_dir) / TRACE_FOLDER)

    def _claim(self, folder: Path) -> None:
        if self._lock is None:  # an interrupted session has kept it
            self._lock = Trace.lock(folder)

    def _open_trace(
        self,
        args: TrainingArguments,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | None,
        train_dataloader: torch.utils.data.DataLoader,
    ) -> Trace:
        folder = self._folder(args)
        if self.trace_dir is not None and self.noisy is None and run_on_main(partial(Trace.exists, folder)):
            return Trace.open(folder)
        context = scoring_max_length(model, args, self.max_length)
        rows = encode_noisy_rows(self.noisy, args, processing_class, train_dataloader, context)
        if rows.truncated:
            logger.warning(
                f"{rows.truncated} of {len(rows)} samples were longer than {context} tokens and "
                "were cut at the right. What was cut is not scored."
            )
        uncounted = int((np.diff(rows.loss_offsets) == 0).sum())
        if uncounted:
            logger.warning(
                f"{uncounted} of {len(rows)} samples have no counted token, so they have no loss: their forgetting is "
                "NaN and they are kept. Look at their labels and at max_length."
            )
        encoding = sft_encoding_options(args, processing_class)

        def create_or_find() -> dict[str, Any] | None:
            if Trace.exists(folder):
                return None
            return Trace.create(folder, rows, *_names(model, processing_class), context, encoding).manifest

        manifest = run_on_main(create_or_find)
        if manifest is not None:
            return Trace(folder, rows, manifest)
        trace = Trace.open(folder)
        found = count_overlap(rows, trace.rows)
        if not found == len(rows) == len(trace.rows):  # in that order or in another
            raise TraceError(
                f"The trace in {folder} is of another dataset or tokenizer: {found} of the {len(rows)} samples here are "
                f"among its {len(trace.rows)} (tokenizer {trace.manifest['tokenizer']!r}, max_length and chat template "
                "must be the same too). Choose another `trace_dir` or `output_dir`, or delete the folder. If this is the "
                f"safety session of that trace, say so: `ForgetTracker(trace_dir={str(folder)!r})`."
            )
        if self._unsafe is not None:
            self._unsafe = self._unsafe[pc.index_in(trace.rows.ids, value_set=rows.ids).to_numpy()]
        return trace

    # ---- records ----

    def _is_to_check(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether the ranking is looked at: now and then, once the learning rate has warmed up, and not at the very end."""
        return state.global_step < state.max_steps and is_checked(_since_warmup(args, state))

    def _is_due(self, state: TrainerState) -> bool:
        if self.record_steps is None:
            return False
        return state.global_step % self._record_every(state) == 0

    def _record_every(self, state: TrainerState) -> int:
        assert self.record_steps is not None
        return int(self.record_steps if self.record_steps >= 1 else math.ceil(self.record_steps * state.max_steps))

    def _record(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes the record of the running session at this step, and logs what it says."""
        if self._session is None:
            return
        model = kwargs["model"]
        record = Record(self._session, state.global_step)
        at_an_end = record.step in (0, state.max_steps) or control.should_training_stop
        with preserve_state(model):
            means = self._recorder.record(record, args, model, kwargs["processing_class"], at_an_end)
            without_base = Record("noisy", 0) not in self._recorder.records()
            if record == Record("safety", 0) and isinstance(model, PeftModel) and without_base:
                self._recorder.record_base(args, model)
        self._recorded_step = state.global_step
        self._log(record, means, state, control)

    def _log(self, record: Record, means: np.ndarray, state: TrainerState, control: TrainerControl) -> None:
        values = nats_per_unit = None
        if record.session == "safety" and record.step:
            # Not where the trace cannot say: it has no record at step 0, or the model's head could not be reached.
            with suppress(TraceError):
                values, nats_per_unit = run_on_main(partial(self._forgetting, record.step))
        figures = summarize_record(means, values, self._unsafe, nats_per_unit)
        if figures:
            self._reporting.log(figures, state, control)

    def _forgetting(self, step: int) -> tuple[np.ndarray, float]:
        values = self.trace.forgetting(step=step)
        return values, self.trace.nats_per_unit(values, step)


def _has_more_than_its_beginning(session: Session, records: list[Record]) -> bool:
    return any(record.session == session and record.step > 0 for record in records)


def _names(model: PreTrainedModel, processing_class: PreTrainedTokenizerBase | None) -> tuple[str, str | None]:
    """Of the model and its tokenizer, so that they are found again."""
    tokenizer = absolute_path_or_hub_id(processing_class.name_or_path) if processing_class is not None else None
    return absolute_path_or_hub_id(model.config.name_or_path), tokenizer


def _since_warmup(args: TrainingArguments, state: TrainerState) -> int:
    """Steps of the session since its learning rate has warmed up."""
    return max(0, state.global_step - args.get_warmup_steps(state.max_steps))
