"""Split many samples into windows that bound the memory of intermediate results."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np


def window_bounds(offsets: np.ndarray, max_tokens: int, max_samples: int = sys.maxsize) -> Iterator[tuple[int, int]]:
    """Iterates over windows of whole samples. A sample of more than `max_tokens` tokens is a window of its own.

    Args:
        offsets (`np.ndarray` of shape `(samples + 1,)`, integer):
            Start of each sample in flat values; the last entry is the number of values.
        max_tokens (`int`):
            Largest number of tokens in a window.
        max_samples (`int`, *optional*):
            Largest number of samples in a window. Defaults to no limit.

    Yields:
        `tuple[int, int]`: the first sample of a window, and the sample after its last one.
    """
    start, samples = 0, len(offsets) - 1
    while start < samples:
        within = int(np.searchsorted(offsets, offsets[start] + max_tokens, side="right")) - 1
        stop = min(max(within, start + 1), start + max_samples, samples)
        yield start, stop
        start = stop
