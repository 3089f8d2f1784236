"""Combined forgetting: the mean of three estimates of forgetting, each smoothed over similar samples."""

from __future__ import annotations

import numpy as np

from .common import Sliceable, clip_extremes
from .smoothed import LossChanges, loss_changes, smoothed_over_states


# An estimate whose deviation is less than this fraction of its deviation before smoothing has no weight: it is noise.
MIN_SMOOTHED_FRACTION = 1e-3


def combined_forgetting(
    tokens: Sliceable, offsets: np.ndarray, before: Sliceable, after: Sliceable, states: Sliceable
) -> np.ndarray:
    """Computes the mean of three estimates of forgetting that fail on different data.

    Formula:

    1. Three estimates per sample: [`loss_forgetting`], [`pooled_forgetting`] and [`agreed_forgetting`]. Extreme values are
       clipped (see [`clip_extremes`]).
    2. Each is smoothed over samples with similar hidden states (see [`smoothed_over_states`]).
    3. The first two are shifted and scaled to the mean and the standard deviation of the third, which is in typical
       changes.
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
    estimates = forgetting_estimates(loss_changes(tokens, offsets, before, after))
    return mean_estimate(estimates, smoothed_over_states(estimates, states))


def forgetting_estimates(changes: LossChanges) -> np.ndarray:
    """Computes the three estimates of [`combined_forgetting`] before they are smoothed.

    Args:
        changes ([`LossChanges`]):
            How the losses changed.

    Returns:
        `np.ndarray` of shape `(samples, 3)`, float64: [`loss_forgetting`] in nats per token, [`pooled_forgetting`] in nats,
        and [`agreed_forgetting`] in typical changes. NaN where one of the three is unknown.
    """
    estimates = np.column_stack([changes.rises, changes.pooled, changes.agreed])
    estimates[~np.isfinite(estimates).all(axis=1)] = np.nan
    return np.apply_along_axis(clip_extremes, 0, estimates)


def mean_estimate(estimates: np.ndarray, smoothed: np.ndarray) -> np.ndarray:
    """Averages the smoothed estimates in the unit of the last one: steps 3 and 4 of [`combined_forgetting`].

    Args:
        estimates (`np.ndarray` of shape `(samples, 3)`, float64):
            The [`forgetting_estimates`]. NaN if unknown.
        smoothed (`np.ndarray` of shape `(samples, 3)`, float64):
            The same, smoothed. An estimate that smoothing shrinks to less than a thousandth has no weight.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, in typical changes; NaN where an estimate is unknown.
    """
    known = np.isfinite(smoothed).all(axis=1)
    if not known.any():
        return np.full(len(smoothed), np.nan)
    means, deviations = smoothed[known].mean(axis=0), smoothed[known].std(axis=0)
    weighted = deviations > MIN_SMOOTHED_FRACTION * estimates[known].std(axis=0)
    if not weighted.any():
        return smoothed[:, -1]
    standardized = (smoothed - means)[:, weighted] / deviations[weighted]
    return means[-1] + deviations[-1] * standardized.mean(axis=1)
