"""Loss forgetting: the rise of a sample's mean loss."""

from __future__ import annotations

import numpy as np


def loss_forgetting(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Computes the rise of each sample's mean loss during safety finetuning.

    Formula: `after - before`.

    The simplest and cheapest measure. It suits harmful answers to instructions. On short texts such as tweets it is noisy;
    use `pooled` or `smoothed` there.

    Source: the score difference of Zhao et al. 2024, Algorithm 1, with the loss in place of ROUGE-1.

    Args:
        before (`np.ndarray` of shape `(samples,)`, float64):
            Mean losses at the start of safety finetuning, in nats per token (see [`mean_losses`]).
        after (`np.ndarray` of shape `(samples,)`, float64):
            Mean losses at a later step, in nats per token.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, in nats per token. Higher is more forgotten.
    """
    return after - before
