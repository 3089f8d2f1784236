"""Compute a measure of forgetting from the records of a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..data.loss_tokens import LossTokens
from ..errors import TraceError
from ..measures.combined import forgetting_estimates, mean_estimate
from ..measures.loss import loss_forgetting
from ..measures.names import MEASURES, TYPICAL_CHANGES, UNITS, Measure
from ..measures.pooled import pooled_forgetting
from ..measures.relative import relative_forgetting
from ..measures.rouge import rouge_forgetting
from ..measures.smoothed import loss_changes, nats_per_unit, smoothed_over_states
from .records import Record


if TYPE_CHECKING:
    from .trace import Trace


def compute_forgetting(trace: Trace, measure: Measure, step: int | None) -> tuple[np.ndarray, float | None]:
    """Read the records that `measure` needs and compute it.

    Returns:
        `tuple` of an `np.ndarray` of shape `(samples,)`, float64 (see [`Trace.forgetting`]), and a `float` or `None`: the
        nats per typical change (see `forgetfilter_callback.measures.smoothed.nats_per_unit`).
    """
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r} is unknown. Choose one of {', '.join(MEASURES)}.")
    values, nats = compute_forgetting_by_record(trace, measure, [trace.first_and_last(step)[1].step])
    return values[0], nats


def compute_forgetting_by_record(
    trace: Trace, measure: Measure, steps: Sequence[int]
) -> tuple[np.ndarray, float | None]:
    """Compute a measure at several records of the safety session.

    Returns:
        `tuple` of an `np.ndarray` of shape `(records, samples)`, float64, whose last row is [`Trace.forgetting`] at the last
        step, and the nats per typical change of the last step. Typical changes are those of the last record.
    """
    if UNITS[measure] == TYPICAL_CHANGES:
        return _in_typical_changes(trace, measure, steps)
    before = trace.first_and_last(steps[-1])[0]
    records = [Record("safety", step) for step in steps]
    if measure == "rouge1":
        rouge_before = trace.rouge1(before)
        return np.array([rouge_forgetting(rouge_before, trace.rouge1(record)) for record in records]), None
    offsets = trace.rows.loss_offsets
    if measure == "pooled":
        tokens, losses_before = LossTokens(trace.rows), trace.stored_losses(before)
        losses = map(trace.stored_losses, records)
        return np.array([pooled_forgetting(tokens, offsets, losses_before, each) for each in losses]), None
    means_before, means = trace.mean_losses(before), map(trace.mean_losses, records)
    if measure == "loss":
        return np.array([loss_forgetting(means_before, means_after) for means_after in means]), None
    if trace.base_record is None:
        raise TraceError(
            "measure='relative' needs the losses of all rows under the base model, which this trace does not hold. Record "
            "them with the same tracker in both sessions and `record_base=True`, or with `forgetfilter score --base`. Or "
            "choose another measure."
        )
    means_base = trace.mean_losses(trace.base_record)
    return np.array([relative_forgetting(means_base, means_before, means_after) for means_after in means]), None


def _in_typical_changes(trace: Trace, measure: Measure, steps: Sequence[int]) -> tuple[np.ndarray, float]:
    """See [`compute_forgetting_by_record`]. All records are smoothed together, which takes little longer than one."""
    tokens, offsets = LossTokens(trace.rows), trace.rows.loss_offsets
    before = trace.first_and_last(steps[-1])[0]
    losses_before = trace.stored_losses(before)
    changes = [
        loss_changes(tokens, offsets, losses_before, trace.stored_losses(Record("safety", step))) for step in steps
    ]
    if measure == "combined":
        estimates = list(map(forgetting_estimates, changes))
    else:
        estimates = [each.agreed[:, None] for each in changes]
    smoothed = np.split(smoothed_over_states(np.hstack(estimates), trace.stored_states(before)), len(steps), axis=1)
    # The last estimate is in typical changes. The first one of `combined` is the loss itself, so only the last one can be
    # compared with the loss.
    nats = nats_per_unit(smoothed[-1][:, -1], changes[-1].rises, np.diff(offsets))
    values = [each[:, -1] for each in smoothed]
    if measure == "combined":
        values = list(map(mean_estimate, estimates, smoothed))
    typical_changes = np.array([each.typical_change for each in changes])
    return np.array(values) * (typical_changes / typical_changes[-1])[:, None], nats
