"""Combined forgetting: the mean of three estimates of forgetting, each smoothed over similar samples."""

from __future__ import annotations

import numpy as np

from .common import by_window, loss_rises, mean_losses
from .loss import loss_forgetting
from .pooled import pooled_of_window, token_numbers, token_totals
from .smoothed import agreed_of_window, lost_probability, smoothed_over_states, typical_loss


# Estimates outside these quantiles are clipped, so that no single sample determines the spread or bends the smoothing.
CLIP_QUANTILES = (0.002, 0.998)


def combined_forgetting(
    tokens: np.ndarray, offsets: np.ndarray, before: np.ndarray, after: np.ndarray, states: np.ndarray
) -> np.ndarray:
    """Computes the mean of three estimates of forgetting that fail on different data.

    Formula:

    1. Three estimates per sample: [`loss_forgetting`], [`agreed_forgetting`] and [`pooled_forgetting`]. Each is clipped to
       its central 99.6 %.
    2. Each is smoothed over samples with similar hidden states (see [`smoothed_over_states`]).
    3. The first and the third are shifted and scaled to the mean and the standard deviation of the second, which is in
       typical changes.
    4. The value is the mean of the three.

    The mean loss sees whole answers that become unlikely. The other two see single words that other samples have too.
    Samples that all three call forgotten rank highest. Like those of [`smoothed_forgetting`], values are comparable within
    one record, but not between records.

    The default measure. It needs hidden states.

    Source: this library.

    Args:
        tokens, offsets, before, after, states:
            As in [`smoothed_forgetting`].

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, in typical changes. Higher is more forgotten. NaN for samples without
        loss tokens and for samples with a loss or state that is not finite.
    """
    return mean_estimate(smoothed_over_states(forgetting_estimates(tokens, offsets, before, after), states))


def forgetting_estimates(tokens: np.ndarray, offsets: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Computes the three estimates of [`combined_forgetting`] before they are smoothed.

    Args:
        tokens, offsets, before, after:
            As in [`smoothed_forgetting`].

    Returns:
        `np.ndarray` of shape `(samples, 3)`, float64: [`loss_forgetting`] in nats per token, [`agreed_forgetting`] in
        typical changes, and [`pooled_forgetting`] in nats. NaN where one of the three is unknown.
    """
    loss = loss_forgetting(mean_losses(before, offsets), mean_losses(after, offsets))
    lost_totals = token_totals(lost_probability, tokens, offsets, before, after)
    rise_totals = token_totals(loss_rises, tokens, offsets, before, after)

    def of_window(offsets: np.ndarray, tokens: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        numbers = token_numbers(offsets, tokens)  # for both, because it takes half of the time
        agreed = agreed_of_window(offsets, tokens, numbers, before, after, lost_totals)
        return np.column_stack([agreed, pooled_of_window(offsets, tokens, numbers, before, after, rise_totals)])

    agreed, pooled = by_window(of_window, offsets, tokens, before, after).reshape(-1, 2).T
    estimates = np.column_stack([loss, agreed / typical_loss(before, after, offsets), pooled])
    known = np.isfinite(estimates).all(axis=1)
    estimates[~known] = np.nan
    if known.any():
        estimates = np.clip(estimates, *np.quantile(estimates[known], CLIP_QUANTILES, axis=0))
    return estimates


def mean_estimate(estimates: np.ndarray) -> np.ndarray:
    """Averages the three smoothed estimates in the unit of the second: steps 3 and 4 of [`combined_forgetting`].

    Args:
        estimates (`np.ndarray` of shape `(samples, 3)`, float64):
            The smoothed [`forgetting_estimates`]. NaN if unknown.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, in typical changes; NaN where an estimate is unknown.
    """
    known = estimates[np.isfinite(estimates).all(axis=1)]
    if not len(known):
        return np.full(len(estimates), np.nan)
    means, deviations = known.mean(axis=0), known.std(axis=0)
    standardized = (estimates - means) / np.where(deviations > 0, deviations, 1.0)
    return means[1] + deviations[1] * standardized.mean(axis=1)
