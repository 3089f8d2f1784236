"""[`BaseModelCheck`]: check that finetuning on the kept rows starts from the base model."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
from accelerate.logging import get_logger
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..callbacks.sessions import has_smaller_batch
from ..errors import ForgetFilterError
from ..measures.common import mean_losses
from ..scoring.token_losses import token_losses
from ..trace.base_sample import base_sample
from ..trace.records import BASE_RECORD
from ..trace.trace import Trace
from ..utils.counted import counted
from ..utils.distributed import run_on_main
from ..utils.model_state import preserve_state
from ..utils.parallelism import unwrapped, why_unsupported
from ..utils.row_numbers import describe_rows


logger = get_logger(__name__)

# Nats per token. Loading the base model in another precision changes the mean loss by about 0.01; an epoch of finetuning
# changes it by 0.1 or more.
MAX_LOSS_DIFFERENCE = 0.1


class BaseModelCheck(TrainerCallback):
    """Compares the model with the trace's record of the base model before the first step.

    Training and `get_peft_model` change a model in place, so the model that a user passes may not be the base model any
    more.

    Args:
        trace ([`Trace`], *optional*):
            The trace. Without a record of the base model, a warning says that the model was not checked.

    Raises:
        ForgetFilterError: when training begins, if the mean losses of 32 samples differ by more than 0.1 nats per token on
            average, or if this model has no finite loss and the base model had.
    """

    def __init__(self, trace: Trace | None):
        self.trace = trace
        self._batch_size = 0  # of the latest attempt

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # With a smaller batch, the trainer continues with the model that it has trained so far.
        if state.global_step == 0 and not has_smaller_batch(args, state, self._batch_size):
            self._check(kwargs["model"])
        self._batch_size = cast(int, state.train_batch_size)

    def _check(self, model: PreTrainedModel) -> None:
        reason = run_on_main(partial(self._why_unchecked, model))
        if reason is not None:
            logger.warning(f"Could not check that this model is the base model: {reason}.")
            return
        assert self.trace is not None
        expected, sample = run_on_main(partial(_base_losses, self.trace))
        checked = sample if sample is not None else base_sample(self.trace.rows)
        rows = self.trace.rows.select(checked)
        with preserve_state(model):
            losses = mean_losses(token_losses(model, rows, disable_tqdm=True), rows.loss_offsets)
        _compare(losses, expected[checked], checked)

    def _why_unchecked(self, model: PreTrainedModel) -> str | None:
        reason = why_unsupported(model)
        if reason is not None:
            return reason
        whole = unwrapped(model)
        if isinstance(whole, PeftModel) and whole.active_peft_config.is_prompt_learning:
            return "its prompt embeddings are initialized at random each time"
        if self.trace is None or BASE_RECORD not in self.trace.records():
            return "there is no record of it (step 0 of the noisy session)"
        return None


def _base_losses(trace: Trace) -> tuple[np.ndarray, np.ndarray | None]:
    """The mean losses of the base model, and the rows that its record is limited to."""
    return trace.mean_losses(BASE_RECORD), trace.sample(BASE_RECORD)


def _compare(losses: np.ndarray, expected: np.ndarray, rows: np.ndarray) -> None:
    """Compare the mean losses of the `rows` under this model with those under the base model, `expected`.

    Rows whose loss is not finite under one of the models are not compared.

    Raises:
        ForgetFilterError: if they differ by more than 0.1 nats per token on average, or if this model has no finite loss
            and the base model had.
    """
    compared = np.isfinite(losses) & np.isfinite(expected)
    not_finite = [
        f"under {model}, the loss of {describe_rows(rows[~np.isfinite(values)])} of the prepared noisy set is not "
        "finite"
        for model, values in (("this model", losses), ("the base model of the trace", expected))
        if not np.isfinite(values).all()
    ]
    if not compared.any() and np.isfinite(expected).any():
        raise ForgetFilterError(
            f"This model cannot be compared with the base model of the trace: {'; '.join(not_finite)}. Its weights are "
            "damaged, or its numbers overflow: load the base model again, in bfloat16 or float32."
        )
    if not compared.any():
        logger.warning(f"Could not check that this model is the base model: {'; '.join(not_finite)}.")
        return
    difference = float(np.mean(np.abs(losses - expected)[compared]))
    if difference > MAX_LOSS_DIFFERENCE:
        raise ForgetFilterError(
            f"This model is not the base model of the trace. On {counted(int(compared.sum()), 'row')} its mean loss is "
            f"{np.mean(losses[compared]):.3f} nats per token, and the base model's was "
            f"{np.mean(expected[compared]):.3f} (mean difference {difference:.3f}, allowed {MAX_LOSS_DIFFERENCE}). "
            "Training and `get_peft_model` change a model in place: load the base model again with `from_pretrained`, or "
            "unload the adapter and add a new one."
        )
    if not_finite:
        logger.warning(f"The check of the base model leaves rows out: {'; '.join(not_finite)}.")
