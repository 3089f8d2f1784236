"""TODO"""

from __future__ import annotations

import math

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import normalize

from .common import _all_finite, _mean_of_largest, mean_losses
from .pooled import pool_over_samples


# `smoothed`: how far a token's own loss is trusted where no other sample has the token; which share of a sample's tokens is
# averaged, the most forgotten; how strong the ridge may be, in units of the mean squared singular value.
SMOOTHED_PRIOR_WEIGHT = 0.25
SMOOTHED_FRACTION = 0.1
RIDGE_STRENGTHS = np.logspace(-4, 4, 33)
# Samples that have changed more than this quantile count as it, so that no single one decides for the others.
CLIP_QUANTILE = 0.98
# The least typical change, in nats: below it S1+ has done nothing.
MIN_TYPICAL_CHANGE = 0.05
# `smoothed`: the ridge learns from so many samples at most, evenly taken, and predicts all.
RIDGE_MAX_SAMPLES = 10_000


def smoothed_forgetting(
    tokens: np.ndarray, offsets: np.ndarray, before: np.ndarray, after: np.ndarray, states: np.ndarray
) -> np.ndarray:
    """What tokens and samples that are alike agree on: the forgetting that is systematic, without what is a sample's own.

    A token whose loss rises by r has lost the share 1 − e^−r of its probability (where r is negative, it has won the share
    1 − e^r of the later one, which counts below 0). That counts as far as the token's own loss and its loss in the other
    samples (see [`pool_over_samples`]; a token that no other sample has is trusted with a quarter of its own) both go: the smaller of
    the two. The mean over the tenth of a sample's tokens that lost most is the sample's. Then a ridge regression of that on
    the direction of the samples' states, whose strength is chosen by leaving samples out, draws a sample towards those that
    M1 takes for its like: the fitted values. They are measured by what the typical change takes (see [`typical_loss`]), for
    how much is lost altogether depends on how long and how hard S1+ trains. So they can be compared within one record, not
    between records.

    Args:
        tokens, offsets, before, after:
            As in [`pooled_forgetting`].
        states (`np.ndarray` of shape `(samples, size)`):
            What M1 makes of each sample (see [`Scores`]).

    Returns:
        `np.ndarray` of shape `(samples,)`, float64: 0 is nothing lost, 1 as much as the typical change takes; below 0 what
        has gained; NaN where no token counts, or losses or states are not finite.
    """
    return smoothed_over_states(agreed_forgetting(tokens, offsets, before, after), states)


def agreed_forgetting(tokens: np.ndarray, offsets: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[`smoothed_forgetting`] before samples are drawn towards their like: noisier, and without states."""
    rises = after.astype(np.float64) - before
    lost = -np.sign(rises) * np.expm1(-np.abs(rises))
    agreed = np.minimum(lost, pool_over_samples(tokens, offsets, lost, prior=SMOOTHED_PRIOR_WEIGHT * lost))
    largest = _mean_of_largest(agreed, offsets, lambda counts: np.ceil(SMOOTHED_FRACTION * counts))
    largest[~_all_finite(rises, offsets)] = np.nan
    return largest / typical_loss(before, after, offsets)


def smoothed_over_states(values: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Draws each sample's value towards those of the samples whose states point the same way, by a ridge regression.

    Args:
        values (`np.ndarray` of shape `(samples,)`):
            NaN where unknown; such samples teach nothing and stay unknown.
        states (`np.ndarray` of shape `(samples, size)`):
            As in [`smoothed_forgetting`].

    Returns:
        `np.ndarray` of shape `(samples,)`, float64.
    """
    known = np.isfinite(values) & np.isfinite(states).all(axis=1)
    smoothed = np.full(len(values), np.nan)
    if known.sum() < 3:  # nothing to be alike
        smoothed[known] = values[known]
        return smoothed
    centre = states[known].mean(axis=0, dtype=np.float64)

    def directions(samples: np.ndarray) -> np.ndarray:
        return normalize(states[samples].astype(np.float64) - centre)

    places = np.flatnonzero(known)
    every = math.ceil(len(places) / RIDGE_MAX_SAMPLES)
    some, theirs = directions(places[::every]), values[places[::every]]
    strengths = RIDGE_STRENGTHS * len(some) / min(some.shape)
    ridge = RidgeCV(strengths, fit_intercept=False, gcv_mode="svd").fit(some, theirs - theirs.mean())
    for part in np.array_split(places, every):
        smoothed[part] = ridge.predict(directions(part)) + theirs.mean()
    return smoothed


def typical_loss(before: np.ndarray, after: np.ndarray, offsets: np.ndarray) -> float:
    """The share of a token's probability that the typical change R takes, 1 − e^−R: 0..1.

    R is the root mean square of the rises and falls of the tokens' losses, nats. Samples whose own is beyond the 98th
    percentile count as if it were that, so that no single one decides for the others.
    """
    rises = after.astype(np.float64) - before
    squares, counts = mean_losses(rises**2, offsets), np.diff(offsets)
    known = np.isfinite(squares)
    if not known.any():
        return math.nan
    clipped = np.minimum(squares[known], np.quantile(squares[known], CLIP_QUANTILE))
    change = math.sqrt(np.average(clipped, weights=counts[known]))
    return -math.expm1(-max(change, MIN_TYPICAL_CHANGE))


def nats_per_unit(values: np.ndarray, before: np.ndarray, after: np.ndarray, offsets: np.ndarray) -> float:
    """By how many nats a sample of the median length becomes less likely with each typical change that it lost.

    What S1+ unlearns, a sample loses as a whole. In a clean set S1+ moves single tokens, up and down, or moves little; then
    values that are large beside the typical change go with hardly any loss of the samples.

    Args:
        values (`np.ndarray` of shape `(samples,)`):
            [`smoothed_forgetting`] of these losses.
        before, after, offsets:
            As in [`pooled_forgetting`].

    Returns:
        `float`: the slope of the samples' mean rises on their values, times the median number of tokens; NaN if no sample
        differs from another. Rises count as if they lay no further beyond the middle 96 % than that is wide.
    """
    counts = np.diff(offsets)
    rises = mean_losses(after.astype(np.float64) - before, offsets)
    known = np.isfinite(values) & np.isfinite(rises)
    if not known.any():
        return math.nan
    away = values[known] - values[known].mean()
    if np.abs(away).max() < 1e-9:
        return math.nan
    low, high = np.quantile(rises[known], [1 - CLIP_QUANTILE, CLIP_QUANTILE])
    clipped = np.clip(rises[known], low - (high - low), high + (high - low))
    return float(away @ clipped / (away @ away) * np.median(counts[known]))
