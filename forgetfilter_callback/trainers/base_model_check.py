"""TODO"""

from __future__ import annotations

from typing import Any

import numpy as np
from accelerate.logging import get_logger
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..measures.common import mean_losses
from ..scoring.token_losses import token_losses
from ..trace.trace import Trace
from ..utils.model_state import preserve_state, why_unsupported


logger = get_logger(__name__)  # says things once, on the main process

# M0 check: on so many samples, the mean loss may differ by so much (nats per token). Loading M0 in another precision
# moves it by a hundredth; one epoch of finetuning by a tenth and more.
CHECKED_SAMPLES = 32
MAX_LOSS_DIFFERENCE = 0.1


class BaseModelCheck(TrainerCallback):
    """Refuses to train a model that is not the M0 of the trace: training and `get_peft_model` change models in place."""

    def __init__(self, trace: Trace | None):
        self.trace = trace

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            return
        reason = why_unsupported(kwargs["model"])
        if reason is not None:
            logger.warning(f"It could not be checked that this model is the base model ({reason}).")
            return
        model = kwargs["model"]
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            logger.warning(
                "It could not be checked that this model is the base model: its prompt is drawn anew each time."
            )
            return
        if self.trace is None or self.trace.base_record is None:
            logger.warning(
                "There is no record of the base model (step 0 of S1), so it could not be checked that this model is the one "
                "from before the noisy set was learnt."
            )
            return
        offsets = self.trace.rows.loss_offsets
        scorable = np.flatnonzero(np.diff(offsets))
        checked = scorable[np.linspace(0, len(scorable) - 1, min(CHECKED_SAMPLES, len(scorable)), dtype=int)]
        base = mean_losses(self.trace.token_losses(self.trace.base_record), offsets)[checked]
        some = self.trace.rows.select(checked)
        with preserve_state(kwargs["model"]):
            losses = token_losses(kwargs["model"], some, disable_tqdm=True)
        here = mean_losses(losses, some.loss_offsets)
        difference = float(np.mean(np.abs(here - base)))
        if not difference <= MAX_LOSS_DIFFERENCE:
            raise ValueError(
                f"This is not the base model that the trace began with: on {len(checked)} samples the mean loss is "
                f"{np.mean(here):.3f} nats per token, the base model's was {np.mean(base):.3f} (mean difference "
                f"{difference:.3f}, allowed {MAX_LOSS_DIFFERENCE}). Training and `get_peft_model` change a model in place: "
                "load it afresh with `from_pretrained`, or unload the adapter and add a new one."
            )
