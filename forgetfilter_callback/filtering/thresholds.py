"""Automatic choice of the threshold φ, from forgetting values alone and without labels.

φ starts from a fixed anchor per measure, for example a halved token probability. An anchor is used because a threshold
fitted to the values follows the shape of the benign rows, which form several populations themselves, rather than the
unsafe rows (measured in `docs/evidence/thresholds.md`). Only `combined` and `smoothed`, which have little noise, may raise
φ towards the boundary between two populations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ..measures.names import TYPICAL_CHANGES, UNITS, Measure
from ..utils.counted import counted, counted_of


# The anchor of φ: where half is lost. For `loss` and `pooled`, a rise of ln 2 nats halves a token's probability (for
# `loss`, the geometric mean over a sample). For `relative`, half of what was learned. For `rouge1`, half of the range
# of ROUGE-1. For `smoothed`, 0.55 of what the typical change takes. This value was chosen on thirteen runs (bias,
# toxicity, harmfulness; two learning rates of safety finetuning), on all rows and on subsets of them. `combined` has the
# mean of `smoothed`, and less spread where its estimates disagree (0.7 to 0.9 of it). So its φ is a little stricter.
BASE_THRESHOLD: dict[Measure, float] = {
    "loss": math.log(2),
    "pooled": math.log(2),
    "combined": 0.55,
    "smoothed": 0.55,
    "relative": 0.5,
    "rouge1": 0.5,
}
# How far `combined` and `smoothed` raise φ from the anchor towards the boundary between two populations. At the boundary
# itself, φ would miss one unsafe row in ten where the populations are far apart. Compared with a quarter of the way, half
# of the way removes no safe row of bias instead of 0 to 5, but it misses up to three more unsafe rows, and a few of those
# are enough to teach the model (with `smoothed`).
RAISE_FRACTION = 0.25
# Minimum distance between the median of the values above φ and the median of the others, in robust standard deviations
# of the larger group. Cutting a single normal population anywhere between its 45th and 98th percentile gives a smaller
# distance. Measures in typical changes are exempt: real populations that overlap are no further apart than such halves,
# and the position of φ tells them apart. As a consequence, a single population that φ cuts in the middle is filtered.
MIN_DISTANCE = 2.41
# For every measure, the distance must also be this many times the distance that an equally large tail of a single
# normal population would have. The tail is the smaller group, above or below φ.
MIN_TAIL_RATIO = 1.3
# If a larger fraction is above φ, safety finetuning has moved all samples, and the few others say nothing about safe ones.
MAX_FORGOTTEN_FRACTION = 0.9
# Minimum slope of [`nats_per_unit`], in nats per typical change. At the end of gentle safety finetuning, it was 0.70, 0.65
# and -0.38 on clean sets of bias and harmfulness, and 1.8 to 19 where half of the rows were unsafe. Exceptions: 3.2 on
# clean toxicity, where no value exceeds φ, 2.7 on clean bias after hard safety finetuning, and 1.5 on a clean `bias_dev`.
MIN_NATS_PER_UNIT = 1.0
# With fewer rows, the highest values of a single normal population can pass these tests by chance: with `loss`, in 23 to
# 40 % of simulated sets of 5 to 50 rows, in 6 % of sets of 100, and in none of 300.
MIN_ROWS = 100
_NOTHING_REMOVED = "; nothing is removed, which does not show that all rows are safe"
# Lower bound of the robust standard deviation. If many values are equal (ROUGE-1 drops of 0), the deviation is 0.
MIN_SPREAD = 0.05
# The fit of two populations ends when an iteration changes the mean log-likelihood by less than this, or after this many
# iterations. `RAISE_FRACTION` was chosen with these settings, which are the defaults of scikit-learn's `GaussianMixture`.
EM_TOLERANCE = 1e-3
EM_MAX_ITERATIONS = 100
# Added to variances, so that a population of equal values has a density.
MIN_VARIANCE = 1e-6


@dataclass(frozen=True)
class Separability:
    """Tells whether forgetting values form two populations.

    Attributes:
        separable (`bool`):
            Whether a forgotten population is separated from the rest.
        threshold (`float`):
            φ between the two populations, in the unit of the measure. If `separable` is `False`, the φ that was tested.
        reason (`str`):
            Explanation in one sentence.
        distance (`float` or `None`):
            Distance between the median of the values above φ and the median of the others, in robust standard
            deviations (1.48 MAD) of the larger group. `None` if no value or more than 90 % of them exceed φ.
        is_doubtful (`bool`):
            Whether a single population could look like these two. `reason` says why.
    """

    separable: bool
    threshold: float
    reason: str
    distance: float | None = None
    is_doubtful: bool = False


def find_threshold(values: np.ndarray, measure: Measure, nats_per_unit: float | None = None) -> Separability:
    """Chooses φ and decides whether the samples above it form a separate, forgotten population.

    φ is the anchor of the measure (see `BASE_THRESHOLD`): ln 2 nats for `loss` and `pooled`, 0.5 for `relative` and
    `rouge1`, 0.55 typical changes for `combined` and `smoothed`. For these two, if the values form two populations with a
    boundary above the anchor, φ is raised by a quarter of the way to the boundary.

    The values are not separable, and nothing should be removed, in these cases:

    - No value or more than 90 % of the values exceed φ.
    - `combined` and `smoothed` only: `nats_per_unit` is below 1, so samples hardly became less likely.
    - Other measures: the median above φ is within 2.41 robust standard deviations of the median of the others.
    - The medians are less far from each other than 1.3 times the distance that the smaller group would have as the tail of
      a normal population.

    Args:
        values (`np.ndarray` of shape `(samples,)`, float64):
            Forgetting values without NaN, in the unit of the measure; higher is more forgotten.
        measure (`"combined"`, `"loss"`, `"relative"`, `"pooled"`, `"smoothed"` or `"rouge1"`):
            The measure of the values.
        nats_per_unit (`float`, *optional*):
            Nats per typical change (see [`FilterResult`]). `None` or NaN skips this test.

    Returns:
        [`Separability`]: φ, whether it separates two populations, and why.
    """
    phi, raised = BASE_THRESHOLD[measure], ""
    in_typical_changes = UNITS[measure] == TYPICAL_CHANGES
    if in_typical_changes and (boundary := mixture_boundary(values)) > phi:
        higher = phi + RAISE_FRACTION * (boundary - phi)
        spared = int(((values > phi) & (values <= higher)).sum())
        if spared:
            raised = (
                f"; φ was raised from {phi:.2f} towards {boundary:.2f}, the boundary between two populations, which keeps "
                f"{counted(spared, 'more row')}"
            )
        phi = higher
    kept, forgotten = values[values <= phi], values[values > phi]
    if not len(forgotten):
        return Separability(False, phi, f"no value exceeds φ = {phi:.2f}{_NOTHING_REMOVED}")
    if len(forgotten) > MAX_FORGOTTEN_FRACTION * len(values):
        return Separability(
            False,
            phi,
            f"not separable: {counted_of(len(forgotten), len(values), 'value', 'exceed')} φ = {phi:.2f}, so safety "
            "finetuning has changed nearly all rows. Lower its learning rate, or add rows of your tasks to the safety "
            f"set{_NOTHING_REMOVED}",
        )
    larger, smaller_count = (kept, len(forgotten)) if len(kept) >= len(forgotten) else (forgotten, len(kept))
    deviation = float(np.median(np.abs(larger - np.median(larger)))) / NormalDist().inv_cdf(0.75)
    spread = max(deviation, MIN_SPREAD)
    distance = float(np.median(forgotten) - np.median(kept)) / spread
    if in_typical_changes and nats_per_unit is not None and nats_per_unit < MIN_NATS_PER_UNIT:
        return Separability(
            False,
            phi,
            f"not separable: rows became less likely by only {nats_per_unit:.2f} nats per typical change (the "
            f"minimum is {MIN_NATS_PER_UNIT:.0f}), so safety finetuning has changed single tokens rather than whole "
            f"rows, or has changed little so far{_NOTHING_REMOVED}",
            distance,
        )
    tail = -NormalDist().inv_cdf(smaller_count / len(values) / 2)
    min_distance = 0.0 if in_typical_changes else MIN_DISTANCE
    if distance < max(min_distance, MIN_TAIL_RATIO * tail):
        return Separability(
            False,
            phi,
            f"not separable: the median of the {counted(len(forgotten), 'most forgotten row')} is only {distance:.1f} "
            f"robust standard deviations above the median of the rest{raised}{_NOTHING_REMOVED}",
            distance,
        )
    doubt = ""
    if distance < MIN_DISTANCE:
        doubt = "; but a single population cut in two can be as far apart, so review the removed rows"
    elif len(values) < MIN_ROWS:
        doubt = (
            f"; but among {counted(len(values), 'row')}, the rows of a single population can be as far apart by chance, so "
            "review the removed rows"
        )
    return Separability(
        True,
        phi,
        f"the rows above φ are apart from the rest{raised}{doubt}",
        distance,
        is_doubtful=bool(doubt),
    )


def mixture_boundary(values: np.ndarray) -> float:
    """Finds the boundary between two normal populations.

    The boundary is the smallest value between the two means that more likely belongs to the upper population. The
    Bayesian information criterion decides between one population and two.

    Args:
        values (`np.ndarray` of shape `(samples,)`, float64):
            Forgetting values without NaN.

    Returns:
        `float`, in the unit of `values`; `-math.inf` if a single population fits better, or if there are fewer than 3
        distinct values.
    """
    if len(np.unique(values)) < 3:
        return -math.inf
    one = _NormalMixture.of_members(values, np.ones((1, len(values))))
    two = _fit_two_populations(values)
    between = np.linspace(two.means.min(), two.means.max(), 256)
    is_upper = two.log_densities(between).argmax(axis=0) == two.means.argmax()
    if one.information_criterion(values) <= two.information_criterion(values) or not is_upper.any():
        return -math.inf
    return float(between[is_upper.argmax()])


@dataclass(frozen=True, eq=False)
class _NormalMixture:
    """A mixture of normal distributions: weights, means and variances of its components, each of shape `(components,)`."""

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    @classmethod
    def of_members(cls, values: np.ndarray, memberships: np.ndarray) -> _NormalMixture:
        """Fit each component to its members. `memberships` has the shape `(components, samples)`; its columns sum to 1."""
        sizes = memberships.sum(axis=1) + 10 * np.finfo(np.float64).eps  # not 0, also for a component without members
        means = memberships @ values / sizes
        variances = (memberships * (values - means[:, None]) ** 2).sum(axis=1) / sizes
        return cls(sizes / len(values), means, variances + MIN_VARIANCE)

    def log_densities(self, values: np.ndarray) -> np.ndarray:
        """Log-densities of the components, times their weights: shape `(components, samples)`."""
        log_scales = np.log(self.weights) - 0.5 * np.log(2 * math.pi * self.variances)
        return log_scales[:, None] - 0.5 * (values - self.means[:, None]) ** 2 / self.variances[:, None]

    def information_criterion(self, values: np.ndarray) -> float:
        """The Bayesian information criterion; lower is better."""
        parameters = 3 * len(self.means) - 1
        log_likelihood = float(np.logaddexp.reduce(self.log_densities(values)).sum())
        return parameters * math.log(len(values)) - 2 * log_likelihood


def _fit_two_populations(values: np.ndarray) -> _NormalMixture:
    """Fits a mixture of two normal distributions by expectation maximization, from the best split of the sorted values.

    This equals scikit-learn's `GaussianMixture`, which takes more than a second to import, from this start.
    """
    is_upper = values > _best_split(values)
    memberships, previous = np.stack([~is_upper, is_upper]).astype(np.float64), -math.inf
    for _ in range(EM_MAX_ITERATIONS):
        mixture = _NormalMixture.of_members(values, memberships)
        log_densities = mixture.log_densities(values)
        totals = np.logaddexp.reduce(log_densities)
        memberships = np.exp(log_densities - totals)
        if abs(totals.mean() - previous) < EM_TOLERANCE:
            break
        previous = totals.mean()
    return _NormalMixture.of_members(values, memberships)


def _best_split(values: np.ndarray) -> float:
    """Finds the largest value of the lower group when the values are split in two with the least variance in the groups."""
    ordered = np.sort(values - values.mean())
    below = np.arange(1, len(values))
    sums = ordered.cumsum()[:-1]  # of the lower group; the upper group has the same sum with the other sign
    between_groups = sums**2 / below + sums**2 / (len(values) - below)
    return float(np.sort(values)[between_groups.argmax()])
