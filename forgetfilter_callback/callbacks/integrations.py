"""What a record says, in a few figures, for `state.log_history` and the reporters."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import f1_score, roc_auc_score
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..measures.names import DEFAULT_MEASURE
from ..thresholds import find_threshold


def summarize_record(
    means: np.ndarray,
    values: np.ndarray | None = None,
    unsafe: np.ndarray | None = None,
    nats_per_unit: float | None = None,
) -> dict[str, float]:
    """Figures of one record.

    Args:
        means (`np.ndarray` of shape `(samples,)`):
            Mean loss of each sample, nats per token.
        values (`np.ndarray` of shape `(samples,)`, *optional*):
            Forgetting by the default measure; None for a record that nothing can have been forgotten in.
        unsafe (`np.ndarray` of shape `(samples,)`, bool, *optional*):
            Audit labels. They judge forgetting and play no part in it.
        nats_per_unit (`float`, *optional*):
            As in [`filter_by_values`].

    Returns:
        `dict[str, float]`: `forgetfilter/loss`, the mean of the finite losses (nothing if there is none); with `values` also
        their mean `forgetfilter/forgetting`, `forgetfilter/separability` (see [`Separability`]'s `distance`; left out
        where one side is empty), `forgetfilter/fraction_above_threshold` at the automatic φ, and with labels
        `forgetfilter/auroc` and `forgetfilter/f1` at that φ.
    """
    if not np.isfinite(means).any():
        return {}
    figures = {"forgetfilter/loss": float(means[np.isfinite(means)].mean())}
    if values is None:
        return figures
    known = np.isfinite(values)
    if not known.any():
        return figures
    separability = find_threshold(values[known], DEFAULT_MEASURE, nats_per_unit)
    above = values[known] > separability.threshold
    figures["forgetfilter/forgetting"] = float(values[known].mean())
    figures["forgetfilter/fraction_above_threshold"] = float(above.mean())
    if separability.distance is not None:
        figures["forgetfilter/separability"] = separability.distance
    if unsafe is not None and 0 < unsafe[known].sum() < known.sum():
        figures["forgetfilter/auroc"] = float(roc_auc_score(unsafe[known], values[known]))
        figures["forgetfilter/f1"] = float(f1_score(unsafe[known], above & separability.separable))
    return figures


class Reporting:
    """Logs figures without `trainer.log`, which a callback cannot reach and which would swallow the trainer's next line.

    Reporters are callbacks that have run before ours, so figures go where theirs do: to the run of this process that Weights
    & Biases or MLflow have begun, and to an event file of our own for TensorBoard. Other reporters get nothing.
    """

    def __init__(self, args: TrainingArguments):
        self._args = args
        self._tensorboard = TensorBoardCallback() if "tensorboard" in args.report_to else None

    def begin(self, state: TrainerState, control: TrainerControl, model: object) -> None:
        if self._tensorboard is not None:
            self._tensorboard.on_train_begin(self._args, state, control, model=model)

    def log(self, figures: dict[str, float], state: TrainerState, control: TrainerControl) -> None:
        state.log_history.append({**figures, "epoch": state.epoch, "step": state.global_step})
        if self._tensorboard is not None:
            self._tensorboard.on_log(self._args, state, control, logs=figures)
        if not state.is_world_process_zero:
            return
        if "wandb" in self._args.report_to:
            import wandb

            if wandb.run is not None:
                wandb.log({**figures, "train/global_step": state.global_step})  # as `WandbCallback` does
        if "mlflow" in self._args.report_to:
            import mlflow

            if mlflow.active_run() is not None:
                mlflow.log_metrics(figures, step=state.global_step, synchronous=False)

    def end(self, state: TrainerState, control: TrainerControl) -> None:
        if self._tensorboard is not None:
            self._tensorboard.on_train_end(self._args, state, control)
