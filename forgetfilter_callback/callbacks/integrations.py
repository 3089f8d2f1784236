"""Log statistics of records and of forgetting: to the log history, TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any, cast

import numpy as np
from sklearn.metrics import f1_score, roc_auc_score
from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..data.decode import completion_text, decode, prompt_length
from ..errors import TraceError
from ..filtering.thresholds import find_threshold
from ..measures.names import DEFAULT_MEASURE
from ..trace.forgetting import compute_forgetting
from ..trace.records import Record
from ..trace.trace import Trace
from ..utils.distributed import run_on_main


RISE_HISTOGRAM = "forgetfilter/loss_rise_histogram"
FORGETTING_HISTOGRAM = "forgetfilter/forgetting_histogram"
TABLE = "forgetfilter/most_forgotten"
MAX_TEXT_LENGTH = 2_000  # characters of a prompt and of a completion in the table


def summarize_losses(losses: np.ndarray, rises: np.ndarray | None = None) -> dict[str, float]:
    """Statistics of one record.

    Args:
        losses (`np.ndarray` of shape `(samples,)`):
            Mean loss of each sample, in nats per token.
        rises (`np.ndarray` of shape `(samples,)`, *optional*):
            By how much each has risen since the first record of the safety session.

    Returns:
        `dict[str, float]`: `forgetfilter/loss` and `forgetfilter/loss_rise`, the means of the finite values. A mean is
        missing if there is no such value.
    """
    means = {"forgetfilter/loss": losses} | ({} if rises is None else {"forgetfilter/loss_rise": rises})
    return {
        name: float(values[np.isfinite(values)].mean()) for name, values in means.items() if np.isfinite(values).any()
    }


def summarize_forgetting(
    forgetting: np.ndarray, nats_per_unit: float | None = None, unsafe: np.ndarray | None = None
) -> dict[str, float]:
    """Statistics of forgetting by the default measure.

    Args:
        forgetting (`np.ndarray` of shape `(samples,)`):
            Forgetting of each sample.
        nats_per_unit (`float`, *optional*):
            See [`FilterResult`].
        unsafe (`np.ndarray` of shape `(samples,)`, bool, *optional*):
            Audit labels. They evaluate forgetting and do not influence it.

    Returns:
        `dict[str, float]`: the mean `forgetfilter/forgetting`, `forgetfilter/separability` (`Separability.distance`; missing
        if no sample or every sample is above the threshold) and `forgetfilter/fraction_above_threshold` at the automatic
        threshold. With `unsafe` also `forgetfilter/auroc` and `forgetfilter/f1` at that threshold. An empty dict if no
        value is finite.
    """
    known = np.isfinite(forgetting)
    if not known.any():
        return {}
    separability = find_threshold(forgetting[known], DEFAULT_MEASURE, nats_per_unit)
    above = forgetting[known] > separability.threshold
    statistics = {
        "forgetfilter/forgetting": float(forgetting[known].mean()),
        "forgetfilter/fraction_above_threshold": float(above.mean()),
    }
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
        log_rows (`int`, defaults to 0):
            How many of the most forgotten rows to log to Weights & Biases.
    """

    def __init__(self, args: TrainingArguments, log_rows: int = 0):
        self._args = args
        self._log_rows = log_rows
        self._report_to = cast(list[str], args.report_to)  # a list after `TrainingArguments.__post_init__`
        self._tensorboard = TensorBoardCallback() if "tensorboard" in self._report_to else None
        self._first_losses: np.ndarray | None = None  # of the safety session

    def begin(self, state: TrainerState, control: TrainerControl, model: object) -> None:
        """Open the TensorBoard event file."""
        if self._tensorboard is not None:
            self._tensorboard.on_train_begin(self._args, state, control, model=model)

    def log_record(
        self, trace: Trace, record: Record, losses: np.ndarray, state: TrainerState, control: TrainerControl
    ) -> None:
        """Log the mean loss of a record and, in the safety session, by how much losses have risen since its first record.

        Args:
            trace ([`Trace`]):
                The trace that holds the record.
            record ([`Record`]):
                The record.
            losses (`np.ndarray` of shape `(samples,)`):
                Its mean loss of each sample.
            state, control:
                Of the trainer.
        """
        rises = self._rises(trace, record, losses)
        self._log(summarize_losses(losses, rises), RISE_HISTOGRAM, rises, state, control)

    def _rises(self, trace: Trace, record: Record, losses: np.ndarray) -> np.ndarray | None:
        if record.session != "safety":
            return None
        if record.step == 0:
            self._first_losses = losses
            return None
        if self._first_losses is None:  # the session was resumed
            with suppress(TraceError):  # the trace may lack the record at step 0
                self._first_losses = run_on_main(partial(trace.mean_losses, Record("safety", 0)))
        return None if self._first_losses is None else losses - self._first_losses

    def log_forgetting(
        self,
        trace: Trace,
        state: TrainerState,
        control: TrainerControl,
        unsafe: np.ndarray | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Compute forgetting by the default measure at the last record of the safety session, and log it.

        Call it once, at the end of the session: the measure reads all token losses, and other processes wait.

        Args:
            trace ([`Trace`]):
                The trace with the records of the session.
            state, control:
                Of the trainer.
            unsafe (`np.ndarray` of shape `(samples,)`, bool, *optional*):
                Audit labels.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                Decodes the texts of the rows. Without it, the table of rows has no texts.
        """
        try:
            forgetting, nats_per_unit = run_on_main(partial(compute_forgetting, trace, DEFAULT_MEASURE, None))
        except TraceError:  # the trace may lack the record at step 0 or the hidden states
            return
        rows = None
        if self._log_rows and "wandb" in self._report_to and state.is_world_process_zero:
            rows = most_forgotten_rows(trace, forgetting, self._log_rows, tokenizer)
        statistics = summarize_forgetting(forgetting, nats_per_unit, unsafe)
        self._log(statistics, FORGETTING_HISTOGRAM, forgetting, state, control, rows)

    def _log(
        self,
        statistics: dict[str, float],
        histogram: str,
        values: np.ndarray | None,
        state: TrainerState,
        control: TrainerControl,
        rows: list[list[Any]] | None = None,
    ) -> None:
        """Log statistics, the `histogram` of the finite `values`, and a table of `rows` at the current step."""
        if not statistics:
            return
        state.log_history.append({**statistics, "epoch": state.epoch, "step": state.global_step})
        values = np.zeros(0) if values is None else values[np.isfinite(values)]
        if self._tensorboard is not None:
            self._tensorboard.on_log(self._args, state, control, logs=statistics)
            writer = self._tensorboard.tb_writer  # None on all processes but the main one
            if writer is not None and len(values):
                writer.add_histogram(histogram, values, state.global_step)
        if not state.is_world_process_zero:
            return
        if "wandb" in self._report_to:
            import wandb

            if wandb.run is not None:
                # "train/global_step" is the step key of `WandbCallback`.
                figures: dict[str, Any] = {**statistics, "train/global_step": state.global_step}
                if len(values):
                    figures[histogram] = wandb.Histogram(values)
                if rows is not None:
                    figures[TABLE] = wandb.Table(["row", "forgetting", "prompt", "completion"], rows)
                wandb.log(figures)
        if "mlflow" in self._report_to:
            import mlflow

            if mlflow.active_run() is not None:
                mlflow.log_metrics(statistics, step=state.global_step, synchronous=False)

    def end(self, state: TrainerState, control: TrainerControl) -> None:
        """Close the TensorBoard event file."""
        if self._tensorboard is not None:
            self._tensorboard.on_train_end(self._args, state, control)


def most_forgotten_rows(
    trace: Trace, forgetting: np.ndarray, count: int, tokenizer: PreTrainedTokenizerBase | None
) -> list[list[Any]]:
    """The most forgotten rows: row number, forgetting, the end of the prompt, and the beginning of the completion."""
    rows = []
    for index in np.argsort(-np.nan_to_num(forgetting, nan=-np.inf))[:count].tolist():
        tokens, loss_mask = trace.rows.sample(index)
        prompt = completion = ""
        if tokenizer is not None:
            prompt = decode(tokenizer, tokens[: prompt_length(loss_mask)].tolist(), skip_special_tokens=True)
            completion = completion_text(tokenizer, tokens, loss_mask)
        rows.append([index, float(forgetting[index]), prompt[-MAX_TEXT_LENGTH:], completion[:MAX_TEXT_LENGTH]])
    return rows
