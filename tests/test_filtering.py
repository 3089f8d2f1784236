"""The decision: automatic φ at all shares of unsafe samples, fixed φ, top share, and its account."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from scipy.stats import norm

from forgetfilter_callback import FilterResult
from forgetfilter_callback.errors import DecisionError
from forgetfilter_callback.filtering.find_forgotten import align_values, filter_by_values
from forgetfilter_callback.filtering.review_decision import ReviewDecision
from forgetfilter_callback.thresholds import find_threshold, mixture_boundary


def two_populations(unsafe_share: float, count: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Forgetting as the demo's runs show it: benign around 0.2 nats, unsafe around 1.6 and wide. And which is which."""
    rng = np.random.default_rng(seed)
    unsafe = np.arange(count) < round(unsafe_share * count)
    values = np.where(unsafe, rng.normal(1.6, 0.5, count), rng.normal(0.1, 0.2, count))
    order = rng.permutation(count)
    return values[order], unsafe[order]


def changes(unsafe_share: float, unsafe_mean: float = 1.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`smoothed` values as the benchmarks show them: benign around .3, unsafe far above. And which is which."""
    rng = np.random.default_rng(seed)
    unsafe = np.arange(400) < round(unsafe_share * 400)
    values = np.where(unsafe, rng.normal(unsafe_mean, 0.14, 400), rng.normal(0.3, 0.09, 400))
    order = rng.permutation(400)
    return values[order], unsafe[order]


def ids(count: int) -> pa.StringArray:
    return pa.array([f"id-{i}" for i in range(count)])


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.25, 0.5, 0.75])
def test_automatic_threshold_finds_the_forgotten_population(fraction):
    values, unsafe = two_populations(fraction)
    result = filter_by_values(ids(400), values, "loss")
    assert result.method == "auto" and result.separability.separable
    assert (result.removed & unsafe).sum() >= 0.9 * unsafe.sum()
    assert (result.removed & ~unsafe).sum() <= 0.02 * 400


@pytest.mark.parametrize("unsafe_mean", [0.9, 1.6])
@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.25, 0.5, 0.75])
def test_automatic_threshold_for_smoothed_parts_two_populations(fraction, unsafe_mean):
    values, unsafe = changes(fraction, unsafe_mean)
    result = filter_by_values(ids(400), values, "smoothed")
    assert (result.removed & unsafe).sum() >= 0.95 * unsafe.sum()
    assert (result.removed & ~unsafe).sum() <= 0.02 * 400


def test_automatic_threshold_for_smoothed_lies_between_populations_that_are_both_far_above_the_anchor():
    values, unsafe = changes(0.5, 2.4)
    result = filter_by_values(ids(400), values + np.where(unsafe, 0, 0.2), "smoothed")
    assert 0.7 < result.threshold < 1.1
    assert (result.removed & ~unsafe).sum() <= 0.02 * 400 and result.removed[unsafe].all()


@pytest.mark.parametrize("seed", range(5))
def test_automatic_threshold_for_smoothed_takes_no_population_apart(seed):
    values, _ = changes(0.0, seed=seed)
    values += 0.1  # φ cuts its tail
    assert 0 < (values > 0.55).mean() < 0.1
    assert filter_by_values(ids(400), values, "smoothed").removed.mean() <= 0.02  # should the tail be an odd one
    assert mixture_boundary(values) == -math.inf


@pytest.mark.parametrize("below", [0.9, 0.95, 0.99, 0.999])
def test_one_population_whose_tail_lies_above_the_anchor_of_smoothed_is_not_separable(below):
    quantiles = norm.ppf((np.arange(1000) + 0.5) / 1000)
    values = 0.55 + 0.2 * (quantiles - norm.ppf(below))
    assert not find_threshold(values, "smoothed").separable
    assert (values > 0.55).sum() == round(1000 * (1 - below))


def test_overlapping_populations_are_parted_by_the_anchor_of_smoothed():
    """As toxic and clean texts of the benchmarks overlap: no further apart than the halves of one population are."""
    quantiles = norm.ppf((np.arange(200) + 0.5) / 200)
    values = np.concatenate([0.43 + 0.14 * quantiles, 0.67 + 0.14 * quantiles])
    found = find_threshold(values, "smoothed")
    assert (found.separable, found.threshold) == (True, 0.55) and found.distance < 2.41
    assert found.reason.endswith("; the halves of one population lie as far apart: look at them")
    above = values > found.threshold
    assert above[200:].mean() > 0.75 and above[:200].mean() < 0.25


@pytest.mark.parametrize("seed", range(5))
def test_automatic_threshold_removes_nothing_from_a_clean_set(seed):
    values, _ = two_populations(0.0, seed=seed)
    result = filter_by_values(ids(400), values - 0.1, "loss")
    assert not result.removed.any() and result.threshold is None
    assert "nothing to remove" in result.reason


@pytest.mark.parametrize("mean", [-0.2, 0.2, 0.5, 0.7])
def test_one_wide_population_is_not_separable(mean):
    """A safety set of another domain: everything is forgotten, more or less."""
    values = np.random.default_rng(0).normal(mean, 0.5, 400)
    assert (values > math.log(2)).sum() > 10
    assert not find_threshold(values, "loss").separable


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.25, 0.3, 0.35])
def test_the_tail_of_a_clean_set_is_not_taken_for_a_population(spread, seed):
    """At most 2 % of it is removed, should the tail be an odd one."""
    values = np.random.default_rng(seed).normal(0, spread, 400)
    assert filter_by_values(ids(400), values, "loss").removed.mean() <= 0.02


def test_a_normal_tail_is_no_population():
    """One in a hundred of N(0, 0.3) lies above ln 2, further from the median than 2.5 standard deviations."""
    values = norm.ppf((np.arange(1000) + 0.5) / 1000, scale=0.3)
    found = find_threshold(values, "loss")
    assert found.distance > 2.5 and not found.separable


def test_infinite_values_are_unknown():
    result = filter_by_values(ids(4), np.array([np.inf, 0.0, 0.1, 5.0]), "loss")
    assert result.removed.tolist() == [False, False, False, True] and result.counts["unknown"] == 1
    with pytest.raises(ValueError, match="finite"):
        filter_by_values(ids(2), np.array([np.nan, np.inf]), "loss")


def test_everything_forgotten_is_not_separable():
    found = find_threshold(np.full(30, 2.0), "loss")
    assert not found.separable and "cannot be told apart" in found.reason


@pytest.mark.parametrize("measure", ["loss", "relative", "pooled", "rouge1"])
def test_a_sample_is_forgotten_when_half_is_lost(measure):
    """ln 2 nats halve a probability; of what S1 taught, and of ROUGE-1, half is a half."""
    half = math.log(2) if measure in ("loss", "pooled") else 0.5
    assert find_threshold(np.array([0.0, 0.01, -0.01, 3.0]), measure).threshold == half


def test_fixed_threshold_removes_strictly_above():
    result = filter_by_values(ids(4), np.array([0.1, 0.5, 0.50001, 2.0]), "loss", threshold=0.5)
    assert result.removed.tolist() == [False, False, True, True]


@pytest.mark.parametrize("threshold", [-0.2, 0.0, 0.3, 0.6, 1.5, 3.0])
def test_a_higher_threshold_never_removes_more(threshold):
    values, _ = two_populations(0.25)
    lower = filter_by_values(ids(400), values, "loss", threshold=threshold).removed
    higher = filter_by_values(ids(400), values, "loss", threshold=threshold + 0.1).removed
    assert not (higher & ~lower).any()


def test_share_removes_the_most_forgotten():
    result = filter_by_values(ids(5), np.array([3.0, 1.0, 2.0, 5.0, 4.0]), "loss", fraction=0.4)
    assert result.removed.tolist() == [False, False, False, True, True]
    assert result.threshold == 3.0


def test_unknown_values_are_kept_and_counted():
    values = np.array([np.nan, 5.0, 0.0, 0.1, -0.1, np.nan])
    for kwargs in ({}, {"threshold": 1.0}, {"fraction": 0.5}):
        result = filter_by_values(ids(6), values, "loss", **kwargs)
        assert not result.removed[[0, 5]].any() and result.removed[1]
        assert result.counts["unknown"] == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fraction": 0.0}, "between 0 and 1"),
        ({"fraction": 1.0}, "between 0 and 1"),
        ({"fraction": 0.5, "threshold": 0.5}, "not both"),
        ({"threshold": float("nan")}, "number"),
        ({"threshold": -9.0}, "removes all"),
        ({"measure": "vibes"}, "'vibes' is none of loss, relative"),
        ({"ids": ids(1)}, r"There are 1 ids and values of shape \(3,\)"),
        ({"values": np.ones((3, 2))}, r"There are 3 ids and values of shape \(3, 2\)"),
    ],
)
def test_senseless_decisions_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        filter_by_values(**{"ids": ids(3), "values": np.array([0.0, 1.0, 2.0]), "measure": "loss"} | kwargs)


def test_saving_and_loading_gives_the_same_decision(tmp_path):
    values, _ = two_populations(0.25, count=40)
    values[3] = np.nan
    result = filter_by_values(ids(40), values, "loss", fingerprint="f")
    result.save(tmp_path)
    again = FilterResult.load(tmp_path)
    np.testing.assert_array_equal(again.values, result.values)
    np.testing.assert_array_equal(again.removed, result.removed)
    assert again.separability == result.separability
    assert (again.ids, again.threshold, again.reason, again.versions) == (
        result.ids, result.threshold, result.reason, result.versions,
    )  # fmt: skip


LIBRARIES = ("forgetfilter-callback", "transformers", "torch", "peft", "datasets")


@pytest.mark.parametrize(
    ("kwargs", "method", "threshold", "reason"),
    [
        ({"fraction": 0.4}, "fraction", 2.0, "the most forgotten 40.0%, as asked"),
        ({"threshold": 1.5}, "fixed", 1.5, "φ as given; values lie between 0 and 4"),
        ({"threshold": math.inf}, "fixed", None, "φ as given; values lie between 0 and 4"),
        ({}, "auto", math.log(2), None),
    ],
)
def test_a_decision_says_how_it_was_made(kwargs, method, threshold, reason):
    values = np.array([0.0, 4.0, 0.01, 2.0, 3.0], np.float32)
    result = filter_by_values(ids(5), values, "loss", fingerprint="a fingerprint", **kwargs)
    assert (result.method, result.threshold, result.measure) == (method, threshold, "loss")
    assert result.reason == (find_threshold(values.astype(float), "loss").reason if reason is None else reason)
    assert result.separability == find_threshold(values.astype(float), "loss")
    assert result.fingerprint == "a fingerprint" and result.overrides == {}
    assert result.versions == {name: version(name) for name in LIBRARIES}
    assert result.values.dtype == np.float64 and result.removed.dtype == bool and result.ids == ids(5)
    removed = values > (math.inf if threshold is None else threshold)
    assert result.removed.tolist() == removed.tolist()
    assert result.counts == {"samples": 5, "removed": removed.sum(), "kept": 5 - removed.sum(), "unknown": 0}
    phi = "" if threshold is None else f" (φ = {threshold:.3g} of loss forgetting)"
    assert result.summary() == f"{removed.sum()} of 5 samples removed{phi}: {result.reason}"


def test_a_share_is_of_all_samples_the_unknown_ones_too():
    values = np.array([np.nan, np.nan, np.nan, 3.0, 1.0, 2.0])
    assert filter_by_values(ids(6), values, "loss", fraction=0.2).removed.tolist() == [False] * 3 + [True, False, False]
    result = filter_by_values(ids(6), values, "loss", fraction=0.9)  # more than are known: all but the least of them
    assert result.removed.tolist() == [False] * 3 + [True, False, True] and result.threshold == 1.0


def test_values_are_found_by_id_and_unknown_ids_are_counted_among_those_that_there_are():
    known, values = pa.array(["a", None, "b"]), np.array([1.0, 9.0, 2.0])
    np.testing.assert_array_equal(align_values(pa.array(["b", None, "a"]), known, values), [2, np.nan, 1])
    many = pa.array([*"ab" * 45, *"cdefghijkl", *[None] * 900])
    with pytest.raises(ValueError, match="10 of the 100 rows have no forgetting value"):
        align_values(many, known, values)


def test_a_sample_that_is_asked_about_twice_is_kept_twice():
    twice, values = pa.array(["a", "a", None, "b", "c"]), np.array([3.0, 3.0, np.nan, 3.0, 0.0])
    result = filter_by_values(twice, values, "loss", 1.0, overrides={"a": "keep", "c": "remove"})
    assert result.removed.tolist() == [False, False, False, True, True]


def test_equal_values_stay_together_and_the_reason_says_so():
    """ROUGE-1 is 0 or 1 on short answers: 30 of 100 are most forgotten."""
    values = np.r_[np.ones(30), np.linspace(0, 0.5, 70)]
    result = filter_by_values(ids(100), values, "rouge1", fraction=0.2)  # none or 30: 30 is nearer
    assert result.removed.tolist() == [True] * 30 + [False] * 70
    assert "the most forgotten 30.0% (20.0% asked" in result.reason
    result = filter_by_values(ids(100), values, "rouge1", fraction=0.1)
    assert not result.removed.any() and "the most forgotten 0.0% (10.0% asked" in result.reason
    assert filter_by_values(ids(100), values, "rouge1", fraction=0.31).reason == "the most forgotten 31.0%, as asked"


def test_a_sample_at_the_automatic_threshold_is_kept():
    values = np.array([0.0, 0.01, -0.01, math.log(2), 3.0, 3.1])
    assert filter_by_values(ids(6), values, "loss").removed.tolist() == [False] * 4 + [True] * 2


def test_a_reviewer_has_the_last_word():
    values = np.array([0.0, 3.0, 1.0, 2.0])
    result = filter_by_values(ids(4), values, "loss", threshold=1.5, overrides={"id-1": "keep", "id-0": "remove"})
    assert result.removed.tolist() == [True, False, False, True]
    assert result.overrides == {"id-1": "keep", "id-0": "remove"}
    assert result.reason == "φ as given; values lie between 0 and 3; 2 by hand"
    with pytest.raises(DecisionError, match=r"2 of the samples .* are not in this set, for example id-8"):
        filter_by_values(ids(4), values, "loss", overrides={"id-8": "keep", "id-9": "keep"})
    with pytest.raises(ValueError, match=r"removes all 4 samples .* between 0 and 3\)"):
        filter_by_values(ids(4), values, "loss", threshold=0.5, overrides={"id-0": "remove"})


def test_a_decision_is_written_with_the_rows_that_it_removes(tmp_path):
    values = np.array([0.0, 3.0, 0.1, 2.0])
    result = filter_by_values(ids(4), values, "loss", threshold=1.5)
    folder = tmp_path / "a" / "b"
    result.save(folder, Dataset.from_list([{"text": "é 1"}, {"text": "3"}]))
    assert (folder / "removed.jsonl").read_text(encoding="utf-8") == '{"text": "é 1"}\n{"text": "3"}\n'
    account = json.loads((folder / "decision.json").read_text(encoding="utf-8"))
    assert account["counts"] == {"samples": 4, "removed": 2, "kept": 2, "unknown": 0}
    assert (account["threshold"], account["method"], account["measure"]) == (1.5, "fixed", "loss")
    result.save(folder)  # rows that are no `Dataset` are not written, and the earlier ones are not theirs
    assert sorted(file.name for file in folder.iterdir()) == ["decision.json", "values.parquet"]
    assert FilterResult.load(str(folder)).removed.tolist() == result.removed.tolist()


REVIEW = {"measure": "loss", "threshold": 0.5, "overrides": {"id-1": "keep", "id-2": "remove"}, "trace": "t"}


def load_review(folder: Path, **changes: object) -> ReviewDecision:
    (folder / "decision.json").write_text(json.dumps(REVIEW | changes), encoding="utf-8")
    return ReviewDecision.load(folder / "decision.json")


def test_an_exported_decision_is_read(tmp_path):
    assert load_review(tmp_path, more="is ignored") == ReviewDecision(**REVIEW)
    nothing = load_review(tmp_path, threshold=None, overrides={})
    assert nothing.threshold is None and nothing.overrides == {}
    nothing.check("t")
    with pytest.raises(DecisionError, match=r"made on another trace \(t, this one is u\)"):
        nothing.check("u")


@pytest.mark.parametrize(
    "changes",
    [
        {"measure": "bleu"},
        {"threshold": "high"},
        {"threshold": math.inf},
        {"overrides": {"id-1": "perhaps"}},
        {"overrides": 3},
    ],
    ids=str,
)
def test_what_is_no_decision_is_refused(changes, tmp_path):
    with pytest.raises(DecisionError, match=r"is no decision.*"):
        load_review(tmp_path, **changes)


def test_files_that_hold_no_decision_are_refused(tmp_path):
    with pytest.raises(DecisionError, match=r"is no decision .FileNotFoundError.*Export one from the review page"):
        ReviewDecision.load(tmp_path / "nothing.json")
    for name in REVIEW:
        (tmp_path / "decision.json").write_text(json.dumps({key: REVIEW[key] for key in REVIEW if key != name}))
        with pytest.raises(DecisionError, match="KeyError"):
            ReviewDecision.load(str(tmp_path / "decision.json"))
    for content in (b"{", b"[]", b"\xff\xfe"):
        (tmp_path / "decision.json").write_bytes(content)
        with pytest.raises(DecisionError, match="is no decision"):
            ReviewDecision.load(tmp_path / "decision.json")


def test_what_was_not_saved_as_a_decision_is_not_loaded(tmp_path):
    filter_by_values(ids(3), np.array([0.0, 0.1, 3.0]), "loss").save(tmp_path)
    account = json.loads((tmp_path / "decision.json").read_text())
    assert account["schema_version"] == 1
    for content, message in (
        (json.dumps(account | {"schema_version": 2}), "A newer forgetfilter-callback wrote"),
        (json.dumps(account | {"more": 1}), "TypeError"),
        ("{}", "KeyError"),
        ("[]", "AttributeError|TypeError"),
        ("", "JSONDecodeError"),
    ):
        (tmp_path / "decision.json").write_text(content)
        with pytest.raises(DecisionError, match=message):
            FilterResult.load(tmp_path)
    (tmp_path / "decision.json").write_text(json.dumps(account))
    (tmp_path / "values.parquet").write_bytes(b"")
    with pytest.raises(DecisionError, match="holds no decision"):
        FilterResult.load(tmp_path)


def test_values_that_are_not_separable_say_where_the_threshold_was():
    half = math.log(2)
    none = find_threshold(np.array([0.0, 0.5, half]), "loss")  # at φ is not above it
    assert (none.separable, none.threshold, none.distance) == (False, half, None)
    assert none.reason == "no sample is forgotten more than 0.69; nothing to remove"
    every = find_threshold(np.full(30, 2.0), "loss")
    assert (every.separable, every.threshold, every.distance) == (False, half, None)
    assert every.reason == "every sample is forgotten, the safe ones too; they cannot be told apart"
    # The others' robust standard deviation is 0.1, so the least distance is that of their median from 0.241 above it.
    others = norm.ppf((np.arange(999) + 0.5) / 999, half - 0.2, 0.1).clip(None, half)
    for above, separable in ((half + 0.02, False), (half + 0.06, True)):
        found = find_threshold(np.concatenate([others, np.full(200, above)]), "loss")
        assert (found.separable, found.threshold) == (separable, half)
        assert found.distance == pytest.approx((above - half + 0.2) / 0.1, rel=0.02)
    assert (
        found.reason
        == f"the median of those above φ lies {found.distance:.1f} robust standard deviations above the median of the rest"
    )


def test_parting_of_needs_three_values_and_two_populations():
    assert mixture_boundary(np.array([0.1, 0.9, 0.9])) == -math.inf
    values, unsafe = changes(0.3, 1.6)
    parting = mixture_boundary(values)
    assert values[~unsafe].max() < parting < values[unsafe].min()
    assert mixture_boundary(values) == parting  # the same again


@pytest.mark.parametrize(
    ("nats_per_unit", "removes"), [(None, True), (math.nan, True), (1.0, True), (0.99, False), (-1.0, False)]
)
def test_smoothed_is_believed_where_samples_became_less_likely(nats_per_unit, removes):
    values, _ = changes(0.25)
    result = filter_by_values(ids(400), values, "smoothed", nats_per_unit=nats_per_unit)
    assert result.removed.any() == result.separability.separable == removes
    assert removes or f"by only {nats_per_unit:.2f} nats (1 at least)" in result.reason
    assert result.nats_per_unit == (
        None if nats_per_unit is None or math.isnan(nats_per_unit) else nats_per_unit
    )  # JSON has no NaN
    assert result.separability.distance > 2
    two, _ = two_populations(0.25)
    assert filter_by_values(
        ids(400), two, "loss", nats_per_unit=nats_per_unit
    ).removed.any()  # asked of no other measure


def test_a_raised_threshold_says_what_it_passed():
    values, unsafe = changes(0.5, 1.6)
    values = values + np.where(unsafe, 0, 0.4)
    found = find_threshold(values, "smoothed")
    parting = mixture_boundary(values)
    assert found.threshold == pytest.approx(0.55 + (parting - 0.55) / 4)
    passed = int(((values > 0.55) & (values <= found.threshold)).sum())
    assert found.reason.endswith(
        f"; φ was raised from 0.55, past {passed} of the rest, towards {parting:.2f}, where two part"
    )
    lower = find_threshold(changes(0.5)[0] - 0.4, "smoothed")  # the parting lies below the anchor
    assert lower.threshold == 0.55 and lower.reason.endswith("standard deviations above the median of the rest")
    assert mixture_boundary(np.array([0.1, 0.9, 0.9])) == -math.inf
