"""The result of scoring: losses and states of samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


# Largest size of a sample's state. Larger hidden states are projected at random, which nearly preserves angles.
STATE_SIZE = 512


@dataclass(frozen=True, eq=False)
class Scores:
    """Losses and, optionally, states of some rows under one model.

    Attributes:
        losses (`np.ndarray` of shape `(loss_tokens,)`, float32):
            Negative log-likelihoods in nats per token, in the order of `rows.loss_tokens`.
        states (`np.ndarray` of shape `(samples, size)`, float16, *optional*):
            For each sample, the mean of the hidden states that predict its loss tokens, as the output head receives
            them. Hidden states of more than 512 dimensions are projected to 512. Samples without loss tokens have
            zeros.
    """

    losses: np.ndarray
    states: np.ndarray | None = None
