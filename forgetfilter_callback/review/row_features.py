"""Features of the rows of a trace, for a ranking that learns from verdicts."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import norm, rankdata
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from ..data.loss_tokens import LossTokens
from ..measures.common import Sliceable, by_window, loss_rises, mean_of_largest
from ..measures.smoothed import loss_changes, random_subset, smoothed_over_states
from ..trace.trace import Trace


# Principal components of the hidden states that become features.
COMPONENTS = 100
# Variance of all components together, relative to that of all ranks together (1 each, without ties).
COMPONENTS_VARIANCE = 4.0
# The components are fitted to at most this many random rows. The states of this many rows are in memory at a time.
COMPONENTS_MAX_ROWS = 10_000
# Fraction of a row's tokens that the feature "largest rises" averages.
LARGEST_FRACTION = 0.1


def row_features(trace: Trace) -> np.ndarray:
    """Computes the features of all rows: ranks of the measures and losses, and principal components of the hidden states.

    The ranks are mapped to the quantiles of a normal distribution. There is one each for `smoothed`, `loss`, `pooled` and
    `relative`, for the largest tenth of the rises, for `smoothed` before its smoothing, for the mean losses of the base
    model and of the model after noisy finetuning, and for the number of loss tokens. `relative` and the losses of the base
    model are left out if the trace does not hold them for all rows. The losses and the length say which
    kind of text a row is. Verdicts show whether that kind is unsafe, so these features have no place in a measure of
    forgetting.

    The components are those of the centered hidden states of the model after noisy finetuning, scaled to length 1. If there
    are more than 10,000 rows, they are fitted to 10,000 random ones. Together they have four times the variance of all
    ranks together, if there are no ties.

    Args:
        trace ([`Trace`]):
            A trace with records of the safety session.

    Returns:
        `np.ndarray` of shape `(samples, features)`, float32. Each feature has mean 0; ranks come first. A row without a
        value gets the middle rank.

    Raises:
        TraceError: if the trace does not hold the records that the measures need.
    """
    before, after = trace.first_and_last()
    offsets, states = trace.rows.loss_offsets, trace.stored_states(before)
    losses = trace.stored_losses(before), trace.stored_losses(after)
    changes = loss_changes(LossTokens(trace.rows), offsets, *losses)
    values = [
        smoothed_over_states(changes.agreed, states),
        changes.rises,
        changes.pooled,
        changes.agreed,
        by_window(_largest_rises, offsets, *losses),
        trace.mean_losses(before),
        np.diff(offsets).astype(np.float64),
    ]
    if trace.base_record is not None:
        values += [trace.forgetting("relative"), trace.mean_losses(trace.base_record)]
    components = _state_components(states, len(trace.rows), COMPONENTS_VARIANCE * len(values))
    return np.column_stack([*map(_normal_scores, values), components])


def _largest_rises(offsets: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return mean_of_largest(loss_rises(before, after), offsets, lambda count: math.ceil(LARGEST_FRACTION * count))


def _normal_scores(values: np.ndarray) -> np.ndarray:
    """Ranks as quantiles of a normal distribution, float32; 0 for values that are not finite."""
    scores = np.zeros(len(values), np.float32)
    known = np.isfinite(values)
    scores[known] = norm.ppf((rankdata(values[known]) - 0.5) / known.sum())
    return scores


def _state_components(states: Sliceable, rows: int, variance: float) -> np.ndarray:
    """Principal components of the centered states, which are scaled to length 1: shape `(rows, components)`, float32.

    Together, the components of the rows that they are fitted to have the given variance. Numbers that are not finite count
    as the center, so that a row without any finite number has components near 0.
    """
    chunks = [slice(start, start + COMPONENTS_MAX_ROWS) for start in range(0, rows, COMPONENTS_MAX_ROWS)]
    sums = [np.nansum(_finite_or_nan(states[chunk]), axis=0, dtype=np.float64) for chunk in chunks]
    counts = [np.isfinite(states[chunk]).sum(axis=0) for chunk in chunks]
    center = (np.sum(sums, axis=0) / np.maximum(np.sum(counts, axis=0), 1)).astype(np.float32)

    def directions(chosen: np.ndarray) -> np.ndarray:
        return normalize(np.nan_to_num(_finite_or_nan(chosen) - center, copy=False), copy=False)

    is_fitted = np.zeros(rows, dtype=bool)
    is_fitted[random_subset(rows, COMPONENTS_MAX_ROWS)] = True
    fitted = directions(np.concatenate([states[chunk][is_fitted[chunk]] for chunk in chunks]))
    pca = PCA(min(COMPONENTS, *fitted.shape), random_state=0).fit(fitted)
    del fitted
    scale = math.sqrt(variance / max(pca.explained_variance_.sum(), 1e-9))
    components = np.empty((rows, pca.n_components_), np.float32)
    for chunk in chunks:
        components[chunk] = scale * pca.transform(directions(states[chunk]))
    return components


def _finite_or_nan(states: np.ndarray) -> np.ndarray:
    """The states in float32. Values that are not finite are NaN."""
    return np.where(np.isfinite(states), states, np.nan).astype(np.float32)
