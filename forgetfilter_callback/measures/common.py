"""Per-sample reductions shared by the measures.

Per-token values are stored flat: the values of sample `i` are `values[offsets[i]:offsets[i + 1]]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from ..utils.windows import window_bounds


# Samples are processed in windows of at most this many tokens, to bound the memory of intermediate results.
WINDOW_TOKENS = 2**17
# Values are extreme if they are further from the central 96 % range than its width.
CENTRAL_QUANTILES = (0.02, 0.98)


class Sliceable(Protocol):
    """One value per loss token or sample: an array, or values on disk that a slice reads into an array.

    Measures take slices of bounded length, so that not all values need be in memory at once.
    """

    def __getitem__(self, span: slice, /) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class TokenWindow:
    """The loss tokens of a window of samples.

    Attributes:
        offsets (`np.ndarray` of shape `(samples + 1,)`, integer):
            Start of each sample in `tokens` and `rises`.
        tokens (`np.ndarray` of shape `(loss_tokens,)`, integer):
            Token ids.
        rises (`np.ndarray` of shape `(loss_tokens,)`, float64):
            By how much the loss of each token rose, in nats.
    """

    offsets: np.ndarray
    tokens: np.ndarray
    rises: np.ndarray

    @cached_property
    def numbers(self) -> np.ndarray:
        """Numbers of the distinct tokens of each sample: shape `(loss_tokens,)`, int64. Occurrences of a token in one
        sample have the same number.
        """
        samples = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        return np.unique(samples * (int(self.tokens.max(initial=0)) + 1) + self.tokens, return_inverse=True)[1]


def token_windows(tokens: Sliceable, offsets: np.ndarray, before: Sliceable, after: Sliceable) -> Iterator[TokenWindow]:
    """Iterates over the samples in [`windows`], with the rises of their token losses from `before` to `after`."""
    for window, span in windows(offsets):
        yield TokenWindow(window, tokens[span], loss_rises(before[span], after[span]))


def windows(offsets: np.ndarray) -> Iterator[tuple[np.ndarray, slice]]:
    """Iterates over the samples in windows of at most 131,072 tokens. A longer sample is a window of its own.

    Args:
        offsets (`np.ndarray` of shape `(samples + 1,)`, integer):
            Start of each sample in the flat values; the last entry is `loss_tokens`.

    Yields:
        The offsets of the window's samples, which start at 0, and the slice of their tokens.
    """
    for start, stop in window_bounds(offsets, WINDOW_TOKENS):
        yield offsets[start : stop + 1] - offsets[start], slice(offsets[start], offsets[stop])


def by_window(function: Callable[..., np.ndarray], offsets: np.ndarray, *values: Sliceable) -> np.ndarray:
    """Computes one value per sample in windows, so that intermediate results do not grow with the number of samples.

    Args:
        function (`Callable`):
            Called with the offsets of a window's samples and the window's part of each of `values`. Returns one value per
            sample of the window.
        offsets (`np.ndarray` of shape `(samples + 1,)`, integer):
            Start of each sample in `values`.
        *values (`np.ndarray` of shape `(loss_tokens,)`, or [`Sliceable`]):
            Values of the loss tokens.

    Returns:
        `np.ndarray` of shape `(samples,)`.
    """
    results = [function(window, *(each[span] for each in values)) for window, span in windows(offsets)]
    return np.concatenate(results) if results else np.zeros(0)


def loss_rises(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Computes the rise of each loss in float64: `after - before`."""
    return after.astype(np.float64) - before


def mean_losses(losses: Sliceable, offsets: np.ndarray) -> np.ndarray:
    """Computes the mean loss of each sample.

    Args:
        losses (`np.ndarray` of shape `(loss_tokens,)`, or [`Sliceable`]):
            Loss of each token that contributes to the loss, in nats.
        offsets (`np.ndarray` of shape `(samples + 1,)`, integer):
            Start of each sample in `losses`; the last entry is `loss_tokens`.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, in nats per token; NaN for samples without loss tokens.
    """
    return by_window(_mean_losses, offsets, losses)


def _mean_losses(offsets: np.ndarray, losses: np.ndarray) -> np.ndarray:
    counts = np.diff(offsets)
    sums = np.add.reduceat(np.append(losses, np.float32(0)), offsets[:-1], dtype=np.float64)
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def clip_extremes(values: np.ndarray) -> np.ndarray:
    """Clips values to their central 96 % range, extended by its own width on both sides.

    From some 50 values on, a single one does not change the range.

    Args:
        values (`np.ndarray` of shape `(samples,)`, float64):
            NaN if unknown.
    """
    known = np.isfinite(values)
    if not known.any():
        return values
    low, high = np.quantile(values[known], CENTRAL_QUANTILES)
    return np.clip(values, low - (high - low), high + (high - low))


def all_finite(losses: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Tells which samples have only finite losses.

    Returns:
        `np.ndarray` of shape `(samples,)`, bool; `True` for samples without loss tokens.
    """
    samples = np.searchsorted(offsets, np.flatnonzero(~np.isfinite(losses)), side="right") - 1
    return np.bincount(samples, minlength=len(offsets) - 1) == 0


def mean_of_largest(values: np.ndarray, offsets: np.ndarray, limit: Callable[[int], int]) -> np.ndarray:
    """Averages the largest values of each sample. For many samples, call it by window (see [`by_window`]).

    Args:
        values (`np.ndarray` of shape `(loss_tokens,)`):
            One value per loss token.
        offsets (`np.ndarray` of shape `(samples + 1,)`, integer):
            Start of each sample in `values`.
        limit (`Callable`):
            Maps the number of a sample's values to how many of the largest to average, at least 1.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64; NaN for samples without loss tokens.
    """
    counts = np.diff(offsets)
    means = np.full(len(counts), np.nan)
    for count in np.unique(counts[counts > 0]).tolist():  # samples of equal length form a matrix
        samples = np.flatnonzero(counts == count)
        kept = min(limit(count), count)
        negated = -values[offsets[samples, None] + np.arange(count)]
        means[samples] = -np.partition(negated, kept - 1, axis=1)[:, :kept].mean(axis=1)
    return means
