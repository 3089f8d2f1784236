"""TODO"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


# A sample's state has so many numbers; larger hidden states are projected at random, which keeps angles.
STATE_SIZE = 512


class Scores(NamedTuple):
    """What a forward pass says of some rows.

    Attributes:
        losses (`np.ndarray` of shape `(counted_tokens,)`, float32):
            Negative log-likelihoods in nats, in the order of `rows.counted_tokens`.
        states (`np.ndarray` of shape `(samples, size)`, float16, *optional*):
            The hidden states that predict a sample's counted tokens, as the output head gets them: their mean, projected to
            512 numbers where they are larger. Zero where no token counts.
    """

    losses: np.ndarray
    states: np.ndarray | None = None
