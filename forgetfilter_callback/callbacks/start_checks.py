"""Check that a session starts from the right model, by the mean losses of the noisy set."""

from __future__ import annotations

import numpy as np
from accelerate.logging import get_logger

from ..errors import TraceError
from ..measures.relative import MIN_LEARNED
from ..trace.records import BASE_RECORD, Record
from ..trace.trace import Trace
from ..utils.counted import counted
from ..utils.row_numbers import describe_rows


logger = get_logger(__name__)

# Nats per token. A model that has not been trained in between differs by less.
MAX_SAME_MODEL = 0.01


def check_learned(trace: Trace, now: np.ndarray) -> None:
    """Check that the safety session starts from the model of the noisy session, if `trace` has records of that one.

    With `load_best_model_at_end`, that is an earlier checkpoint, so it may have learned much less than the last record.

    Samples whose loss is not finite under one of the models are not compared.

    Args:
        trace ([`Trace`]):
            The trace.
        now (`np.ndarray` of shape `(samples,)`):
            Mean losses at the beginning of the safety session, in nats per token.

    Raises:
        TraceError: if it starts from another model, or if no sample can be compared.
    """
    noisy_records = [record for record in trace.records() if record.session == "noisy"]
    if len(noisy_records) < 2 or noisy_records[0] != BASE_RECORD:
        return
    before, learned = trace.mean_losses(noisy_records[0]), trace.mean_losses(noisy_records[-1])
    compared = np.isfinite([before, learned, now]).all(axis=0)
    scorable = np.diff(trace.rows.loss_offsets) > 0
    which_rows = ""
    sample = trace.sample(BASE_RECORD)
    if sample is not None:
        scorable &= np.isin(np.arange(len(scorable)), sample)
        which_rows = f"{counted(len(sample), 'row')} of "
    if not compared.any():
        finite = [int((np.isfinite(losses) & scorable).sum()) for losses in (before, learned, now)]
        raise TraceError(
            f"The safety session cannot be compared with noisy finetuning. Of {counted(int(scorable.sum()), 'row')}, "
            f"{finite[0]} had a finite loss before noisy finetuning, {finite[1]} after it and {finite[2]} now. The model "
            "diverges or overflows: run noisy finetuning again with a lower learning rate, or train in bfloat16 or float32."
        )
    mean_before, mean_learned, mean_now = (float(losses[compared].mean()) for losses in (before, learned, now))
    left_out = np.flatnonzero(scorable & ~compared)
    compared_set = f"{which_rows}the noisy set"
    if len(left_out):
        compared_set = (
            f"{which_rows}the prepared noisy set without {describe_rows(left_out)} (no finite loss under at least one of "
            "these models)"
        )
    figures = (
        f"mean loss of {compared_set}: {mean_before:.3f} nats per token before noisy finetuning, {mean_learned:.3f} "
        f"after it, {mean_now:.3f} now"
    )
    if mean_before - mean_learned < MIN_LEARNED:
        logger.warning(
            f"The model has hardly learned the noisy set ({figures}), so there is little to forget. Run noisy "
            "finetuning longer, or with a higher learning rate."
        )
    elif mean_before - mean_now > 0.25 * (mean_before - mean_learned):
        return
    elif not _loads_best(trace):
        raise TraceError(
            f"The safety session must start from the model after noisy finetuning, but does not ({figures}). "
            "Pass the same model object, or load its last checkpoint."
        )
    elif mean_before - mean_now < MIN_LEARNED:
        raise TraceError(
            f"The safety session must start from a model that has learned the noisy set, but does not ({figures}). Pass the "
            "same model object. If it is the checkpoint that `load_best_model_at_end` has loaded, run noisy finetuning with "
            "`load_best_model_at_end=False`: rows that were not learned cannot be forgotten."
        )
    else:
        logger.warning(
            "The safety session starts from a checkpoint that has learned much less than the model at the end of noisy "
            f"finetuning ({figures}). Set `load_best_model_at_end=False` there: rows that were not learned cannot be "
            "forgotten."
        )


def _loads_best(trace: Trace) -> bool:
    """Whether the noisy session has ended with its best checkpoint. Older traces do not say so."""
    entries = trace.manifest["sessions"]
    return any(entry["session"] == "noisy" and entry.get("loads_best", False) for entry in entries)


def warn_if_start_differs(record: Record, earlier: np.ndarray, now: np.ndarray) -> None:
    """Warn if a session that starts again does not start from the model of its earlier start.

    Args:
        record ([`Record`]):
            The record at step 0.
        earlier, now (`np.ndarray` of shape `(samples,)`):
            Mean losses at the earlier start and now, in nats per token.
    """
    compared = np.isfinite([earlier, now]).all(axis=0)
    if compared.any() and np.abs(now - earlier)[compared].mean() > MAX_SAME_MODEL:
        logger.warning(
            f"The {record.session} session starts again from another model: the mean loss of the noisy set is "
            f"{now[compared].mean():.3f} nats per token now, and it was {earlier[compared].mean():.3f} at the earlier "
            "start. Training changes a model in place: load the model again if it must be the same."
        )
