"""Features of the rows of a trace, for a ranking that learns from verdicts."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import norm, rankdata
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from ..data.loss_tokens import LossTokens
from ..measures.common import by_window, loss_rises, mean_of_largest
from ..measures.smoothed import loss_changes, smoothed_over_states
from ..trace.trace import Trace


# Principal components of the hidden states that become features.
COMPONENTS = 30
# Fraction of a row's tokens that the feature "largest rises" averages.
LARGEST_FRACTION = 0.1


def row_features(trace: Trace) -> np.ndarray:
    """Computes the features of all rows: ranks of the measures and losses, and principal components of the hidden states.

    The ranks are mapped to the quantiles of a normal distribution. There is one each for `smoothed`, `loss`, `pooled` and
    `relative`, for the largest tenth of the rises, for `smoothed` before its smoothing, for the mean losses of the base
    model and of the model after noisy finetuning, and for the number of loss tokens. The losses and the length say which
    kind of text a row is. Verdicts show whether that kind is unsafe, so these features have no place in a measure of
    forgetting.

    The components are those of the centered hidden states of the model after noisy finetuning, scaled to length 1.

    Args:
        trace ([`Trace`]):
            A trace with records of the safety session.

    Returns:
        `np.ndarray` of shape `(samples, features)`, float64. Each feature has mean 0; ranks come first. A row without a
        value gets the middle rank.

    Raises:
        TraceError: if the trace does not hold the records that the measures need.
    """
    before, after = trace.first_and_last()
    offsets, states = trace.rows.loss_offsets, trace.states(before)
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
    return np.column_stack([*map(_normal_scores, values), _state_components(states)])


def _largest_rises(offsets: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return mean_of_largest(loss_rises(before, after), offsets, lambda count: math.ceil(LARGEST_FRACTION * count))


def _normal_scores(values: np.ndarray) -> np.ndarray:
    """Ranks as quantiles of a normal distribution; 0 for values that are not finite."""
    scores = np.zeros(len(values))
    known = np.isfinite(values)
    scores[known] = norm.ppf((rankdata(values[known]) - 0.5) / known.sum())
    return scores


def _state_components(states: np.ndarray) -> np.ndarray:
    """Principal components of the states, divided by the standard deviation of the first one."""
    finite = np.where(np.isfinite(states), states, 0).astype(np.float32)
    directions = normalize(finite - finite.mean(axis=0))
    components = PCA(min(COMPONENTS, *directions.shape), random_state=0).fit_transform(directions)
    return components / max(components[:, 0].std(), 1e-9)
