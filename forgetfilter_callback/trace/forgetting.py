"""Compute a measure of forgetting from the records of a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import TraceError
from ..measures.common import mean_losses
from ..measures.loss import loss_forgetting
from ..measures.names import MEASURES, Measure
from ..measures.pooled import pooled_forgetting
from ..measures.relative import relative_forgetting
from ..measures.rouge import rouge_forgetting
from ..measures.smoothed import (
    agreed_forgetting,
    nats_per_unit,
    smoothed_forgetting,
    smoothed_over_states,
    typical_loss,
)
from .records import Record


if TYPE_CHECKING:
    from .trace import Trace


def compute_forgetting(trace: Trace, measure: Measure, step: int | None) -> np.ndarray:
    """Read the records that `measure` needs and compute it. See [`Trace.forgetting`]."""
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r} is unknown. Choose one of {', '.join(MEASURES)}.")
    before, after = trace.first_and_last(step)
    if measure == "rouge1":
        return rouge_forgetting(trace.rouge1(before), trace.rouge1(after))
    losses_before, losses_after = trace.token_losses(before), trace.token_losses(after)
    tokens, offsets = trace.rows.loss_tokens, trace.rows.loss_offsets
    if measure == "smoothed":
        return smoothed_forgetting(tokens, offsets, losses_before, losses_after, trace.states(before))
    if measure == "pooled":
        return pooled_forgetting(tokens, offsets, losses_before, losses_after)
    means_before, means_after = mean_losses(losses_before, offsets), mean_losses(losses_after, offsets)
    if measure == "loss":
        return loss_forgetting(means_before, means_after)
    if trace.base_record is None:
        raise TraceError(
            "measure='relative' needs the losses of the base model, but this trace has no record at step 0 of the noisy "
            "session. Record the base model too, with the same tracker in both sessions, or choose another measure."
        )
    return relative_forgetting(mean_losses(trace.token_losses(trace.base_record), offsets), means_before, means_after)


def compute_forgetting_by_record(trace: Trace, measure: Measure, steps: Sequence[int]) -> np.ndarray:
    """Compute a measure at several records of the safety session.

    Returns:
        `np.ndarray` of shape `(records, samples)`, float64. The last row is [`Trace.forgetting`] at the last step. With
        `"smoothed"`, all records are in the unit of the last one: its typical change.
    """
    if measure != "smoothed":
        return np.array([compute_forgetting(trace, measure, step) for step in steps])
    tokens, offsets = trace.rows.loss_tokens, trace.rows.loss_offsets
    before = trace.first_and_last(steps[-1])[0]
    losses_before = trace.token_losses(before)
    agreed, units = np.empty((len(trace.rows), len(steps))), np.empty(len(steps))
    for index, step in enumerate(steps):  # one record in memory at a time
        losses = trace.token_losses(Record("safety", step))
        agreed[:, index] = agreed_forgetting(tokens, offsets, losses_before, losses)
        units[index] = typical_loss(losses_before, losses, offsets)
    return smoothed_over_states(agreed, trace.states(before)).T * (units / units[-1])[:, None]


def compute_nats_per_unit(trace: Trace, values: np.ndarray, step: int | None) -> float:
    """See [`Trace.nats_per_unit`]."""
    losses_before, losses_after = (trace.token_losses(record) for record in trace.first_and_last(step))
    return nats_per_unit(values, losses_before, losses_after, trace.rows.loss_offsets)
