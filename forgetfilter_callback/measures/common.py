"""Per-sample reductions shared by the measures.

Per-token values are stored flat: the values of sample `i` are `values[offsets[i]:offsets[i + 1]]`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def mean_losses(losses: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Computes the mean loss of each sample.

    Args:
        losses (`np.ndarray` of shape `(loss_tokens,)`, float32):
            Loss of each token that contributes to the loss, in nats.
        offsets (`np.ndarray` of shape `(samples + 1,)`, integer):
            Start of each sample in `losses`; the last entry is `loss_tokens`.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, in nats per token; NaN for samples without loss tokens.
    """
    counts = np.diff(offsets)
    sums = np.add.reduceat(np.append(losses, np.float32(0)), offsets[:-1], dtype=np.float64)
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def all_finite(losses: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Tells which samples have only finite losses.

    Returns:
        `np.ndarray` of shape `(samples,)`, bool; `True` for samples without loss tokens.
    """
    samples = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return np.bincount(samples[~np.isfinite(losses)], minlength=len(offsets) - 1) == 0


def mean_of_largest(
    values: np.ndarray, offsets: np.ndarray, limit: Callable[[np.ndarray], np.ndarray | int]
) -> np.ndarray:
    """Averages the largest values of each sample.

    Args:
        values (`np.ndarray` of shape `(loss_tokens,)`):
            One value per loss token.
        offsets (`np.ndarray` of shape `(samples + 1,)`, integer):
            Start of each sample in `values`.
        limit (`Callable`):
            Maps the number of values of each sample, shape `(samples,)`, to how many of the largest to average.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64; NaN for samples without loss tokens.
    """
    counts = np.diff(offsets)
    samples = np.repeat(np.arange(len(counts), dtype=np.min_scalar_type(len(counts))), counts)
    # Two sorts: values without order among equals, then samples (small integers), are faster than one lexsort.
    largest_first = np.argsort(-values)
    largest_first = largest_first[np.argsort(samples[largest_first], kind="stable")]
    rank = np.arange(len(values)) - offsets[samples]
    kept = largest_first[rank < np.broadcast_to(limit(counts), len(counts))[samples]]
    kept_counts = np.bincount(samples[kept], minlength=len(counts))
    sums = np.bincount(samples[kept], weights=values[kept], minlength=len(counts))
    return np.divide(sums, kept_counts, out=np.full(len(counts), np.nan), where=kept_counts > 0)
