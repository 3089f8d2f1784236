"""Pooled forgetting: the loss rise of each token, averaged over its occurrences in other samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .common import all_finite, by_window, loss_rises, mean_of_largest, windows


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
    totals = token_totals(loss_rises, tokens, offsets, before, after)

    def of_window(offsets: np.ndarray, tokens: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return pooled_of_window(offsets, tokens, token_numbers(offsets, tokens), before, after, totals)

    return by_window(of_window, offsets, tokens, before, after)


def pooled_of_window(
    offsets: np.ndarray,
    tokens: np.ndarray,
    numbers: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    totals: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Computes [`pooled_forgetting`] of a window of samples, with their [`token_numbers`] and the totals of all samples."""
    rises = loss_rises(before, after)
    pooled = pool_over_samples(tokens, numbers, rises, totals)
    values = mean_of_largest(pooled, offsets, lambda count: POOLED_TOP_TOKENS)
    values[~all_finite(rises, offsets)] = np.nan
    return values


def token_numbers(offsets: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Numbers the distinct tokens of each sample: occurrences of a token in one sample have the same number.

    Args:
        offsets (`np.ndarray` of shape `(samples + 1,)`, integer):
            Start of each sample in `tokens`.
        tokens (`np.ndarray` of shape `(loss_tokens,)`, integer):
            Token ids.

    Returns:
        `np.ndarray` of shape `(loss_tokens,)`, int64.
    """
    samples = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return np.unique(samples * (int(tokens.max(initial=0)) + 1) + tokens, return_inverse=True)[1]


def token_totals(
    change: Callable[[np.ndarray, np.ndarray], np.ndarray],
    tokens: np.ndarray,
    offsets: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums a change of the losses over all occurrences of each token.

    Args:
        change (`Callable`):
            Maps the losses before and after to the change, float64. Changes that are not finite contribute as 0.
        tokens, offsets, before, after:
            As in [`pooled_forgetting`].

    Returns:
        `tuple` of two `np.ndarray` of shape `(largest token id + 1,)`: the sums (float64), in the unit of the change, and
        the numbers of occurrences (int64).
    """
    vocabulary = int(tokens.max(initial=0)) + 1
    sums, counts = np.zeros(vocabulary), np.zeros(vocabulary, np.int64)
    for _, span in windows(offsets):
        sums += np.bincount(tokens[span], _finite(change(before[span], after[span])), vocabulary)
        counts += np.bincount(tokens[span], minlength=vocabulary)
    return sums, counts


def pool_over_samples(
    tokens: np.ndarray,
    numbers: np.ndarray,
    values: np.ndarray,
    totals: tuple[np.ndarray, np.ndarray],
    prior: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Averages the value of each token over the token's occurrences in other samples.

    Formula: `(sum(values of the token in other samples) + 3 * prior) / (n + 3)`, where `n` is the number of these
    occurrences.

    Args:
        tokens (`np.ndarray` of shape `(loss_tokens,)`, integer):
            Token ids, of all samples or of a window of them.
        numbers (`np.ndarray` of shape `(loss_tokens,)`, int64):
            Their [`token_numbers`].
        values (`np.ndarray` of shape `(loss_tokens,)`, float64):
            The values to average. Values that are not finite contribute as 0.
        totals:
            The [`token_totals`] of all samples.
        prior (`float` or `np.ndarray` of shape `(loss_tokens,)`, defaults to 0.0):
            Value to shrink towards, with the weight of three occurrences.

    Returns:
        `np.ndarray` of shape `(loss_tokens,)`, float64, in the unit of `values`.
    """
    sums, counts = totals
    others = sums[tokens] - np.bincount(numbers, _finite(values))[numbers]
    others_count = counts[tokens] - np.bincount(numbers)[numbers]
    return (others + POOLED_PRIOR_COUNT * prior) / (others_count + POOLED_PRIOR_COUNT)


def _finite(values: np.ndarray) -> np.ndarray:
    """Replaces values that are not finite by 0: one diverged sample must not spoil the others."""
    return np.where(np.isfinite(values), values, 0.0)
