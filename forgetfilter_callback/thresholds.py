"""Do forgetting values hold two populations, and where does φ lie between them? No labels are asked for.

φ is anchored, not fitted: a sample is called forgotten when S1+ has taken a part of what the model gave it that is named
here, or, for `smoothed`, more than half of what S1+ typically takes from a token. Fitted to the values alone, φ follows the
shape of the benign rows (which are several populations themselves) rather than the unsafe ones: see `benchmarks/README.md`.
Only `smoothed`, which has little noise, may raise it towards where two populations part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import median_abs_deviation, norm
from sklearn.mixture import GaussianMixture

from .measures.names import Measure


Threshold = float | Literal["auto"]  # φ


# Where half is lost: a loss that rises by ln 2 nats halves a token's probability (in the geometric mean over a sample);
# half of what S1 taught; half of ROUGE-1's range. `smoothed` is measured by what the typical change takes; .55 of that was
# chosen on thirteen runs (bias, toxicity, harmfulness; S1+ at two learning rates), whole and with rows left out.
BASE_THRESHOLD: dict[Measure, float] = {
    "loss": math.log(2),
    "pooled": math.log(2),
    "smoothed": 0.55,
    "relative": 0.5,
    "rouge1": 0.5,
}
# How far `smoothed` raises φ from there to where two populations part. All the way, it would pass one unsafe row in ten
# where they lie far apart. Half of the way it takes no safe row of bias where a quarter of the way takes 0 to 5, but passes
# up to three unsafe ones more, and a few of those are enough to teach the model.
RAISE_FRACTION = 0.25
# The samples above φ must lie so many robust standard deviations of the others above them, median from median. The halves
# of a single normal population that φ cuts anywhere between its 45th and 98th percentile stay below it. Not asked of
# `smoothed`: real populations that overlap stand no further apart than such halves do, and are told by where φ lies. (So a
# single population that φ happens to cut in the middle is cut.)...
MIN_DISTANCE = 2.41
# ...and, of every measure, further out, so many times the distance that the tail of a single normal population would have.
MIN_TAIL_RATIO = 1.3
# By so many nats a sample of the median length must become less likely with each typical change that it lost, or `smoothed`
# is not believed. At the end of a gentle S1+ it was .70, .65 and −.38 on clean sets of bias and harmfulness, 1.8 to 19 where
# half of the rows were unsafe. (On toxicity, clean, 3.2, but nothing lies above φ; after a hard S1+ on clean bias 2.7.)
MIN_NATS_PER_UNIT = 1.0
# The least standard deviation of the others: many equal values (ROUGE drops of 0) have none of their own.
MIN_SPREAD = 0.05


@dataclass(frozen=True)
class Separability:
    """Whether the values hold two populations.

    Attributes:
        separable (`bool`):
            Whether there is a forgotten population, apart from the rest.
        threshold (`float`):
            φ between the two, if they are separable.
        reason (`str`):
            Why, in a sentence.
        distance (`float` or `None`):
            From the median of the values up to φ to that of the values above it, in robust standard deviations (1.48 MAD)
            of the former. `None` if one side is empty.
    """

    separable: bool
    threshold: float
    reason: str
    distance: float | None = None


def find_threshold(values: np.ndarray, measure: Measure, nats_per_unit: float | None = None) -> Separability:
    """Finds whether some samples are forgotten apart from the rest, and φ between them.

    φ is where half is lost, for `smoothed` .55 of what the typical change takes (see [`BASE_THRESHOLD`]), or, for `smoothed`, a
    quarter of the way from there to where two populations part, if they part above it. There is nothing to remove if no
    sample, or every sample, lies above it, if samples hardly became less likely with what they lost (`nats_per_unit`), or if those
    above it are not set apart: their median within 2.41 robust standard deviations of the others' median (not asked of
    `smoothed`), or no further out than the tail of a normal population of its size would be.

    Args:
        values (`np.ndarray` of shape `(samples,)`):
            Forgetting values without NaN; higher is more forgotten.
        measure (`"loss"`, `"relative"`, `"pooled"`, `"smoothed"` or `"rouge1"`):
            What they are.
        nats_per_unit (`float`, *optional*):
            [`Trace.nats_per_change`]. Of `smoothed`, nothing is removed below 1; NaN or `None`: that is not asked.
    """
    phi, raised = BASE_THRESHOLD[measure], ""
    if measure == "smoothed" and (parting := mixture_boundary(values)) > phi:
        higher = phi + RAISE_FRACTION * (parting - phi)
        passed = int(((values > phi) & (values <= higher)).sum())
        raised = f"; φ was raised from {phi:.2f}, past {passed} of the rest, towards {parting:.2f}, where two part"
        phi = higher
    kept, forgotten = values[values <= phi], values[values > phi]
    if not len(forgotten):
        return Separability(False, phi, f"no sample is forgotten more than {phi:.2f}; nothing to remove")
    if not len(kept):
        return Separability(False, phi, "every sample is forgotten, the safe ones too; they cannot be told apart")
    spread = max(float(median_abs_deviation(kept, scale="normal")), MIN_SPREAD)
    distance = float(np.median(forgotten) - np.median(kept)) / spread
    if measure == "smoothed" and nats_per_unit is not None and nats_per_unit < MIN_NATS_PER_UNIT:
        return Separability(
            False,
            phi,
            f"not separable: with each typical change that they lost, samples became less likely by only {nats_per_unit:.2f} nats "
            f"({MIN_NATS_PER_UNIT:.0f} at least), so S1+ has moved single tokens, or little yet; nothing to remove",
            distance,
        )
    tail = float(norm.isf(len(forgotten) / len(values) / 2))
    least = 0.0 if measure == "smoothed" else MIN_DISTANCE
    if distance < max(least, MIN_TAIL_RATIO * tail):
        return Separability(
            False,
            phi,
            f"not separable: the {len(forgotten)} most forgotten samples lie only {distance:.1f} robust standard "
            f"deviations above the rest{raised}; nothing to remove",
            distance,
        )
    doubt = "; the halves of one population lie as far apart: look at them" if distance < MIN_DISTANCE else ""
    return Separability(
        True,
        phi,
        f"the median of those above φ lies {distance:.1f} robust standard deviations above the median of the "
        f"rest{raised}{doubt}",
        distance,
    )


def mixture_boundary(values: np.ndarray) -> float:
    """Where the upper of two normal populations becomes the likelier one; −∞ if one population describes the values better.

    By the Bayesian information criterion.
    """
    if len(np.unique(values)) < 3:
        return -math.inf
    column = values[:, None]
    one, two = (GaussianMixture(number, n_init=3, random_state=0).fit(column) for number in (1, 2))
    between = np.linspace(two.means_.min(), two.means_.max(), 256)
    is_upper = two.predict(between[:, None]) == two.means_.argmax()
    if one.bic(column) <= two.bic(column) or not is_upper.any():
        return -math.inf
    return float(between[is_upper.argmax()])
