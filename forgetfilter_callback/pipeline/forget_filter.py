"""[`ForgetFilter`]: all training runs of the method as one object (Zhao et al. 2024, Algorithm 1)."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..callbacks.tracker import ForgetTracker
from ..data.as_rows import as_rows
from ..filtering.config import FilterConfig, filter_config_or_default
from ..trace.records import Session
from ..trainers.filter_mixin import explain_filter_settings
from ..trainers.filtered_trainer import FilteredTrainer


class ForgetFilter:
    """Noisy finetuning, safety finetuning, and finetuning of the base model on the kept rows.

    ```python
    pipeline = ForgetFilter(load_model, noisy, safety, TrainingArguments("out"), data_collator=collator)
    pipeline.finetune()          # the base model learns the noisy set
    pipeline.safety_finetune()   # then it is finetuned on the safety set
    trainer = pipeline.refit()   # the base model learns the rows that were not forgotten
    ```

    Args:
        load_model (`Callable[[], PreTrainedModel]`):
            Loads the base model. It is called twice, because training changes a model in place.
        noisy (`Dataset`, `torch.utils.data.Dataset` or `DataFrame`):
            The finetuning data with hidden unsafe examples, as the trainer takes it.
        safety (`Dataset`, `torch.utils.data.Dataset` or `DataFrame`):
            Safe examples that are not in `noisy`.
        args ([`~transformers.TrainingArguments`]):
            Arguments of the noisy session and of the refit. The runs write to the folders `noisy`, `safety` and `filtered`
            in `args.output_dir`.
        safety_args ([`~transformers.TrainingArguments`], *optional*):
            Arguments of the safety session. Defaults to `args`.
        tracker ([`ForgetTracker`], *optional*):
            Defaults to `ForgetTracker()`. Its `session` is set by [`finetune`] and [`safety_finetune`].
        filter_config ([`FilterConfig`], *optional*):
            Which samples are removed.
        callbacks (`Sequence[TrainerCallback]`, *optional*):
            Further callbacks of all three trainers.
        trainer_kwargs:
            Further arguments of all three trainers (`data_collator`, `processing_class`, …).

    Raises:
        EncodingError: if `noisy` or `safety` is not a table of rows, or has no rows.
        TypeError: if `filter_config` is something else.
    """

    def __init__(
        self,
        load_model: Callable[[], PreTrainedModel],
        noisy: Dataset | torch.utils.data.Dataset | pd.DataFrame,
        safety: Dataset | torch.utils.data.Dataset | pd.DataFrame,
        args: TrainingArguments,
        safety_args: TrainingArguments | None = None,
        tracker: ForgetTracker | None = None,
        filter_config: FilterConfig | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        **trainer_kwargs: Any,
    ):
        self.load_model = load_model
        self.noisy = as_rows(noisy, "`noisy`")
        self.safety = as_rows(safety, "`safety`")
        self.args = args
        self.safety_args = safety_args if safety_args is not None else args
        self.tracker = tracker if tracker is not None else ForgetTracker()
        self.filter_config = filter_config_or_default(filter_config)
        if self.filter_config.measure == "relative" and not self.tracker.record_base:
            raise ValueError("measure='relative' needs all rows under the base model. Leave out `record_base=False`.")
        self.callbacks = callbacks or []
        self.trainer_kwargs = trainer_kwargs
        self.model: PreTrainedModel | None = None

    def finetune(self, resume_from_checkpoint: str | bool | None = None) -> PreTrainedModel:
        """Finetune the base model on the noisy set. Returns the model after noisy finetuning.

        Raises:
            ForgetFilterError: as in [`ForgetTracker`].
            TypeError: if one of `trainer_kwargs` is not an argument of `Trainer`.
        """
        self.model = self.load_model()
        self._trainer("noisy", self.args, self.model, self.noisy).train(resume_from_checkpoint)
        return self.model

    def safety_finetune(self, resume_from_checkpoint: str | bool | None = None) -> PreTrainedModel:
        """Finetune that model, in place, on the safety set. Returns the model after safety finetuning.

        Raises:
            RuntimeError: if [`finetune`] was not called before.
            ForgetFilterError: as in [`ForgetTracker`].
        """
        if self.model is None:
            raise RuntimeError(
                "Safety finetuning starts from the model after noisy finetuning. Call `finetune()` first."
            )
        self._trainer("safety", self.safety_args, self.model, self.safety).train(resume_from_checkpoint)
        return self.model

    def refit(self, resume_from_checkpoint: str | bool | None = None) -> FilteredTrainer:
        """Finetune the base model on the rows that were not forgotten. Returns the trainer, with its `filter_result`.

        Raises:
            ForgetFilterError: as in [`FilteredTrainer`].
        """
        self.model = None
        trainer = FilteredTrainer(
            self.load_model(),
            self._args_in_folder("filtered", self.args),
            train_dataset=self.noisy,
            forgetting=self.tracker,
            filter_config=self.filter_config,
            callbacks=list(self.callbacks),
            **self.trainer_kwargs,
        )
        trainer.train(resume_from_checkpoint)
        return trainer

    def _trainer(self, session: Session, args: TrainingArguments, model: PreTrainedModel, rows: Dataset) -> Trainer:
        args = self._args_in_folder(session, args)
        self.tracker.session = session  # known here, so the tracker does not guess it
        callbacks = [*self.callbacks, self.tracker]
        with explain_filter_settings(self.trainer_kwargs):
            return Trainer(model, args, train_dataset=rows, callbacks=callbacks, **self.trainer_kwargs)

    def _args_in_folder(self, folder: str, args: TrainingArguments) -> TrainingArguments:
        args = copy.deepcopy(args)
        args.output_dir = os.path.join(cast(str, args.output_dir), folder)
        return args
