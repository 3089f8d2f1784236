"""[`Recorder`]: compute one record of a model and write it to the trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import numpy as np
from accelerate.logging import get_logger
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..errors import DataError, TraceError
from ..measures.common import all_finite, mean_losses
from ..scoring.scores import Scores
from ..scoring.token_losses import token_losses, window_scores
from ..trace.base_sample import BASE_SAMPLES, base_sample
from ..trace.records import BASE_RECORD, Record, Session
from ..trace.schema import WITHOUT_STATES
from ..trace.trace import Trace
from ..utils.counted import counted
from ..utils.distributed import gather_from_all, run_on_all, run_on_main, shard_indices
from ..utils.model_state import model_digest
from ..utils.row_numbers import describe_rows
from .session_rows import hide_progress
from .start_checks import check_learned, warn_if_start_differs


logger = get_logger(__name__)

# Nats per token. Adapters whose mean effect on the loss is smaller have not been trained yet.
MIN_ADAPTED = 0.01


class _NotLearnedError(Exception):
    """The adapter has not learned anything, so the model without it may not be the base model."""


class Recorder:
    """Takes records and writes them to `trace`. Call it inside [`preserve_state`].

    Args:
        trace ([`Trace`]):
            The trace to write to.
        batch_tokens, with_rouge1, max_new_tokens, record_base:
            As in [`ForgetTracker`].
    """

    def __init__(
        self,
        trace: Trace,
        batch_tokens: int | None,
        with_rouge1: bool,
        max_new_tokens: int | None,
        record_base: bool = True,
    ):
        self._trace = trace
        self._record_base = record_base
        self._batch_tokens = batch_tokens
        self._with_rouge1 = with_rouge1
        self._max_new_tokens = max_new_tokens
        self._last_record: Record | None = None
        self._last_digest: str | None = None  # of the model at the last record
        self._last_losses = np.zeros(0)
        self._lacks_states = False  # a warning has said so

    def record(
        self,
        record: Record,
        args: TrainingArguments,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        is_session_end: bool,
    ) -> np.ndarray:
        """Take a record, or copy the last one if the model has certainly not changed since.

        Models are compared only between the end of the noisy session and the beginning of the safety session, and only where
        [`model_digest`] can hash them: not under mixed precision and not in SFTTrainer.

        Returns:
            `np.ndarray` of shape `(samples,)`, float64: mean losses, in nats per token.
        """
        earlier = run_on_main(partial(self._earlier_losses, record))
        digest = model_digest(model) if is_session_end and record.has_states else None
        digests = gather_from_all((digest, self._last_digest))
        can_be_copied = all(now is not None for now, _ in digests)
        unchanged = all(now == last for now, last in digests)
        if can_be_copied and unchanged and self._last_record in self.records():
            assert self._last_record is not None
            losses = self._last_losses
            if record == Record("safety", 0):
                run_on_main(partial(check_learned, self._trace, losses))
            copy_record = partial(self._trace.copy_record, self._last_record, record, restart=record.step == 0)
            self._log_superseded(record, run_on_main(copy_record))
        else:
            # Only the first record of the safety session is read for its states, and it may be a copy of this one.
            with_states = record == Record("safety", 0) or can_be_copied
            losses = self._score_and_write(record, args, model, tokenizer, with_states)
        if earlier is not None:
            warn_if_start_differs(record, earlier, losses)
        self._last_record, self._last_digest, self._last_losses = record, digest, losses
        return losses

    def has_base(self) -> bool:
        """Whether the trace holds the base model: all rows, or with `record_base=False` at least some."""
        return run_on_main(self._has_base)

    def _has_base(self) -> bool:
        if self._record_base:
            with suppress(TraceError):  # a damaged record is reported where it is read
                return self._trace.base_record is not None
        return BASE_RECORD in self._trace.records()

    def records(self) -> list[Record]:
        """The records in the trace's folder, as the main process sees them."""
        return run_on_main(self._trace.records)

    def drop_after(self, session: Session, step: int) -> None:
        """Move the records that an earlier run of this session wrote after `step` into `superseded`."""
        self._log_superseded(Record(session, step), run_on_main(partial(self._trace.drop_after, session, step)))

    def record_base(self, args: TrainingArguments, model: PeftModel) -> None:
        """Record the base model by disabling the adapter, for relative forgetting and the check of the base model.

        Skipped if the model without its adapter is not the base model: if the adapter has not learned anything yet (a new
        adapter on a model that has learned the noisy set), or if it has changed the base weights (trained biases, PiSSA and
        similar initializations).
        """
        settings = [model.peft_config[name].to_dict() for name in model.active_adapters]
        if any(adapter.get("bias", "none") != "none" for adapter in settings):
            return
        if any(adapter.get("init_lora_weights", True) not in (True, "gaussian") for adapter in settings):
            return
        sample = self._base_sample(BASE_RECORD)
        with model.disable_adapter():
            checked_scores = self._check_base(self._scores(BASE_RECORD, args, model, sample))
            append = partial(self._trace.append, BASE_RECORD, checked_scores, sample=sample)
            with suppress(_NotLearnedError):
                run_on_main(append, drain=checked_scores)
                logger.warning(
                    "The trace has no record of the model before noisy finetuning, so this model without its adapter was "
                    "recorded. If noisy finetuning continued an earlier adapter, this is the wrong model: track noisy "
                    "finetuning, too."
                )

    def _base_sample(self, record: Record) -> np.ndarray | None:
        """The rows that `record` is limited to: 32 for the base model with `record_base=False`. `None` for all rows."""
        is_limited = record == BASE_RECORD and not self._record_base and len(self._trace.rows) > BASE_SAMPLES
        return base_sample(self._trace.rows) if is_limited else None

    def _scores(
        self,
        record: Record,
        args: TrainingArguments,
        model: nn.Module,
        sample: np.ndarray | None,
        with_states: bool = False,
    ) -> Iterator[Scores]:
        """The scores of all rows or of `sample`, one item per window of all rows."""
        if sample is not None:
            return self._sample_scores(model, sample)
        return window_scores(
            model,
            self._trace.rows,
            self._batch_tokens,
            disable_tqdm=hide_progress(args),
            description=f"Recording {record}",
            with_states=with_states,
        )

    def _sample_scores(self, model: nn.Module, sample: np.ndarray) -> Iterator[Scores]:
        """The scores of the rows of `sample`, one item per window of all rows. The losses of the other rows are NaN."""
        chosen = self._trace.rows.select(sample)
        losses = token_losses(model, chosen, self._batch_tokens, disable_tqdm=True)
        losses_of = dict(zip(sample.tolist(), np.split(losses, chosen.loss_offsets[1:-1]), strict=True))
        start = 0
        for window in self._trace.rows.windows():
            window_losses = np.full(window.loss_offsets[-1], np.nan, np.float32)
            for index in sample[(start <= sample) & (sample < start + len(window))].tolist():
                first, stop = window.loss_offsets[index - start : index - start + 2]
                window_losses[first:stop] = losses_of[index]
            yield Scores(window_losses)
            start += len(window)

    def _check_base(self, scores: Iterator[Scores]) -> Iterator[Scores]:
        """Yield each item of `scores`. Then raise an error if the adapter has not learned anything.

        An error here prevents the record from being written.
        """
        means: list[np.ndarray] = []
        for window, window_score in zip(self._trace.rows.windows(), scores, strict=True):
            means.append(mean_losses(window_score.losses, window.loss_offsets))
            yield window_score
        base_losses = np.concatenate(means)
        compared = np.isfinite([base_losses, self._last_losses]).all(axis=0)
        if not compared.any() or (base_losses - self._last_losses)[compared].mean() <= MIN_ADAPTED:
            raise _NotLearnedError

    def _earlier_losses(self, record: Record) -> np.ndarray | None:
        """The mean losses of the record that a session replaces when it starts again, if there is one."""
        if record.step == 0 and record in self._trace.records():
            with suppress(TraceError):  # a damaged record may be replaced
                return self._trace.mean_losses(record)
        return None

    def _score_and_write(
        self,
        record: Record,
        args: TrainingArguments,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        with_states: bool,
    ) -> np.ndarray:
        sample = self._base_sample(record)
        completions, rouge1_scores = None, None
        if self._with_rouge1 and sample is None:
            completions, rouge1_scores = self._generate(record, args, model, tokenizer)
        scores = self._scores(record, args, model, sample, with_states)
        losses: list[np.ndarray] = []
        checked_scores = self._check_scores(record, scores, losses, with_states, sample)
        restart = record.step == 0
        append = partial(
            self._trace.append, record, checked_scores, completions, rouge1_scores, restart=restart, sample=sample
        )
        self._log_superseded(record, run_on_main(append, drain=checked_scores))
        return np.concatenate(losses)

    def _generate(
        self,
        record: Record,
        args: TrainingArguments,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> tuple[list[str], np.ndarray]:
        """Generate a greedy completion of each sample and score it with ROUGE-1."""
        from ..measures.rouge import rouge1  # needs the extra `rouge`
        from ..scoring.generation import greedy_completions, split_prompts

        if tokenizer is None:
            raise DataError("rouge1=True needs a tokenizer. Pass `processing_class=tokenizer` to the trainer.")
        prompts, references = split_prompts(self._trace.rows, tokenizer)
        longest_reference = int(np.diff(self._trace.rows.loss_offsets).max())
        generate = partial(
            greedy_completions,
            model,
            tokenizer,
            [prompts[index] for index in shard_indices(len(prompts))],
            self._max_new_tokens if self._max_new_tokens is not None else longest_reference,
            disable_tqdm=hide_progress(args),
            description=f"Generating {record}",
        )
        completions = [text for shard in run_on_all(generate) for text in shard]
        return completions, rouge1(completions, references)

    def _check_scores(
        self,
        record: Record,
        scores: Iterator[Scores],
        losses: list[np.ndarray],
        with_states: bool,
        sample: np.ndarray | None,
    ) -> Iterator[Scores]:
        """Yield each item of `scores` and append its mean losses to `losses`. Then warn about losses that are not finite,
        and once about missing states.

        An error here prevents the record from being written.
        """
        finite = []
        for window, window_score in zip(self._trace.rows.windows(), scores, strict=True):
            finite.append(all_finite(window_score.losses, window.loss_offsets))
            losses.append(mean_losses(window_score.losses, window.loss_offsets))
            yield window_score
            if with_states and window_score.states is None and not self._lacks_states:
                logger.warning(WITHOUT_STATES)
                self._lacks_states = True
        recorded = np.arange(len(self._trace.rows)) if sample is None else sample
        not_finite = recorded[~np.concatenate(finite)[recorded]]
        if len(not_finite):
            logger.warning(
                f"The loss of {len(not_finite):,} of {counted(len(recorded), 'row')} is not finite under the "
                f"model of this record ({record}): {describe_rows(not_finite)} of the prepared noisy set. The model "
                "diverges or overflows on them. Look at these rows (`trace.rows`), lower the learning rate, or train in "
                "bfloat16 or float32. Such rows are kept."
            )
        if record == Record("safety", 0):
            run_on_main(partial(check_learned, self._trace, np.concatenate(losses)))

    def _log_superseded(self, start: Record, superseded: list[Record]) -> None:
        if superseded:
            logger.warning(
                f"The {start.session} session restarts at step {start.step}. Its older records and those of later sessions "
                f"were moved to {self._trace.folder / 'superseded'}: {'; '.join(map(str, superseded))}."
            )
