"""Relative forgetting: the fraction of what noisy finetuning taught that safety finetuning undid."""

from __future__ import annotations

import numpy as np


# Smallest learning gain to divide by, in nats per token. Ratios to a smaller gain would be noise.
MIN_LEARNED = 0.1


def relative_forgetting(base: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Computes the fraction of each sample's learning gain that safety finetuning undid.

    Formula: `(after - before) / max(base - before, 0.1)`.

    Useful when samples differ in how much the model learned from them. It needs the losses of the base model.

    Source: this library.

    Args:
        base (`np.ndarray` of shape `(samples,)`, float64):
            Mean losses of the base model (M0 in the paper), in nats per token (see [`mean_losses`]).
        before (`np.ndarray` of shape `(samples,)`, float64):
            Mean losses at the start of safety finetuning, in nats per token.
        after (`np.ndarray` of shape `(samples,)`, float64):
            Mean losses at a later step, in nats per token.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, dimensionless: 0 if nothing was forgotten, 1 if the whole gain was.
        Higher is more forgotten.
    """
    return (after - before) / np.maximum(base - before, MIN_LEARNED)
