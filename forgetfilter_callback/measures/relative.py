"""TODO"""

from __future__ import annotations

import numpy as np


# What `relative` divides by at least, in nats per token: less than that was hardly learnt, and its ratio would be noise.
MIN_LEARNED = 0.1


def relative_forgetting(base: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The part of what S1 taught that S1+ undid: (L_t − L_0) / (L_base − L_0), of shape `(samples,)`.

    0: nothing of it, 1: all of it. Samples of which S1 taught less than 0.1 nats per token are divided by 0.1.
    """
    return (after - before) / np.maximum(base - before, MIN_LEARNED)
