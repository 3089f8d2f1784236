"""Smoothed forgetting: the probability that tokens lose, pooled over samples and smoothed over similar samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .common import (
    Sliceable,
    TokenWindow,
    all_finite,
    clip_extremes,
    mean_losses,
    mean_of_largest,
    token_windows,
)
from .pooled import TokenTotals, pooled_of_window


# Weight of a token's own value where no other sample contains the token.
SMOOTHED_PRIOR_WEIGHT = 0.25
# Fraction of a sample's tokens to average: those that lost the most probability.
SMOOTHED_FRACTION = 0.1
# Candidate ridge strengths, in units of the mean squared singular value.
RIDGE_STRENGTHS = np.logspace(-4, 4, 33)
# Changes beyond this quantile are clipped, so that no single sample determines the scale.
CLIP_QUANTILE = 0.98
# Smallest typical change, in nats. Below it, safety finetuning has changed nothing.
MIN_TYPICAL_CHANGE = 0.05
# The ridge is fitted to at most this many random samples. It predicts all samples.
RIDGE_MAX_SAMPLES = 10_000
# At most this many random samples are left out in turn to choose the ridge strength.
RIDGE_MAX_LEFT_OUT = 2_000


def smoothed_forgetting(
    tokens: Sliceable, offsets: np.ndarray, before: Sliceable, after: Sliceable, states: Sliceable
) -> np.ndarray:
    """Computes the forgetting that occurrences of a token, and similar samples, have in common.

    Formula, for a token whose loss rises by `r` nats:

    1. Lost probability: `lost = 1 - exp(-r)` if `r >= 0`, else `-(1 - exp(r))`.
    2. Agreement with other samples: `agreed = min(lost, pooled)`, where `pooled` averages `lost` over the token's
       occurrences in other samples (see [`TokenTotals`], with the prior `0.25 * lost`).
    3. Sample value: the mean of the largest tenth of `agreed`, divided by the typical change (see [`typical_change`]).
    4. Smoothing: a ridge regression of the sample values on the centered, L2-normalized hidden states of the samples. It
       shrinks each value towards samples with similar hidden states. Leave-one-out cross-validation chooses the
       regularization strength.

    The typical change depends on how long safety finetuning runs and how strongly it changes the model. Therefore values
    are comparable within one record, but not between records.

    It has little noise, because it keeps only what is systematic over tokens and samples. Useful for short texts, where
    the loss of a single sample is noisy. It needs hidden states. The default measure combines it with two others (see
    [`combined_forgetting`]).

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
        states (`np.ndarray` of shape `(samples, size)`, float16, or [`Sliceable`]):
            Hidden states of the samples at the start of safety finetuning (see [`Scores`]).

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, in typical changes. Higher is more forgotten: 0 if nothing was
        lost, 1 if a token loses as much as the typical change takes, negative if the sample became more likely. NaN
        for samples without loss tokens and for samples with a loss or state that is not finite.
    """
    return smoothed_over_states(agreed_forgetting(tokens, offsets, before, after), states)


def agreed_forgetting(tokens: Sliceable, offsets: np.ndarray, before: Sliceable, after: Sliceable) -> np.ndarray:
    """Computes [`smoothed_forgetting`] without its last step, the smoothing over similar samples.

    It has more noise and needs no hidden states.

    Args:
        tokens, offsets, before, after:
            As in [`smoothed_forgetting`].

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, in typical changes. NaN for samples without loss tokens and for
        samples with a loss that is not finite.
    """
    return loss_changes(tokens, offsets, before, after).agreed


@dataclass(frozen=True, eq=False)
class LossChanges:
    """How the losses of samples changed: what [`smoothed_forgetting`] and [`combined_forgetting`] are computed from.

    Attributes:
        rises (`np.ndarray` of shape `(samples,)`, float64):
            Mean rise of the token losses, in nats per token. It is [`loss_forgetting`] up to rounding.
        pooled (`np.ndarray` of shape `(samples,)`, float64):
            [`pooled_forgetting`], in nats.
        agreed (`np.ndarray` of shape `(samples,)`, float64):
            [`agreed_forgetting`], in typical changes.
        typical_change (`float`):
            The typical change as a lost probability (see [`typical_change`]).
    """

    rises: np.ndarray
    pooled: np.ndarray
    agreed: np.ndarray
    typical_change: float


def loss_changes(tokens: Sliceable, offsets: np.ndarray, before: Sliceable, after: Sliceable) -> LossChanges:
    """Computes all changes together: losses on disk are read twice, and the distinct tokens of samples are found once.

    Args:
        tokens, offsets, before, after:
            As in [`smoothed_forgetting`].

    Returns:
        [`LossChanges`]: NaN for samples without loss tokens and for samples with a loss that is not finite.
    """
    rise_totals, lost_totals = TokenTotals(), TokenTotals()
    rises, squares, pooled, agreed = [np.zeros(0)], [np.zeros(0)], [np.zeros(0)], [np.zeros(0)]
    for window in token_windows(tokens, offsets, before, after):
        rise_totals.add(window, window.rises)
        lost_totals.add(window, lost_probability(window.rises))
        rises.append(mean_losses(window.rises, window.offsets))
        squares.append(mean_losses(window.rises**2, window.offsets))
    for window in token_windows(tokens, offsets, before, after):
        pooled.append(pooled_of_window(window, rise_totals))
        agreed.append(agreed_of_window(window, lost_totals))
    typical = typical_change(np.concatenate(squares), np.diff(offsets))
    return LossChanges(np.concatenate(rises), np.concatenate(pooled), np.concatenate(agreed) / typical, typical)


def agreed_of_window(window: TokenWindow, totals: TokenTotals) -> np.ndarray:
    """Computes [`agreed_forgetting`] of a window of samples, as a lost probability, given the totals of the lost
    probabilities in all samples.
    """
    lost = lost_probability(window.rises)
    agreed = np.minimum(lost, totals.mean_over_others(window, lost, SMOOTHED_PRIOR_WEIGHT * lost))
    largest = mean_of_largest(agreed, window.offsets, lambda count: math.ceil(SMOOTHED_FRACTION * count))
    largest[~all_finite(window.rises, window.offsets)] = np.nan
    return largest


def lost_probability(rises: np.ndarray) -> np.ndarray:
    """Computes the fraction of a token's probability that was lost: step 1 of [`smoothed_forgetting`]."""
    return -np.sign(rises) * np.expm1(-np.abs(rises))


def smoothed_over_states(values: np.ndarray, states: Sliceable) -> np.ndarray:
    """Shrinks each value towards samples with similar hidden states, by ridge regression.

    Formula: `mean(values) + D w`, where the rows of `D` are the centered hidden states, scaled to length 1, and `w`
    are the ridge coefficients. With fewer than 3 known values, they are returned unchanged.

    Args:
        values (`np.ndarray` of shape `(samples,)` or `(samples, columns)`, float64):
            One value per sample and record. NaN if unknown; unknown values are not fitted. Several records that have the
            same known samples take little longer than one.
        states (`np.ndarray` of shape `(samples, size)`, float16, or [`Sliceable`]):
            Hidden states of the samples (see [`Scores`]).

    Returns:
        `np.ndarray` of the shape of `values`, float64, in the unit of `values`. NaN where a value or the state is not
        finite.
    """
    records = values.reshape(len(values), -1)
    finite = np.concatenate([np.isfinite(states[span]).all(axis=1) for span in _chunks(len(values))])
    known = np.isfinite(records) & finite[:, None]
    smoothed = np.full(records.shape, np.nan)
    for pattern in {column.tobytes(): column for column in known.T}.values():
        columns = (known == pattern[:, None]).all(axis=0)
        smoothed[np.ix_(pattern, columns)] = _smoothed_known(records[np.ix_(pattern, columns)], states, pattern)
    return smoothed.reshape(values.shape)


def _smoothed_known(values: np.ndarray, states: Sliceable, known: np.ndarray) -> np.ndarray:
    """Smooths the values of shape `(known samples, records)`. `known` selects their states."""
    if len(values) < 3:  # too few samples to compare
        return values
    spans = _chunks(len(known))
    center = sum(states[span][known[span]].sum(axis=0, dtype=np.float64) for span in spans) / len(values)

    def directions(chosen: np.ndarray) -> np.ndarray:
        centered = chosen.astype(np.float64)  # changed in place below: each copy takes 8 bytes per state
        centered -= center
        lengths = np.sqrt(np.einsum("ij,ij->i", centered, centered))
        centered /= np.where(lengths > 0, lengths, 1.0)[:, None]
        return centered

    fitted = np.zeros(len(known), bool)
    fitted[np.flatnonzero(known)[random_subset(len(values), RIDGE_MAX_SAMPLES)]] = True
    fit_values = values[fitted[known]]
    mean = fit_values.mean(axis=0)
    fit_directions = directions(np.concatenate([states[span][fitted[span]] for span in spans]))
    coefficients = ridge_coefficients(fit_directions, fit_values - mean)
    del fit_directions
    return np.concatenate([directions(states[span][known[span]]) @ coefficients for span in spans]) + mean


def _chunks(count: int) -> list[slice]:
    """Slices of the samples, at least one. They bound the memory for states and directions."""
    return [slice(start, start + RIDGE_MAX_SAMPLES) for start in range(0, max(count, 1), RIDGE_MAX_SAMPLES)]


def random_subset(count: int, size: int) -> np.ndarray:
    """Draws `size` of `count` indices, the same in each call, in increasing order: shape `(min(count, size),)`, integer.

    Evenly spaced indices would see one kind of sample only where kinds alternate.
    """
    if count <= size:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, size, replace=False))


def ridge_coefficients(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Fits a ridge regression without intercept. Leave-one-out cross-validation chooses the strength.

    Formula: in the basis of the eigenvectors of `X.T X`, with `X` the features, the coefficients for a strength are
    `w = X.T y / (eigenvalues + strength)`. The error of a sample that is left out of the fit is its residual divided by
    `1 - h`, where `h` is its entry on the diagonal of the hat matrix. If there are more than 2,000 samples, the errors of
    2,000 random ones decide, because the diagonal takes most of the time.

    Up to 2,000 samples, the result equals that of scikit-learn's `RidgeCV`, which takes more than a second to import.

    Args:
        features (`np.ndarray` of shape `(samples, size)`, float64):
            One row per sample.
        targets (`np.ndarray` of shape `(samples,)` or `(samples, columns)`, float64):
            The centered values to fit. Each column is fitted on its own.

    Returns:
        `np.ndarray` of shape `(size,)` or `(size, columns)`, float64: the coefficients with the smallest error among
        `RIDGE_STRENGTHS`.
    """
    strengths = RIDGE_STRENGTHS * len(features) / min(features.shape)
    eigenvalues, basis = np.linalg.eigh(features.T @ features)
    shrinkage = 1 / (eigenvalues[:, None] + strengths)  # (size, strengths)
    left_out_samples = random_subset(len(features), RIDGE_MAX_LEFT_OUT)
    projected = features[left_out_samples] @ basis
    left_out = 1 - projected**2 @ shrinkage  # (samples, strengths)
    best = []
    for target in np.atleast_2d(targets.T):
        coefficients = (target @ features @ basis)[:, None] * shrinkage
        errors = (target[left_out_samples, None] - projected @ coefficients) / left_out
        best.append(coefficients[:, (errors**2).mean(axis=0).argmin()])
    return (basis @ np.column_stack(best)).reshape(-1, *targets.shape[1:])


def typical_change(squares: np.ndarray, counts: np.ndarray) -> float:
    """Computes the fraction of a token's probability that the typical change takes.

    Formula: `1 - exp(-R)`, where `R` is the root mean square of the changes of the token losses, in nats, and at least
    0.05. Samples whose mean square change exceeds the 98th percentile are clipped to it, so that no single sample
    determines the scale.

    Args:
        squares (`np.ndarray` of shape `(samples,)`, float64):
            Mean square change of the token losses of each sample. NaN if unknown.
        counts (`np.ndarray` of shape `(samples,)`, integer):
            Number of loss tokens of each sample.

    Returns:
        `float` between 0 and 1; NaN if no sample has finite losses.
    """
    known = np.isfinite(squares)
    if not known.any():
        return math.nan
    clipped = np.minimum(squares[known], np.quantile(squares[known], CLIP_QUANTILE))
    change = math.sqrt(np.average(clipped, weights=counts[known]))
    return -math.expm1(-max(change, MIN_TYPICAL_CHANGE))


def nats_per_unit(values: np.ndarray, rises: np.ndarray, counts: np.ndarray) -> float:
    """Computes how much less likely a sample of median length becomes per unit of smoothed forgetting, in nats.

    Formula: the slope of a least-squares line through the samples' mean loss rises over their values, times the median
    number of loss tokens per sample.

    Safety finetuning that unlearns unsafe content makes whole samples less likely. On a clean set, it moves single
    tokens up and down, or moves little. Then values can be large relative to the typical change while samples lose
    hardly any likelihood, and the slope is small.

    Source: this library.

    Args:
        values (`np.ndarray` of shape `(samples,)`, float64):
            [`smoothed_forgetting`] of the samples.
        rises (`np.ndarray` of shape `(samples,)`, float64):
            Their mean loss rises, in nats per token (see [`LossChanges`]).
        counts (`np.ndarray` of shape `(samples,)`, integer):
            Their numbers of loss tokens.

    Returns:
        `float`, in nats per typical change; NaN if all values are equal or none is known. Extreme rises are clipped (see
        [`clip_extremes`]).
    """
    known = np.isfinite(values) & np.isfinite(rises)
    if not known.any():
        return math.nan
    centered = values[known] - values[known].mean()
    if np.abs(centered).max() < 1e-9:
        return math.nan
    return float(centered @ clip_extremes(rises[known]) / (centered @ centered) * np.median(counts[known]))
