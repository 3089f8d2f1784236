"""The sessions as one run: M0 → S1 → S1+ → filter → M0 again on what is left (Zhao et al. 2024, Algorithm 1)."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..callbacks.tracker import ForgetTracker
from ..measures.names import DEFAULT_MEASURE, Measure
from ..thresholds import Threshold
from ..trainers.filtered_trainer import FilteredTrainer


class ForgetFilter:
    """ForgetFilter from a noisy set to a model finetuned on what is left of it.

    ```python
    run = ForgetFilter(load_model, noisy, safety, TrainingArguments("out"), data_collator=collator)
    run.finetune()          # S1: M0 → M1
    run.safety_finetune()   # S1+: M1 → M2
    trainer = run.refit()   # M0 again, on the rows that were not forgotten
    ```

    Args:
        load_model (`Callable[[], PreTrainedModel]`):
            Loads M0. It is called twice, since training changes a model in place.
        noisy (`Dataset`):
            The finetuning data, unsafe examples hidden in it, as the trainer takes it.
        safety (`Dataset`):
            Safe examples, none of them in `noisy`.
        args ([`~transformers.TrainingArguments`]):
            For S1 and for the last finetuning. Each session writes into a folder of its own in `output_dir`.
        safety_args ([`~transformers.TrainingArguments`], *optional*):
            For S1+; `args` by default.
        tracker ([`ForgetTracker`], *optional*):
            One with other settings than the default.
        measure, threshold, share:
            As in [`FilteredTrainer`].
        trainer_kwargs:
            Passed to every trainer (`data_collator`, `processing_class`, `callbacks`, …).
    """

    def __init__(
        self,
        load_model: Callable[[], PreTrainedModel],
        noisy: Dataset,
        safety: Dataset,
        args: TrainingArguments,
        safety_args: TrainingArguments | None = None,
        tracker: ForgetTracker | None = None,
        measure: Measure = DEFAULT_MEASURE,
        threshold: Threshold = "auto",
        fraction: float | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        **trainer_kwargs: Any,
    ):
        self.load_model = load_model
        self.noisy = noisy
        self.safety = safety
        self.args = args
        self.safety_args = safety_args if safety_args is not None else args
        self.tracker = tracker if tracker is not None else ForgetTracker()
        self.measure: Measure = measure
        self.threshold = threshold
        self.fraction = fraction
        self.callbacks = callbacks or []
        self.trainer_kwargs = trainer_kwargs
        self.model: PreTrainedModel | None = None

    def finetune(self, resume_from_checkpoint: str | bool | None = None) -> PreTrainedModel:
        """S1: finetunes M0 on the noisy set. Returns M1."""
        self.model = self.load_model()
        self._trainer("s1", self.args, self.model, self.noisy).train(resume_from_checkpoint)
        return self.model

    def safety_finetune(self, resume_from_checkpoint: str | bool | None = None) -> PreTrainedModel:
        """S1+: finetunes M1, in place, on the safety set. Returns M2."""
        if self.model is None:
            raise RuntimeError("S1+ starts from S1's model. Call `finetune()` first.")
        self._trainer("s1plus", self.safety_args, self.model, self.safety).train(resume_from_checkpoint)
        return self.model

    def refit(self) -> FilteredTrainer:
        """Finetunes M0 again on the rows that were not forgotten. Returns the trainer, with its model and its account."""
        self.model = None
        trainer = FilteredTrainer(
            self.load_model(),
            self._args_in("filtered", self.args),
            train_dataset=self.noisy,
            forgetting=self.tracker,
            measure=self.measure,
            threshold=self.threshold,
            fraction=self.fraction,
            callbacks=list(self.callbacks),
            **self.trainer_kwargs,
        )
        trainer.train()
        return trainer

    def _trainer(self, folder: str, args: TrainingArguments, model: PreTrainedModel, rows: Dataset) -> Trainer:
        callbacks = [*self.callbacks, self.tracker]
        return Trainer(
            model, self._args_in(folder, args), train_dataset=rows, callbacks=callbacks, **self.trainer_kwargs
        )

    def _args_in(self, folder: str, args: TrainingArguments) -> TrainingArguments:
        args = copy.deepcopy(args)
        args.output_dir = os.path.join(args.output_dir, folder)
        return args
