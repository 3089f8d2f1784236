"""Log the statistics of a record: to the trainer's log history, TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

from typing import cast

import numpy as np
from sklearn.metrics import f1_score, roc_auc_score
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..filtering.thresholds import find_threshold
from ..measures.names import DEFAULT_MEASURE


def summarize_record(
    losses: np.ndarray,
    forgetting: np.ndarray | None = None,
    unsafe: np.ndarray | None = None,
    nats_per_unit: float | None = None,
) -> dict[str, float]:
    """Statistics of one record.

    Args:
        losses (`np.ndarray` of shape `(samples,)`):
            Mean loss of each sample, in nats per token.
        forgetting (`np.ndarray` of shape `(samples,)`, *optional*):
            Forgetting by the default measure. `None` for a record at which nothing can have been forgotten.
        unsafe (`np.ndarray` of shape `(samples,)`, bool, *optional*):
            Audit labels. They evaluate forgetting and do not influence it.
        nats_per_unit (`float`, *optional*):
            See [`Trace.nats_per_unit`].

    Returns:
        `dict[str, float]`: `forgetfilter/loss`, the mean of the finite losses (an empty dict if there is none). With
        `forgetting` also its mean `forgetfilter/forgetting`, `forgetfilter/separability` (`Separability.distance`; missing
        if no sample or every sample is above the threshold) and `forgetfilter/fraction_above_threshold` at the automatic
        threshold. With `unsafe` also `forgetfilter/auroc` and `forgetfilter/f1` at that threshold.
    """
    if not np.isfinite(losses).any():
        return {}
    statistics = {"forgetfilter/loss": float(losses[np.isfinite(losses)].mean())}
    if forgetting is None:
        return statistics
    known = np.isfinite(forgetting)
    if not known.any():
        return statistics
    separability = find_threshold(forgetting[known], DEFAULT_MEASURE, nats_per_unit)
    above = forgetting[known] > separability.threshold
    statistics["forgetfilter/forgetting"] = float(forgetting[known].mean())
    statistics["forgetfilter/fraction_above_threshold"] = float(above.mean())
    if separability.distance is not None:
        statistics["forgetfilter/separability"] = separability.distance
    if unsafe is not None and 0 < unsafe[known].sum() < known.sum():
        statistics["forgetfilter/auroc"] = float(roc_auc_score(unsafe[known], forgetting[known]))
        statistics["forgetfilter/f1"] = float(f1_score(unsafe[known], above & separability.separable))
    return statistics


class LoggingIntegrations:
    """Logs statistics without `trainer.log`, which a callback cannot call and which would suppress the trainer's next log.

    The trainer's own logging integrations are callbacks that have already run. So the statistics go to the active run of
    Weights & Biases or MLflow in this process, and to a separate TensorBoard event file. Other integrations get nothing.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Of the trainer; `report_to` names the integrations.
    """

    def __init__(self, args: TrainingArguments):
        self._args = args
        self._report_to = cast(list[str], args.report_to)  # a list after `TrainingArguments.__post_init__`
        self._tensorboard = TensorBoardCallback() if "tensorboard" in self._report_to else None

    def begin(self, state: TrainerState, control: TrainerControl, model: object) -> None:
        """Open the TensorBoard event file."""
        if self._tensorboard is not None:
            self._tensorboard.on_train_begin(self._args, state, control, model=model)

    def log(self, statistics: dict[str, float], state: TrainerState, control: TrainerControl) -> None:
        """Log statistics at the current step."""
        state.log_history.append({**statistics, "epoch": state.epoch, "step": state.global_step})
        if self._tensorboard is not None:
            self._tensorboard.on_log(self._args, state, control, logs=statistics)
        if not state.is_world_process_zero:
            return
        if "wandb" in self._report_to:
            import wandb

            if wandb.run is not None:
                wandb.log({**statistics, "train/global_step": state.global_step})  # the step key of `WandbCallback`
        if "mlflow" in self._report_to:
            import mlflow

            if mlflow.active_run() is not None:
                mlflow.log_metrics(statistics, step=state.global_step, synchronous=False)

    def end(self, state: TrainerState, control: TrainerControl) -> None:
        """Close the TensorBoard event file."""
        if self._tensorboard is not None:
            self._tensorboard.on_train_end(self._args, state, control)
