"""Pooled forgetting: the loss rise of each token, averaged over its occurrences in other samples."""

from __future__ import annotations

import numpy as np

from .common import all_finite, mean_of_largest


# Number of prior observations added to the occurrences of each token, so that a rare token needs a large rise.
POOLED_PRIOR_COUNT = 3
# Number of a sample's largest pooled rises to average.
POOLED_TOP_TOKENS = 3


def pooled_forgetting(tokens: np.ndarray, offsets: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Computes the mean of each sample's three largest pooled loss rises.

    Formula: for a token `v` of sample `i`, `pooled(v, i) = sum(rises of v in other samples) / (n + 3)`, where `n` is
    the number of these occurrences. The value of sample `i` is the mean of its three largest `pooled(v, i)`.

    The rise of a single token is mostly noise from memorization. What safety finetuning unlearns is systematic, and
    averaging over samples reveals it. Useful for short texts (tweets) that share a harmful vocabulary.

    Source: this library.

    Args:
        tokens (`np.ndarray` of shape `(loss_tokens,)`, integer):
            Token id of each loss.
        offsets (`np.ndarray` of shape `(samples + 1,)`, integer):
            Start of each sample in `tokens`, `before` and `after`.
        before (`np.ndarray` of shape `(loss_tokens,)`, float32):
            Token losses at the start of safety finetuning, in nats.
        after (`np.ndarray` of shape `(loss_tokens,)`, float32):
            Token losses at a later step, in nats.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, in nats. Higher is more forgotten. NaN for samples without loss
        tokens and for samples with a loss that is not finite.
    """
    rises = after.astype(np.float64) - before
    values = mean_of_largest(pool_over_samples(tokens, offsets, rises), offsets, lambda counts: POOLED_TOP_TOKENS)
    values[~all_finite(rises, offsets)] = np.nan
    return values


def pool_over_samples(
    tokens: np.ndarray, offsets: np.ndarray, values: np.ndarray, prior: np.ndarray | float = 0.0
) -> np.ndarray:
    """Averages the value of each token over the token's occurrences in other samples.

    Formula: `(sum(values of the token in other samples) + 3 * prior) / (n + 3)`, where `n` is the number of these
    occurrences.

    Args:
        tokens (`np.ndarray` of shape `(loss_tokens,)`, integer):
            Token ids.
        offsets (`np.ndarray` of shape `(samples + 1,)`, integer):
            Start of each sample in `tokens`.
        values (`np.ndarray` of shape `(loss_tokens,)`, float64):
            The values to average. Values that are not finite contribute as 0.
        prior (`float` or `np.ndarray` of shape `(loss_tokens,)`, defaults to 0.0):
            Value to shrink towards, with the weight of three occurrences.

    Returns:
        `np.ndarray` of shape `(loss_tokens,)`, float64, in the unit of `values`.
    """
    values = np.where(np.isfinite(values), values, 0.0)  # one diverged sample must not spoil the others
    samples = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    vocabulary = tokens.max(initial=0) + 1
    _, token_in_sample = np.unique(samples * vocabulary + tokens, return_inverse=True)

    def total(group: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(group, weights=weights)[group]

    others = total(tokens, values) - total(token_in_sample, values)
    others_count = total(tokens) - total(token_in_sample)
    return (others + POOLED_PRIOR_COUNT * prior) / (others_count + POOLED_PRIOR_COUNT)
