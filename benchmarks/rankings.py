"""Rankings of the rows of a trace: the measures, their parts, and combinations of them."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import rankdata

from forgetfilter_callback import Trace
from forgetfilter_callback.measures.common import mean_of_largest
from forgetfilter_callback.measures.smoothed import agreed_forgetting


def rankings(trace: Trace) -> dict[str, np.ndarray]:
    """Computes all rankings at the end of safety finetuning. Higher is more suspicious; shape `(samples,)`."""
    before, after = trace.first_and_last()
    tokens, offsets = trace.rows.loss_tokens, trace.rows.loss_offsets
    losses = trace.token_losses(before), trace.token_losses(after)
    rises = losses[1].astype(np.float64) - losses[0]
    found = {
        "loss": trace.forgetting("loss"),
        "relative": trace.forgetting("relative"),
        "largest tenth": mean_of_largest(rises, offsets, lambda count: math.ceil(count / 10)),
        "agreed": agreed_forgetting(tokens, offsets, *losses),
        "smoothed": trace.forgetting("smoothed"),
        "pooled": trace.forgetting("pooled"),
    }
    return {
        **found,
        "mean of the six ranks": np.mean([rankdata(values) for values in found.values()], axis=0),
        "combined": trace.forgetting("combined"),
    }
