"""TODO"""

from __future__ import annotations

import numpy as np


def loss_forgetting(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Rise of the mean loss, L_t − L_0, in nats per token, of shape `(samples,)`."""
    return after - before
