"""Do forgetting values hold two populations? And where does φ lie between them? From the values alone, no labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.mixture import GaussianMixture


FEWEST_VALUES = 20
# Ashman, Bird & Zepf 1994: two normal components are cleanly separated when the distance of their means is more than two
# of their (root mean square) standard deviations.
LEAST_DISTANCE = 2.0
# Splits that the mixture is started from, as shares of the values in the upper population.
_STARTS = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75)
# No component narrower than this part of the values' interquartile range: duplicates would make one of width zero.
_LEAST_WIDTH = 0.1


@dataclass(frozen=True)
class Separability:
    """Whether the values hold two populations.

    Attributes:
        threshold (`float` or `None`):
            φ between the two populations; `None` if there is nothing to remove.
        reason (`str`):
            Why, in a sentence.
        distance (`float` or `None`):
            Ashman's D of the two components: the distance of their means in standard deviations (root mean square).
        lower, upper (`tuple[float, float, float]` or `None`):
            Mean, standard deviation and share of each component.
    """

    threshold: float | None
    reason: str
    distance: float | None = None
    lower: tuple[float, float, float] | None = None
    upper: tuple[float, float, float] | None = None


def separate(values: np.ndarray) -> Separability:
    """Finds φ where the values hold two populations.

    A mixture of two normal components is fitted. φ is where a value becomes likelier to belong to the upper one. There
    is nothing to remove if one component explains the values as well (BIC), if the two are not cleanly separated
    (Ashman's D ≤ 2), or if the upper one is not forgotten (its mean is not above zero).

    Args:
        values (`np.ndarray` of shape `(samples,)`):
            Forgetting values without NaN; higher is more forgotten.
    """
    values = np.sort(np.asarray(values, dtype=np.float64))
    if len(values) < FEWEST_VALUES:
        return Separability(None, f"too few values to tell ({len(values)}, needed {FEWEST_VALUES}); nothing removed")
    if values[0] == values[-1]:
        return Separability(None, "all values are the same; nothing removed")
    column = values[:, None]
    least_variance = (_LEAST_WIDTH * max(np.subtract(*np.quantile(values, [0.75, 0.25])), 1e-3)) ** 2
    one = GaussianMixture(1, reg_covar=least_variance).fit(column)
    two = max((_fit_two(column, share, least_variance) for share in _STARTS), key=lambda fit: fit.score(column))
    order = np.argsort(two.means_[:, 0])
    means, deviations, weights = two.means_[order, 0], np.sqrt(two.covariances_[order, 0, 0]), two.weights_[order]
    distance = float((means[1] - means[0]) / np.sqrt(np.mean(deviations**2)))
    lower, upper = ((float(m), float(s), float(w)) for m, s, w in zip(means, deviations, weights, strict=True))
    found = {"distance": distance, "lower": lower, "upper": upper}
    if two.bic(column) >= one.bic(column):
        return Separability(
            None, "not separable (one population explains the values as well); nothing removed", **found
        )
    if distance <= LEAST_DISTANCE:
        return Separability(None, f"not separable (Ashman's D = {distance:.2f} ≤ 2); nothing removed", **found)
    if means[1] <= 0:
        return Separability(None, "no population was forgotten (no mean above zero); nothing removed", **found)
    grid = np.linspace(means[0], means[1], 1000)
    of_upper = two.predict_proba(grid[:, None])[:, order[1]] > 0.5
    phi = float(grid[np.argmax(of_upper)])
    reason = f"two populations, around {means[0]:.2f} and {means[1]:.2f} (Ashman's D = {distance:.2f})"
    return Separability(phi, reason, **found)


def _fit_two(column: np.ndarray, share: float, least_variance: float) -> GaussianMixture:
    """The mixture that grows from putting the upper `share` of the sorted values into one component."""
    split = len(column) - max(1, round(share * len(column)))
    means = np.array([[column[:split].mean()], [column[split:].mean()]])
    variances = np.array([column[:split].var(), column[split:].var()]) + least_variance
    return GaussianMixture(
        2,
        means_init=means,
        weights_init=[split / len(column), 1 - split / len(column)],
        precisions_init=(1 / variances)[:, None, None],
        reg_covar=least_variance,
        max_iter=500,
    ).fit(column)
