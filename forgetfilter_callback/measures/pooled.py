"""TODO"""

from __future__ import annotations

import numpy as np

from .common import _all_finite, _mean_of_largest


# `pool_over_samples`: as many zero rises are added to each token's occurrences, so that a rare token needs a large rise to stand out
POOLED_PRIOR_COUNT = 3
# `pool_over_samples`: how many of a sample's largest pooled rises are averaged.
POOLED_TOP_TOKENS = 3


def pooled_forgetting(tokens: np.ndarray, offsets: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The rises of a sample's tokens, each averaged over that token's occurrences in the other samples, then the mean
    of the sample's three largest.

    A single sample's rise is mostly noise of what was memorised; what safety training unlearns is systematic and shows
    when rises are pooled across samples.

    Args:
        tokens (`np.ndarray` of shape `(counted_tokens,)`, integer):
            The token id each loss belongs to.
        offsets (`np.ndarray` of shape `(samples + 1,)`):
            Where each sample's tokens begin.
        before, after (`np.ndarray` of shape `(counted_tokens,)`):
            Losses at the beginning of S1+ and later, nats.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, nats; NaN where no token counts, or losses are not finite.
    """
    rises = after.astype(np.float64) - before
    values = _mean_of_largest(pool_over_samples(tokens, offsets, rises), offsets, lambda counts: POOLED_TOP_TOKENS)
    values[~_all_finite(rises, offsets)] = np.nan
    return values


def pool_over_samples(
    tokens: np.ndarray, offsets: np.ndarray, values: np.ndarray, prior: np.ndarray | float = 0.0
) -> np.ndarray:
    """Each token's value, averaged over that token's occurrences in the other samples, and three of `prior`.

    Returns:
        `np.ndarray` of shape `(counted_tokens,)`, float64.
    """
    values = np.where(np.isfinite(values), values, 0.0)  # a diverged token must not reach the other samples
    samples = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    kinds, kind = np.unique(tokens, return_inverse=True)
    _, of_sample = np.unique(samples * len(kinds) + kind, return_inverse=True)

    def total(group: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(group, weights=weights)[group]

    others = total(kind, values) - total(of_sample, values)
    others_count = total(kind) - total(of_sample)
    return (others + POOLED_PRIOR_COUNT * prior) / (others_count + POOLED_PRIOR_COUNT)
