"""Pooled forgetting: the loss rise of each token, averaged over its occurrences in other samples."""

from __future__ import annotations

import numpy as np

from .common import Sliceable, TokenWindow, all_finite, mean_of_largest, token_windows


# Number of prior observations added to the occurrences of each token, so that a rare token needs a large rise.
POOLED_PRIOR_COUNT = 3
# Number of a sample's largest pooled rises to average.
POOLED_TOP_TOKENS = 3


def pooled_forgetting(tokens: Sliceable, offsets: np.ndarray, before: Sliceable, after: Sliceable) -> np.ndarray:
    """Computes the mean of each sample's three largest pooled loss rises.

    Formula: for a token `v` of sample `i`, `pooled(v, i) = sum(rises of v in other samples) / (n + 3)`, where `n` is
    the number of these occurrences. The value of sample `i` is the mean of its three largest `pooled(v, i)`.

    The rise of a single token is mostly noise from memorization. What safety finetuning unlearns is systematic, and
    averaging over samples reveals it. Useful for short texts (tweets) that share a harmful vocabulary.

    Source: this library.

    Args:
        tokens (`np.ndarray` of shape `(loss_tokens,)`, integer, or [`Sliceable`]):
            Token id of each loss.
        offsets (`np.ndarray` of shape `(samples + 1,)`, integer):
            Start of each sample in `tokens`, `before` and `after`.
        before (`np.ndarray` of shape `(loss_tokens,)`, float32, or [`Sliceable`]):
            Token losses at the start of safety finetuning, in nats.
        after (`np.ndarray` of shape `(loss_tokens,)`, float32, or [`Sliceable`]):
            Token losses at a later step, in nats.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, in nats. Higher is more forgotten. NaN for samples without loss
        tokens and for samples with a loss that is not finite.
    """
    totals = TokenTotals()
    for window in token_windows(tokens, offsets, before, after):
        totals.add(window, window.rises)
    values = [pooled_of_window(window, totals) for window in token_windows(tokens, offsets, before, after)]
    return np.concatenate([np.zeros(0), *values])


def pooled_of_window(window: TokenWindow, totals: TokenTotals) -> np.ndarray:
    """Computes [`pooled_forgetting`] of a window of samples, given the totals of the rises in all samples."""
    pooled = totals.mean_over_others(window, window.rises)
    values = mean_of_largest(pooled, window.offsets, lambda count: POOLED_TOP_TOKENS)
    values[~all_finite(window.rises, window.offsets)] = np.nan
    return values


class TokenTotals:
    """Sums a value over all occurrences of each token, to average it over the occurrences in other samples.

    Values that are not finite contribute as 0.
    """

    def __init__(self) -> None:
        # By token id, up to the largest one so far.
        self._sums: np.ndarray = np.zeros(0)
        self._counts: np.ndarray = np.zeros(0, np.int64)

    def add(self, window: TokenWindow, values: np.ndarray) -> None:
        """Adds the values of the tokens of a window: shape `(loss_tokens,)`, float64."""
        if not len(window.tokens):  # their sums would be integers
            return
        sums: np.ndarray = np.bincount(window.tokens, _finite(values), len(self._sums))
        counts: np.ndarray = np.bincount(window.tokens, minlength=len(self._counts))
        sums[: len(self._sums)] += self._sums
        counts[: len(self._counts)] += self._counts
        self._sums, self._counts = sums, counts

    def mean_over_others(self, window: TokenWindow, values: np.ndarray, prior: np.ndarray | float = 0.0) -> np.ndarray:
        """Averages the value of each token of a window over the token's occurrences in other samples.

        Formula: `(sum(values of the token in other samples) + 3 * prior) / (n + 3)`, where `n` is the number of these
        occurrences.

        Args:
            window ([`TokenWindow`]):
                A window whose values were added.
            values (`np.ndarray` of shape `(loss_tokens,)`, float64):
                The values that were added for it.
            prior (`float` or `np.ndarray` of shape `(loss_tokens,)`, defaults to 0.0):
                Value to shrink towards, with the weight of three occurrences.

        Returns:
            `np.ndarray` of shape `(loss_tokens,)`, float64, in the unit of `values`.
        """
        numbers = window.numbers
        others = self._sums[window.tokens] - np.bincount(numbers, _finite(values))[numbers]
        others_count = self._counts[window.tokens] - np.bincount(numbers)[numbers]
        return (others + POOLED_PRIOR_COUNT * prior) / (others_count + POOLED_PRIOR_COUNT)


def _finite(values: np.ndarray) -> np.ndarray:
    """Replaces values that are not finite by 0: one diverged sample must not spoil the others."""
    return np.where(np.isfinite(values), values, 0.0)
