"""[`ForgetTracker`]: the callback that records the noisy set during training."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..data.as_rows import as_rows
from ..data.encoded_rows import EncodedRows
from ..data.tokenizers import unwrap_tokenizer
from ..errors import TraceError
from ..scoring.token_losses import token_losses
from ..trace.records import BASE_RECORD, Record, Session
from ..trace.trace import Trace
from ..trace.trace_folder import TRACE_FOLDER
from ..utils.argument_checks import check_max_length, check_minimum, check_record_steps, check_true_or_false
from ..utils.distributed import gather_from_all, run_on_main
from ..utils.model_state import preserve_state
from ..utils.parallelism import shares_weights, unwrapped, why_unsupported
from .begin_session import begin_session
from .early_stopping import RankingMonitor, is_check_step, steps_since_warmup
from .integrations import LoggingIntegrations
from .open_trace import open_trace, read_audit_labels
from .record_cost import describe_cost, record_every
from .recorder import Recorder
from .session_rows import encode_training_rows_if_possible, scoring_max_length
from .sessions import RunningSession, SessionArgument, describe_session
from .tracker_lock import TrackerLock


logger = get_logger(__name__)

# Full disk or quota, read-only or failing disk, stale network file. Other errors are not caused by the disk.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


class ForgetTracker(TrainerCallback):
    """Records the losses of the noisy set while a model learns it, and during the safety finetuning that follows (S1 and
    S1+ in Zhao et al. 2024). Use the same tracker in both trainers:

    ```python
    tracker = ForgetTracker()
    Trainer(model, args1, train_dataset=noisy, callbacks=[tracker]).train()
    Trainer(model, args2, train_dataset=safety, callbacks=[tracker]).train()
    tracker.trace.forgetting()
    ```

    A record is taken at the beginning and at the end of each session, and in between as set by `record_steps`. Training is
    not affected: weights, optimizer, random generators and the logs of the trainer are the same as without the tracker. Log
    entries that begin with `forgetfilter/` are added.

    Args:
        noisy (`Dataset`, `DataFrame` or a sequence of dicts, *optional*):
            The rows to track, with `input_ids` (and `labels`, unless the collator creates them), `prompt` and `completion`,
            `messages`, `conversations` or `text`, or in a form that the trainer's collator tokenizes. Defaults to the
            training set of the first session.
        session (`"auto"`, `"noisy"` or `"safety"`, defaults to `"auto"`):
            Which session the training runs are. With `"auto"`, a run is the noisy session if it trains on at least half of
            the tracked rows and if these are more than half of its training set. Otherwise it is the safety session.
            This guess replaces no record: a run on other rows than those of a recorded session is refused. With `"safety"`,
            the training set may be random, because it is not read. A random collator needs `trace_dir`, because the rows of
            `noisy` are collated.
        trace_dir (`str`, *optional*):
            Folder of the trace. An existing trace is continued, so the two sessions may be two processes. Defaults to
            `output_dir/_forgetfilter` of the first session.
        record_steps (`int` or `float`, *optional*):
            Also take a record every `record_steps` optimizer steps. Below 1, it is a fraction of the session.
        stop_early (`bool`, defaults to `False`):
            Whether to stop the safety session (`control.should_training_stop`) once the ranking of a fixed tenth of the
            samples (between 20 and 128) is stable. It is checked 4, 6, 8, 12, 16, 24, … steps after the warm-up, so the
            session stops after step 12 at the earliest. A full record is taken then. It needs 20 samples.
        record_base (`bool`, defaults to `True`):
            Whether to record all rows under the base model. With `False`, only 32 rows are recorded, for the checks that
            training starts from the right models. That saves a pass over the noisy set. The measure `relative`, two of the
            features of a review, and the losses of the base model in exports need all rows.
        rouge1 (`bool`, defaults to `False`):
            Whether to generate greedy completions at each record, for the measure of the paper. Slow. Needs
            `pip install "forgetfilter-callback[rouge]"`.
        max_new_tokens (`int`, *optional*):
            Maximum number of generated tokens with `rouge1`. Defaults to the longest completion of the noisy set.
        max_length (`int`, *optional*):
            Rows with more tokens are truncated: on the right, or on the left with `SFTConfig(truncation_mode="keep_end")`.
            Defaults to the context of the model. The `max_length` of an `SFTConfig` applies too.
        batch_tokens (`int`, *optional*):
            Padded tokens per scoring batch. Defaults to 2048 on a CPU and 16384 elsewhere.
        audit_column (`str`, *optional*):
            A column of `noisy` that is true for unsafe rows, to log AUROC and F1. It does not influence anything else.
        log_rows (`int`, defaults to 0):
            How many of the most forgotten rows to log to Weights & Biases as a table with their texts, at the end of the
            safety session. By default, no texts are logged.
        raise_on_disk_error (`bool`, defaults to `False`):
            Whether a full, failing or read-only disk stops training. By default, an error is logged once, the rest of the
            session is not tracked, and training continues.

    Attributes:
        trace ([`Trace`]):
            The records. Available once the first session has begun.

    Raises:
        ValueError: if an argument has a wrong value.
        EncodingError: if `noisy` is not a table of rows, such as the name of a file.

    When a training run begins, it raises:
        EncodingError: if the rows to track are not samples of causal language modeling, or if there are none.
        RandomRowsError: if a row changes each time it is read. The training set may be random with `session="safety"`.
        UnsupportedDatasetError: if the rows to track have images or other model inputs. Without `noisy`, also if they are
            packed or streamed, or if `get_train_dataloader` returns something else than a `DataLoader`.
        DataError: if a row has no audit label, or with `rouge1=True` if the trainer has no tokenizer.
        TraceError: if the trace in the folder belongs to other data, or if the sessions do not fit together.
        NotImplementedError: if sequences are split (context or sequence parallelism), if weights are divided in another
            way than by FSDP, DeepSpeed ZeRO or tensor parallelism, or with `rouge1=True` if processes share weights.
    """

    def __init__(
        self,
        noisy: Any = None,
        *,
        session: SessionArgument = "auto",
        trace_dir: str | os.PathLike[str] | None = None,
        record_steps: int | float | None = None,
        stop_early: bool = False,
        record_base: bool = True,
        rouge1: bool = False,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        audit_column: str | None = None,
        log_rows: int = 0,
        raise_on_disk_error: bool = False,
    ):
        if session not in get_args(SessionArgument):
            raise ValueError(f"session={session!r} is unknown. Choose 'auto', 'noisy' or 'safety'.")
        check_record_steps(record_steps)
        check_max_length(max_length)
        check_minimum("batch_tokens", batch_tokens, 1)
        check_minimum("max_new_tokens", max_new_tokens, 1)
        check_minimum("log_rows", log_rows, 0)
        check_true_or_false("stop_early", stop_early)
        check_true_or_false("record_base", record_base)
        check_true_or_false("rouge1", rouge1)
        check_true_or_false("raise_on_disk_error", raise_on_disk_error)
        if max_new_tokens is not None and not rouge1:
            raise ValueError(f"max_new_tokens={max_new_tokens} has an effect only with rouge1=True. Pass both or none.")
        self.noisy = None if noisy is None else as_rows(noisy, "`noisy`")
        self.session: SessionArgument = session
        self.trace_dir = trace_dir
        self.record_steps = record_steps
        self.stop_early = stop_early
        self.record_base = record_base
        self.rouge1 = rouge1
        self.max_new_tokens = max_new_tokens
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self.audit_column = audit_column
        self.log_rows = log_rows
        self.raise_on_disk_error = raise_on_disk_error
        self._unsafe = None if audit_column is None else read_audit_labels(noisy, audit_column)
        self._trace: Trace | None = None
        self._running: RunningSession | None = None  # also after an error or an interrupt
        self._finished_sessions: list[Session] = []
        self._ranking_monitor: RankingMonitor | None = None
        self._recorded_step = -1
        self._lock = TrackerLock()  # the main process acquires it
        self._disk_failed = False
        self._recorder: Recorder  # created with the trace
        self._integrations: LoggingIntegrations  # created for each trainer

    @property
    def trace(self) -> Trace:
        """The records so far."""
        if self._trace is None:
            raise TraceError(
                "This tracker has not been used in a training run yet. Pass it to a trainer (`callbacks=[tracker]`) and "
                "train, or open a trace on disk with `Trace.open(folder)`."
            )
        return self._trace

    # ---- events ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._disk_failed and self._trace is None:
            return  # the noisy set was never read, and this run must not be adopted as the noisy session
        with self._survive_disk_errors():
            self._on_train_begin(args, state, control, **kwargs)

    def _on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, processing_class = kwargs["model"], kwargs["processing_class"]
        reason = why_unsupported(model)
        if reason is not None:
            raise NotImplementedError(
                f"ForgetTracker cannot record here: {reason}. Train with DDP, FSDP or DeepSpeed, on one process, or without "
                "it."
            )
        if self.rouge1 and shares_weights(model):
            raise NotImplementedError(
                "rouge1=True generates text, which does not work yet with weights that processes share (FSDP, DeepSpeed "
                "ZeRO-3, tensor parallelism). Use rouge1=False."
            )
        running = self._running
        self._running = self._ranking_monitor = None
        self._recorded_step = -1
        is_retry = running is not None and running.is_retried(args, state, control)
        if running is not None and is_retry:  # the session and its first record stay valid
            session = running.session
        else:
            self._integrations = LoggingIntegrations(args, self.log_rows)
            with preserve_state(model):
                self._integrations.begin(state, control, model)
                session = self._begin_session(args, state, model, processing_class, kwargs["train_dataloader"])
        self._running = RunningSession(session, control, cast(int, state.train_batch_size))
        current = Record(session, state.global_step)
        is_new_session = current.step == 0 and not is_retry
        if not is_new_session:
            self._recorder.drop_after(session, current.step)
        exists = not is_new_session and current in self._recorder.records()
        is_logged = current.step == 0 and (current != BASE_RECORD or self.record_base)
        if exists and is_logged:  # the retry has cleared the log history
            losses = run_on_main(partial(self.trace.mean_losses, current))
            self._integrations.log_record(self.trace, current, losses, state, control)
        elif not exists and (current.step == 0 or current.step >= state.max_steps):
            self._record(args, state, control, **kwargs)
        if self.stop_early and session == "safety":
            self._begin_early_stopping(args, state)

    def _begin_early_stopping(self, args: TrainingArguments, state: TrainerState) -> None:
        if Record("safety", 0) in self._recorder.records():
            self._ranking_monitor = RankingMonitor(self.trace, steps_since_warmup(args, state))
        else:
            logger.warning("The safety session will not stop early: it has no record at step 0 to compare with.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        with self._survive_disk_errors():
            self._on_step_end(args, state, control, **kwargs)

    def _on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = steps_since_warmup(args, state)
        if self._ranking_monitor is not None and state.global_step < state.max_steps and is_check_step(steps):
            with preserve_state(kwargs["model"]):
                losses = token_losses(kwargs["model"], self._ranking_monitor.rows, self.batch_tokens, disable_tqdm=True)
            if self._ranking_monitor.check(steps, losses):
                logger.info(
                    f"The ranking of forgetting is stable. The safety session stops at step {state.global_step} of "
                    f"{state.max_steps}."
                )
                control.should_training_stop = True
        every = record_every(self.record_steps, state)
        is_due = every is not None and state.global_step % every == 0
        if state.global_step >= state.max_steps or control.should_training_stop or is_due:
            self._record(args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "train_runtime" not in kwargs["logs"]:
            return
        # Another callback may have stopped training after `on_step_end`. The final log is the last event before
        # `load_best_model_at_end` replaces the weights; `on_train_end` would be too late, also for runs of MLflow.
        with self._survive_disk_errors():
            if self._recorded_step != state.global_step < state.max_steps:
                self._record(args, state, control, **kwargs)
            if self._running is not None and self._running.session == "safety":
                tokenizer = unwrap_tokenizer(kwargs["processing_class"])
                self._integrations.log_forgetting(self.trace, state, control, self._unsafe, tokenizer)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._running is not None:
            self._finished_sessions.append(self._running.session)
            self._integrations.end(state, control)
        self._running = self._ranking_monitor = None
        self._lock.release()

    @contextmanager
    def _survive_disk_errors(self) -> Iterator[None]:
        """Log a disk error and stop tracking the session, so that training continues."""
        try:
            yield
        except OSError as error:
            if self.raise_on_disk_error or error.errno not in _DISK_ERRORS:
                raise
            self._running = self._ranking_monitor = None
            self._disk_failed = True
            logger.error(
                f"Forgetting is no longer tracked: the trace could not be written ({error}). Training continues without it. "
                "The records written before are intact. Free the disk and resume the session from a checkpoint "
                "(`resume_from_checkpoint`), or run it again. To stop training on disk errors, use "
                "`ForgetTracker(raise_on_disk_error=True)`."
            )

    # ---- sessions ----

    def _begin_session(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
        train_dataloader: torch.utils.data.DataLoader,
    ) -> Session:
        """Open or create the trace, detect which session this run is, and write it to the manifest."""
        run_on_main(partial(self._lock.acquire, self._folder(args)))
        training_rows: EncodedRows | None = None
        if self._trace is None:
            self._trace, tracked_rows = open_trace(
                self._folder(args),
                self.noisy,
                self.session,
                self.max_length,
                continue_trace=self.trace_dir is not None,
                resumed_step=state.global_step,
                args=args,
                model=model,
                processing_class=processing_class,
                train_dataloader=train_dataloader,
            )
            if self.noisy is None:
                training_rows = tracked_rows  # the trace has adopted this training set
            if self._unsafe is not None and tracked_rows is not None:
                # The trace may have been created from the same rows in another order.
                order = pc.index_in(self._trace.rows.ids, value_set=tracked_rows.ids)
                self._unsafe = self._unsafe[order.to_numpy()]
            self._recorder = Recorder(
                self._trace, self.batch_tokens, self.rouge1, self.max_new_tokens, self.record_base
            )
        if training_rows is None:
            length = scoring_max_length(model, args, self.max_length, self._trace.manifest["max_length"])
            training_rows = encode_training_rows_if_possible(self.session, args, model, train_dataloader, length)
        if any(gather_from_all(training_rows is None)):
            training_rows = None
        if training_rows is not None:
            self._trace.rows = self._trace.rows.sharing_memory(training_rows)
        detected = begin_session(
            self._trace,
            self.session,
            training_rows,
            self._finished_sessions,
            args=args,
            state=state,
            model=model,
            tokenizer=unwrap_tokenizer(processing_class),
        )
        session = detected.session
        stop_early = self.stop_early and session == "safety"
        every = record_every(self.record_steps, state)
        base_sampled = session == "noisy" and not self.record_base
        cost = describe_cost(args, state, model, self._trace.rows, training_rows, every, stop_early, base_sampled)
        logger.info(f"ForgetTracker: {describe_session(detected, training_rows, self._trace.rows)} {cost}")
        return session

    def _folder(self, args: TrainingArguments) -> Path:
        if self._trace is not None:
            return self._trace.folder
        return Path(self.trace_dir if self.trace_dir is not None else Path(cast(str, args.output_dir)) / TRACE_FOLDER)

    # ---- records ----

    def _record(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take a record of the running session at this step and log its statistics."""
        if self._running is None:
            return
        model = kwargs["model"]
        record = Record(self._running.session, state.global_step)
        is_session_end = record.step in (0, state.max_steps) or control.should_training_stop
        with preserve_state(model):
            tokenizer = unwrap_tokenizer(kwargs["processing_class"])
            losses = self._recorder.record(record, args, model, tokenizer, is_session_end)
            is_adapted = isinstance(unwrapped(model), PeftModel)
            if record == Record("safety", 0) and is_adapted and not self._recorder.has_base():
                self._recorder.record_base(args, model)
        self._recorded_step = state.global_step
        if record != BASE_RECORD or self.record_base:  # the mean of a few rows cannot be compared with later ones
            self._integrations.log_record(self.trace, record, losses, state, control)
