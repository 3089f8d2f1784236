"""[`Recorder`]: takes one record of a model for a trace, or repeats the one it knows, and looks at what it says."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from accelerate.logging import get_logger
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..errors import TraceError
from ..measures.common import mean_losses
from ..measures.relative import MIN_LEARNED
from ..scoring.scores import Scores
from ..scoring.token_losses import window_scores
from ..trace.records import Record, Session, has_states
from ..trace.trace import Trace
from ..utils.distributed import gather_from_all, run_on_all, run_on_main, shard_indices
from ..utils.model_state import model_digest


logger = get_logger(__name__)  # says things once, on the main process

# Nats per token: adapters that have taught less than this on the average are new.
MIN_ADAPTED = 0.01


class Recorder:
    """Writes records into `trace`. The caller holds the model [`~model_state.untouched`].

    Args:
        trace ([`Trace`]):
            Where they go.
        batch_tokens, with_rouge1, max_new_tokens:
            As in [`ForgetTracker`].
    """

    def __init__(self, trace: Trace, batch_tokens: int | None, with_rouge1: bool, max_new_tokens: int | None):
        self._trace = trace
        self._batch_tokens = batch_tokens
        self._with_rouge1 = with_rouge1
        self._max_new_tokens = max_new_tokens
        self._last: Record | None = None
        self._last_digest: str | None = None  # of the model at that record
        self._last_means = np.zeros(0)

    def record(
        self,
        record: Record,
        args: TrainingArguments,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | None,
        at_an_end: bool,
    ) -> np.ndarray:
        """Takes a record, or repeats the last one if nothing has changed.

        Whether something has is looked at only where S1 ends and S1+ begins: elsewhere, something always has.

        Returns:
            `np.ndarray` of shape `(samples,)`, float64: mean losses, nats per token.
        """
        digest = model_digest(model) if at_an_end and has_states(record) else None
        unchanged = digest is not None and digest == self._last_digest
        if all(gather_from_all(unchanged)) and self._last in self.records():
            assert self._last is not None
            means = self._last_means
            if record == Record("safety", 0):
                self._check_learnt(means)
            self._say_dropped(
                record, run_on_main(partial(self._trace.repeat, self._last, record, restart=record.step == 0))
            )
        else:
            means = self._take(record, args, model, processing_class)
        self._last, self._last_digest, self._last_means = record, digest, means
        return means

    def records(self) -> list[Record]:
        """Those of the trace, as the main process sees its folder."""
        return run_on_main(self._trace.records)

    def means(self, record: Record) -> np.ndarray:
        """Mean losses of a record that was taken earlier."""
        return mean_losses(self._trace.token_losses(record), self._trace.rows.loss_offsets)

    def drop_after(self, session: Session, step: int) -> None:
        """Deletes what an earlier run of the session left beyond `step`, and says so."""
        self._say_dropped(Record(session, step), run_on_main(partial(self._trace.drop_after, session, step)))

    def _say_dropped(self, start: Record, dropped: list[Record]) -> None:
        if dropped:
            names = ", ".join(f"{record.session} step {record.step}" for record in dropped)
            logger.warning(f"{start.session} starts anew from step {start.step}: dropped the later records {names}.")

    def record_base(self, args: TrainingArguments, model: PeftModel) -> None:
        """The base model's record, for relative forgetting and the check of M0: the model with its adapters off.

        Taken where that is M0. It is not where adapters have taught nothing yet (they are new, upon a model that has learnt
        the noisy set otherwise), or where they have changed the base model itself (biases, PiSSA and its like).
        """
        settings = [model.peft_config[name].to_dict() for name in model.active_adapters]
        if any(each.get("bias", "none") != "none" for each in settings):
            return
        if any(each.get("init_lora_weights", True) not in (True, "gaussian") for each in settings):
            return
        with model.disable_adapter():
            scores = [*window_scores(model, self._trace.rows, self._batch_tokens, disable_tqdm=hide_progress(args))]
        base = mean_losses(np.concatenate([window.losses for window in scores]), self._trace.rows.loss_offsets)
        if np.nanmean(base - self._last_means) > MIN_ADAPTED:
            run_on_main(partial(self._trace.append, Record("noisy", 0), scores))

    def _take(
        self,
        record: Record,
        args: TrainingArguments,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | None,
    ) -> np.ndarray:
        name = f"{record.session} step {record.step}"
        rows = self._trace.rows
        completions, rouge1_scores = None, None
        if self._with_rouge1:
            from ..measures.rouge import rouge1
            from ..scoring.generation import greedy_completions, split_prompts

            if processing_class is None:
                raise ValueError("ROUGE-1 needs a tokenizer. Pass `processing_class=tokenizer` to the trainer.")
            prompts, references = split_prompts(rows, processing_class)
            longest = int(np.diff(rows.loss_offsets).max())
            complete = partial(
                greedy_completions,
                model,
                processing_class,
                [prompts[index] for index in shard_indices(len(prompts))],
                self._max_new_tokens if self._max_new_tokens is not None else longest,
                disable_tqdm=hide_progress(args),
                description=f"Generating {name}",
            )
            completions = [text for texts in run_on_all(complete) for text in texts]
            rouge1_scores = rouge1(completions, references)
        means: list[np.ndarray] = []
        scores = window_scores(
            model,
            rows,
            self._batch_tokens,
            disable_tqdm=hide_progress(args),
            description=f"Recording {name}",
            with_states=has_states(record),
        )
        looked_at = self._looked_at(record, scores, means)
        append = partial(self._trace.append, record, looked_at, completions, rouge1_scores, restart=record.step == 0)
        self._say_dropped(record, run_on_main(append, drain=looked_at))
        return np.concatenate(means)

    def _looked_at(self, record: Record, scores: Iterator[Scores], means: list[np.ndarray]) -> Iterator[Scores]:
        """Passes scores on, notes `means`, and warns or refuses (then nothing is written) once it has seen them all."""
        diverged = 0
        for window, scored in zip(self._trace.rows.windows(), scores, strict=True):
            diverged += int((~np.isfinite(scored.losses)).sum())
            means.append(mean_losses(scored.losses, window.loss_offsets))
            yield scored
        if diverged:
            logger.warning(
                f"{diverged} of {int(self._trace.rows.loss_offsets[-1])} token losses at {record.session} step "
                f"{record.step} are not finite: the model diverges. Lower the learning rate. Samples with such losses are "
                "kept."
            )
        if record == Record("safety", 0):
            self._check_learnt(np.concatenate(means))

    def _check_learnt(self, means: np.ndarray) -> None:
        """S1+ must start from the model that S1 made: compares its first mean losses with S1's, where the trace has them."""
        of_s1 = [record for record in self._trace.records() if record.session == "noisy"]
        if len(of_s1) < 2 or of_s1[0].step != 0:
            return
        base, learnt, here = (
            float(np.nanmean(these)) for these in (self.means(of_s1[0]), self.means(of_s1[-1]), means)
        )
        figures = f"mean loss of the noisy set: {base:.3f} before S1, {learnt:.3f} after it, {here:.3f} now"
        if base - learnt < MIN_LEARNED:
            logger.warning(
                f"S1 has hardly taught the noisy set ({figures} nats per token), so there is little to forget. Train S1 "
                "longer, or with a higher learning rate."
            )
        elif not base - here > 0.25 * (base - learnt):
            raise TraceError(
                f"S1+ does not start from the model that S1 made ({figures} nats per token): what was not learnt cannot "
                "be forgotten. Start the safety session from S1's model (its last checkpoint, or the same object)."
            )


def hide_progress(args: TrainingArguments) -> bool:
    """Whether this process shows no progress bars."""
    return args.disable_tqdm or args.process_index > 0
