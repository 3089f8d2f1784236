"""The automatic threshold φ for all fractions of unsafe samples, and sets that are not separable."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import sample_ids, smoothed_populations, two_populations
from scipy.stats import norm
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

from forgetfilter_callback import FilterConfig
from forgetfilter_callback.filtering.filter_by_values import filter_by_values
from forgetfilter_callback.filtering.thresholds import BASE_THRESHOLD, find_threshold, mixture_boundary


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.25, 0.5, 0.75])
def test_automatic_threshold_finds_the_forgotten_population(fraction):
    values, unsafe = two_populations(fraction)
    result = filter_by_values(sample_ids(400), values, FilterConfig("loss"))
    assert result.method == "auto" and result.separability.separable
    assert (result.removed & unsafe).sum() >= 0.9 * unsafe.sum()
    assert (result.removed & ~unsafe).sum() <= 0.02 * 400


@pytest.mark.parametrize("unsafe_mean", [0.9, 1.6])
@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.25, 0.5, 0.75])
def test_smoothed_threshold_separates_two_populations(fraction, unsafe_mean):
    values, unsafe = smoothed_populations(fraction, unsafe_mean)
    result = filter_by_values(sample_ids(400), values, FilterConfig("smoothed"))
    assert (result.removed & unsafe).sum() >= 0.95 * unsafe.sum()
    assert (result.removed & ~unsafe).sum() <= 0.02 * 400


def test_smoothed_threshold_between_two_populations_far_above_the_anchor():
    values, unsafe = smoothed_populations(0.5, 2.4)
    result = filter_by_values(sample_ids(400), values + np.where(unsafe, 0, 0.2), FilterConfig("smoothed"))
    assert 0.7 < result.threshold < 1.1
    assert (result.removed & ~unsafe).sum() <= 0.02 * 400 and result.removed[unsafe].all()


@pytest.mark.parametrize("seed", range(5))
def test_smoothed_threshold_does_not_split_one_population(seed):
    values, _ = smoothed_populations(0.0, seed=seed)
    values += 0.1  # so that φ cuts off a tail
    assert 0 < (values > 0.55).mean() < 0.1
    result = filter_by_values(sample_ids(400), values, FilterConfig("smoothed"))
    assert result.removed.mean() <= 0.02  # a tail by chance
    assert mixture_boundary(values) == -math.inf


@pytest.mark.parametrize("below", [0.9, 0.95, 0.99, 0.999])
def test_one_population_with_a_tail_above_the_smoothed_anchor_is_not_separable(below):
    quantiles = norm.ppf((np.arange(1000) + 0.5) / 1000)
    values = 0.55 + 0.2 * (quantiles - norm.ppf(below))
    assert not find_threshold(values, "smoothed").separable
    assert (values > 0.55).sum() == round(1000 * (1 - below))


def test_overlapping_populations_use_the_smoothed_anchor():
    """The populations overlap as toxic and clean texts do: no further apart than two halves of one population."""
    quantiles = norm.ppf((np.arange(200) + 0.5) / 200)
    values = np.concatenate([0.43 + 0.14 * quantiles, 0.67 + 0.14 * quantiles])
    found = find_threshold(values, "smoothed")
    assert (found.separable, found.threshold) == (True, 0.55) and found.distance < 2.41
    assert found.reason.endswith("; but a single population cut in two can be as far apart, so review the removed rows")
    assert found.is_doubtful
    above = values > found.threshold
    assert above[200:].mean() > 0.75 and above[:200].mean() < 0.25


@pytest.mark.parametrize("seed", range(5))
def test_automatic_threshold_removes_nothing_from_a_clean_set(seed):
    values, _ = two_populations(0.0, seed=seed)
    result = filter_by_values(sample_ids(400), values - 0.1, FilterConfig("loss"))
    assert not result.removed.any() and result.threshold is None
    assert "nothing is removed, which does not show that all rows are safe" in result.reason


@pytest.mark.parametrize("mean", [-0.2, 0.2, 0.5, 0.7])
def test_one_wide_population_is_not_separable(mean):
    """As with a safety set of another domain: everything is forgotten to some degree."""
    values = np.random.default_rng(0).normal(mean, 0.5, 400)
    assert (values > math.log(2)).sum() > 10
    assert not find_threshold(values, "loss").separable


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.25, 0.3, 0.35])
def test_the_tail_of_a_clean_set_is_not_a_second_population(spread, seed):
    """At most 2 % is removed, if the tail is unusual by chance."""
    values = np.random.default_rng(seed).normal(0, spread, 400)
    assert filter_by_values(sample_ids(400), values, FilterConfig("loss")).removed.mean() <= 0.02


def test_a_normal_tail_is_not_a_second_population():
    """1 % of N(0, 0.3) is above ln 2, more than 2.5 standard deviations from the median."""
    values = norm.ppf((np.arange(1000) + 0.5) / 1000, scale=0.3)
    found = find_threshold(values, "loss")
    assert found.distance > 2.5 and not found.separable


def test_everything_forgotten_is_not_separable():
    found = find_threshold(np.full(30, 2.0), "loss")
    assert not found.separable and "not separable: 30 of 30 values exceed φ" in found.reason


@pytest.mark.parametrize("measure", ["smoothed", "loss", "relative", "pooled"])
@pytest.mark.parametrize("below", [0.001, 0.01, 0.05, 0.1, 0.12])
def test_the_lower_tail_of_one_population_is_not_a_second_one(below, measure):
    """Safety finetuning has moved all samples: nearly all of one population are above φ."""
    quantiles = norm.ppf((np.arange(1000) + 0.5) / 1000)
    values = BASE_THRESHOLD[measure] + 0.15 * (quantiles - norm.ppf(below))
    found = find_threshold(values, measure)
    assert found.threshold == BASE_THRESHOLD[measure]
    assert (values > found.threshold).sum() == round(1000 * (1 - below)) and not found.separable


def test_one_kept_sample_is_not_a_population():
    assert not find_threshold(np.append(np.full(99, 2.0), -2.0), "smoothed").separable


@pytest.mark.parametrize("measure", ["loss", "relative", "pooled", "rouge1"])
def test_threshold_is_half_of_what_can_be_lost(measure):
    """ln 2 nats halve a probability; `relative` and ROUGE-1 are fractions, so the threshold is 0.5."""
    half = math.log(2) if measure in ("loss", "pooled") else 0.5
    assert find_threshold(np.array([0.0, 0.01, -0.01, 3.0]), measure).threshold == half


def test_a_sample_at_the_automatic_threshold_is_kept():
    values = np.array([0.0, 0.01, -0.01, math.log(2), 3.0, 3.1])
    assert filter_by_values(sample_ids(6), values, FilterConfig("loss")).removed.tolist() == [False] * 4 + [True] * 2


def test_the_reason_when_not_separable():
    half = math.log(2)
    none = find_threshold(np.array([0.0, 0.5, half]), "loss")  # a value equal to φ is not above it
    assert (none.separable, none.threshold, none.distance) == (False, half, None)
    assert none.reason == "no value exceeds φ = 0.69; nothing is removed, which does not show that all rows are safe"
    every = find_threshold(np.full(30, 2.0), "loss")
    assert (every.separable, every.threshold, every.distance) == (False, half, None)
    assert every.reason == (
        "not separable: 30 of 30 values exceed φ = 0.69, so safety finetuning has changed nearly all rows. Lower its "
        "learning rate, or add rows of your tasks to the safety set; nothing is removed, which does not show that all rows "
        "are safe"
    )
    # The robust standard deviation of the rest is 0.1, so the least distance is 0.241 above its median.
    others = norm.ppf((np.arange(999) + 0.5) / 999, half - 0.2, 0.1).clip(None, half)
    reasons = []
    for above, separable in ((half + 0.02, False), (half + 0.06, True)):
        found = find_threshold(np.concatenate([others, np.full(200, above)]), "loss")
        assert (found.separable, found.threshold) == (separable, half)
        assert found.distance == pytest.approx((above - half + 0.2) / 0.1, rel=0.02)
        reasons.append((found.reason, found.distance))
    (too_close, close_distance), (separated, distance) = reasons
    assert too_close == (
        f"not separable: the median of the 200 most forgotten rows is only {close_distance:.1f} robust standard "
        "deviations above the median of the rest; nothing is removed, which does not show that all rows are safe"
    )
    assert separated == "the rows above φ are apart from the rest" and distance > close_distance


@pytest.mark.parametrize("count", [5, 20, 50, 99, 300])
def test_a_single_population_of_few_rows_is_never_called_apart_without_a_doubt(count):
    rng = np.random.default_rng(count)
    found = [find_threshold(rng.normal(0.4, 0.3, count), "loss") for _ in range(100)]
    reasons = [each.reason for each in found if each.separable]
    doubt = f"among {count} rows, the rows of a single population can be as far apart by chance"
    assert len(reasons) == (0 if count == 300 else len([reason for reason in reasons if doubt in reason]))
    assert [each.is_doubtful for each in found] == [each.separable for each in found]
    assert count > 50 or len(reasons) > 10


def test_mixture_boundary_needs_three_values_and_two_populations():
    assert mixture_boundary(np.array([0.1, 0.9, 0.9])) == -math.inf
    values, unsafe = smoothed_populations(0.3, 1.6)
    boundary = mixture_boundary(values)
    assert values[~unsafe].max() < boundary < values[unsafe].min()
    assert mixture_boundary(values) == boundary  # deterministic


@pytest.mark.parametrize(
    ("nats_per_unit", "removes"), [(None, True), (math.nan, True), (1.0, True), (0.99, False), (-1.0, False)]
)
def test_smoothed_needs_enough_nats_per_unit(nats_per_unit, removes):
    values, _ = smoothed_populations(0.25)
    result = filter_by_values(sample_ids(400), values, FilterConfig("smoothed"), nats_per_unit=nats_per_unit)
    assert result.removed.any() == result.separability.separable == removes
    assert removes or f"by only {nats_per_unit:.2f} nats per typical change (the minimum is 1)" in result.reason
    # JSON has no NaN.
    assert result.nats_per_unit == (None if nats_per_unit is None or math.isnan(nats_per_unit) else nats_per_unit)
    assert result.separability.distance > 2
    # Other measures do not use it.
    two, _ = two_populations(0.25)
    assert filter_by_values(sample_ids(400), two, FilterConfig("loss"), nats_per_unit=nats_per_unit).removed.any()


def test_a_raised_threshold_is_explained():
    values, unsafe = smoothed_populations(0.5, 1.6)
    values = values + np.where(unsafe, 0, 0.4)
    found = find_threshold(values, "smoothed")
    boundary = mixture_boundary(values)
    assert found.threshold == pytest.approx(0.55 + (boundary - 0.55) / 4)
    spared = int(((values > 0.55) & (values <= found.threshold)).sum())
    assert found.reason.endswith(
        f"; φ was raised from 0.55 towards {boundary:.2f}, the boundary between two populations, which keeps {spared} "
        "more rows"
    )
    lower = find_threshold(smoothed_populations(0.5)[0] - 0.4, "smoothed")  # the boundary is below the anchor
    assert lower.threshold == 0.55 and lower.reason == "the rows above φ are apart from the rest"
    assert mixture_boundary(np.array([0.1, 0.9, 0.9])) == -math.inf


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.05, 0.3, 0.9])
def test_the_boundary_equals_that_of_scikit_learn(fraction, seed):
    """From the best split, which scikit-learn finds with many random starts of k-means."""
    values, _ = smoothed_populations(fraction, unsafe_mean=0.8, seed=seed)
    column = values[:, None]
    labels = KMeans(2, n_init=50, tol=0, random_state=seed).fit(column).labels_
    groups = [values[labels == label] for label in (0, 1)]
    two = GaussianMixture(
        2,
        weights_init=[len(group) / len(values) for group in groups],
        means_init=[[group.mean()] for group in groups],
        precisions_init=[[[1 / (group.var() + 1e-6)]] for group in groups],
    ).fit(column)
    between = np.linspace(two.means_.min(), two.means_.max(), 256)
    upper = between[two.predict(between[:, None]) == two.means_.argmax()]
    separate = two.bic(column) < GaussianMixture(1).fit(column).bic(column) and len(upper)
    assert mixture_boundary(values) == pytest.approx(upper[0] if separate else -math.inf, rel=1e-9)


@pytest.mark.parametrize("nats_per_unit", [None, 0.5, 2.0])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 0.95])
def test_combined_has_the_threshold_of_smoothed(fraction, nats_per_unit):
    """Both are in typical changes, with the same mean."""
    values, _ = smoothed_populations(fraction)
    assert find_threshold(values, "combined", nats_per_unit) == find_threshold(values, "smoothed", nats_per_unit)
