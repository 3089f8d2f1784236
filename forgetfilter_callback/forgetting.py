"""Losses of two or three checkpoints → one forgetting value a sample, a measure. Pure functions of arrays.

Higher is more forgotten, whichever measure. Losses are flat: those of sample `i` are `[offsets[i]:offsets[i + 1]]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import normalize


Measure = Literal["loss", "relative", "pooled", "smoothed", "rouge1"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
DEFAULT_MEASURE: Measure = "smoothed"
FilterThreshold = float | Literal["auto"]  # φ
UNITS: dict[Measure, str] = {
    "loss": "nats per token",
    "relative": "part of what S1 taught",
    "pooled": "nats",
    "smoothed": "of the typical change",
    "rouge1": "ROUGE-1",
}

# What `relative` divides by at least, in nats per token: less than that was hardly learnt, and its ratio would be noise.
LEAST_LEARNT = 0.1
# `pooled`: as many zero rises are added to each token's occurrences, so that a rare token needs a large rise to stand out
POOLED_SHRINKAGE = 3
# `pooled`: how many of a sample's largest pooled rises are averaged.
POOLED_LARGEST = 3
# `smoothed`: how far a token's own loss is trusted where no other sample has the token; which share of a sample's tokens is
# averaged, the most forgotten; how strong the ridge may be, in units of the mean squared singular value.
SMOOTHED_TRUST = 0.25
SMOOTHED_SHARE = 0.1
SMOOTHED_STRENGTHS = np.logspace(-4, 4, 33)
# Samples that have changed more than this quantile count as it, so that no single one decides for the others.
CLIPPED_BEYOND = 0.98
# The least typical change, in nats: below it S1+ has done nothing.
LEAST_TYPICAL_CHANGE = 0.05
# `smoothed`: the ridge learns from so many samples at most, evenly taken, and predicts all.
SMOOTHED_SAMPLES = 10_000


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


def loss_forgetting(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Rise of the mean loss, L_t − L_0, in nats per token, of shape `(samples,)`."""
    return after - before


def relative_forgetting(base: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The part of what S1 taught that S1+ undid: (L_t − L_0) / (L_base − L_0), of shape `(samples,)`.

    0: nothing of it, 1: all of it. Samples of which S1 taught less than 0.1 nats per token are divided by 0.1.
    """
    return (after - before) / np.maximum(base - before, LEAST_LEARNT)


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
    values = _mean_of_largest(pooled(tokens, offsets, rises), offsets, lambda counts: POOLED_LARGEST)
    values[~_all_finite(rises, offsets)] = np.nan
    return values


def smoothed_forgetting(
    tokens: np.ndarray, offsets: np.ndarray, before: np.ndarray, after: np.ndarray, states: np.ndarray
) -> np.ndarray:
    """What tokens and samples that are alike agree on: the forgetting that is systematic, without what is a sample's own.

    A token whose loss rises by r has lost the share 1 − e^−r of its probability (where r is negative, it has won the share
    1 − e^r of the later one, which counts below 0). That counts as far as the token's own loss and its loss in the other
    samples (see [`pooled`]; a token that no other sample has is trusted with a quarter of its own) both go: the smaller of
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
    agreed = np.minimum(lost, pooled(tokens, offsets, lost, prior=SMOOTHED_TRUST * lost))
    largest = _mean_of_largest(agreed, offsets, lambda counts: np.ceil(SMOOTHED_SHARE * counts))
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
    every = math.ceil(len(places) / SMOOTHED_SAMPLES)
    some, theirs = directions(places[::every]), values[places[::every]]
    strengths = SMOOTHED_STRENGTHS * len(some) / min(some.shape)
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
    clipped = np.minimum(squares[known], np.quantile(squares[known], CLIPPED_BEYOND))
    change = math.sqrt(np.average(clipped, weights=counts[known]))
    return -math.expm1(-max(change, LEAST_TYPICAL_CHANGE))


def nats_per_change(values: np.ndarray, before: np.ndarray, after: np.ndarray, offsets: np.ndarray) -> float:
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
    low, high = np.quantile(rises[known], [1 - CLIPPED_BEYOND, CLIPPED_BEYOND])
    clipped = np.clip(rises[known], low - (high - low), high + (high - low))
    return float(away @ clipped / (away @ away) * np.median(counts[known]))


def pooled(tokens: np.ndarray, offsets: np.ndarray, values: np.ndarray, prior: np.ndarray | float = 0.0) -> np.ndarray:
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
    return (others + POOLED_SHRINKAGE * prior) / (others_count + POOLED_SHRINKAGE)


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


def rouge_forgetting(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Drop of ROUGE-1, R_0 − R_t, of shape `(samples,)`, −1..1 (Zhao et al. 2024, Algorithm 1)."""
    return before - after
