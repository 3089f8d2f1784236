"""Losses of two or three checkpoints → one forgetting value a sample, a measure. Pure functions of arrays.

Higher is more forgotten, whichever measure. Losses are flat: those of sample `i` are `[offsets[i]:offsets[i + 1]]`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def mean_losses(losses: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Mean loss of each sample.

    Args:
        losses (`np.ndarray` of shape `(counted_tokens,)`):
            Loss of each counted token, nats.
        offsets (`np.ndarray` of shape `(samples + 1,)`):
            Where each sample's tokens begin.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, nats per token; NaN where no token counts.
    """
    counts = np.diff(offsets)
    sums = np.add.reduceat(np.append(losses, np.float32(0)), offsets[:-1], dtype=np.float64)
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def _all_finite(losses: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Whether all of each sample's losses are finite."""
    samples = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return np.bincount(samples[~np.isfinite(losses)], minlength=len(offsets) - 1) == 0


def _mean_of_largest(
    values: np.ndarray, offsets: np.ndarray, how_many: Callable[[np.ndarray], np.ndarray | int]
) -> np.ndarray:
    """The mean of each sample's largest values, as many as `how_many` says of its number of values; NaN of none."""
    counts = np.diff(offsets)
    samples = np.repeat(np.arange(len(counts)), counts)
    largest_first = np.lexsort([-values, samples])
    rank = np.arange(len(values)) - offsets[samples]
    kept = largest_first[rank < np.broadcast_to(how_many(counts), len(counts))[samples]]
    kept_counts = np.bincount(samples[kept], minlength=len(counts))
    sums = np.bincount(samples[kept], weights=values[kept], minlength=len(counts))
    return np.divide(sums, kept_counts, out=np.full(len(counts), np.nan), where=kept_counts > 0)
