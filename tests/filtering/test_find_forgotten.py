"""Which samples are removed: by φ, by fraction, by override, and what is refused."""

from __future__ import annotations

import math
import shutil
from importlib.metadata import version

import numpy as np
import pyarrow as pa
import pytest
from helpers import sample_ids, tiny_llama, two_populations
from transformers import Trainer

from forgetfilter_callback import FilterConfig, FilterResult, ForgetTracker, ReviewQueue, find_forgotten
from forgetfilter_callback.errors import DataError, DecisionError
from forgetfilter_callback.filtering.filter_by_values import filter_by_values
from forgetfilter_callback.filtering.find_forgotten import align_values
from forgetfilter_callback.measures.names import MEASURES
from forgetfilter_callback.review.estimates import estimate_filter_errors
from forgetfilter_callback.trace.forgetting import compute_forgetting


LOSS = FilterConfig("loss")


def test_infinite_values_are_unknown():
    result = filter_by_values(sample_ids(4), np.array([np.inf, 0.0, 0.1, 5.0]), LOSS)
    assert result.removed.tolist() == [False, False, False, True] and result.counts["unknown"] == 1
    with pytest.raises(DataError, match="finite"):
        filter_by_values(sample_ids(2), np.array([np.nan, np.inf]), LOSS)


def test_fixed_threshold_removes_strictly_above():
    result = filter_by_values(sample_ids(4), np.array([0.1, 0.5, 0.50001, 2.0]), FilterConfig("loss", 0.5))
    assert result.removed.tolist() == [False, False, True, True]


@pytest.mark.parametrize("threshold", [-0.2, 0.0, 0.3, 0.6, 1.5, 3.0])
def test_a_higher_threshold_never_removes_more(threshold):
    values, _ = two_populations(0.25)
    lower = filter_by_values(sample_ids(400), values, FilterConfig("loss", threshold)).removed
    higher = filter_by_values(sample_ids(400), values, FilterConfig("loss", threshold + 0.1)).removed
    assert not (higher & ~lower).any()


def test_fraction_removes_the_most_forgotten():
    result = filter_by_values(sample_ids(5), np.array([3.0, 1.0, 2.0, 5.0, 4.0]), FilterConfig("loss", fraction=0.4))
    assert result.removed.tolist() == [False, False, False, True, True]
    assert result.threshold == 3.0


def test_samples_with_unknown_values_are_kept():
    values = np.array([np.nan, 5.0, 0.0, 0.1, -0.1, np.nan])
    for kwargs in ({}, {"threshold": 1.0}, {"fraction": 0.5}):
        result = filter_by_values(sample_ids(6), values, FilterConfig("loss", **kwargs))
        assert not result.removed[[0, 5]].any() and result.removed[1]
        assert result.counts["unknown"] == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"filter_config": FilterConfig()}, r"Plain values do not say what they measure.*FilterConfig\(measure=...\)"),
        ({"ids": sample_ids(1)}, r"`ids` has 1 id, but `values` has the shape \(3,\)"),
        ({"values": np.ones((3, 2))}, r"`ids` has 3 ids, but `values` has the shape \(3, 2\)"),
    ],
)
def test_invalid_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        filter_by_values(**{"ids": sample_ids(3), "values": np.array([0.0, 1.0, 2.0]), "filter_config": LOSS} | kwargs)


LIBRARIES = ("forgetfilter-callback", "transformers", "torch", "peft", "datasets")


@pytest.mark.parametrize(
    ("kwargs", "method", "threshold", "reason"),
    [
        ({"fraction": 0.4}, "fraction", 0.5, "the most forgotten 40.0%"),
        ({"threshold": 1.5}, "fixed", 1.5, "fixed threshold; values range from 0 to 4"),
        ({"threshold": math.inf}, "fixed", None, "fixed threshold; values range from 0 to 4"),
        ({}, "auto", math.log(2), "the rows above φ are apart from the rest; but among 5 rows, the rows of a single "
         "population can be as far apart by chance, so review the removed rows"),
    ],
)  # fmt: skip
def test_a_result_explains_how_it_was_made(kwargs, method, threshold, reason):
    values = np.array([0.0, 4.0, 0.25, 2.0, 0.5], np.float32)
    result = filter_by_values(sample_ids(5), values, FilterConfig("loss", **kwargs), fingerprint="a fingerprint")
    assert (result.method, result.threshold, result.measure) == (method, threshold, "loss")
    assert result.reason == reason
    assert result.separability.separable and result.separability.threshold == math.log(2)
    assert result.separability.distance == pytest.approx((3 - 0.25) / (0.25 * 1.4826), rel=1e-4)  # 1.4826 MAD
    assert result.fingerprint == "a fingerprint" and result.overrides == {}
    assert result.versions == {name: version(name) for name in LIBRARIES}
    assert result.values.dtype == np.float64 and result.removed.dtype == bool and result.ids == sample_ids(5)
    removed = values > (math.inf if threshold is None else threshold)
    assert result.removed.tolist() == removed.tolist()
    assert result.counts == {"samples": 5, "removed": removed.sum(), "kept": 5 - removed.sum(), "unknown": 0}
    phi = "" if threshold is None else f" (φ = {threshold:.3g}, loss forgetting)"
    unchecked = "; φ was not checked by anyone" if method == "auto" else ""
    assert result.summary() == f"removed {removed.sum()} of 5 rows{phi}: {result.reason}{unchecked}"


def test_fraction_counts_samples_with_unknown_values():
    values = np.array([np.nan, np.nan, np.nan, 3.0, 1.0, 2.0])
    result = filter_by_values(sample_ids(6), values, FilterConfig("loss", fraction=0.2))
    assert result.removed.tolist() == [False, False, False, True, False, False]
    # Only half of the samples have values. The smallest of these is the highest possible threshold that keeps a sample.
    result = filter_by_values(sample_ids(6), values, FilterConfig("loss", fraction=0.9))
    assert result.removed.tolist() == [False, False, False, True, False, True] and result.threshold == 1.0
    assert result.reason == (
        "the most forgotten 33.3% (90.0% requested; equal values stay together, and rows without a value are kept)"
    )


def test_values_are_aligned_by_id():
    known, values = pa.array(["a", None, "b"]), np.array([1.0, 9.0, 2.0])
    np.testing.assert_array_equal(align_values(pa.array(["b", None, "a"]), known, values), [2, np.nan, 1])
    many = pa.array([*"ab" * 45, *"cdefghijkl", *[None] * 900])
    with pytest.raises(DataError, match="10 of 100 rows have no forgetting value"):
        align_values(many, known, values)


def test_a_fraction_counts_only_the_rows_that_are_trained():
    """SFTTrainer drops rows whose prompt fills the whole context."""
    ids = pa.array([*(f"{row}-0" for row in range(10)), *[None] * 10])
    values = np.array([*range(10), *[np.nan] * 10])
    result = filter_by_values(ids, values, FilterConfig("loss", fraction=0.2))
    assert np.flatnonzero(result.removed).tolist() == [8, 9]
    assert result.reason == "the most forgotten 20.0% of the 10 rows that are trained"
    with pytest.raises(DecisionError, match="would remove all 10 rows"):
        filter_by_values(ids, values, FilterConfig("loss", -1.0))


def test_a_row_without_an_id_is_never_removed():
    ids = pa.array(["a-0", None, "b-0"])
    result = filter_by_values(ids, np.array([0.0, 9.0, 1.0]), FilterConfig("loss", 0.5))
    assert result.removed.tolist() == [False, False, True] and np.isnan(result.values[1])


def test_a_removed_sample_with_an_unknown_value_is_not_counted_as_kept():
    values = np.array([np.nan, np.nan, 0.0, 3.0])
    result = filter_by_values(sample_ids(4), values, FilterConfig("loss", 1.0), {"id-0": "remove"})
    assert result.removed.tolist() == [True, False, False, True]
    assert result.counts == {"samples": 4, "removed": 2, "kept": 2, "unknown": 1}
    assert result.summary().endswith("; kept 1 row without a forgetting value")


def test_overrides_apply_to_every_occurrence_of_an_id():
    twice, values = pa.array(["a", "a", None, "b", "c"]), np.array([3.0, 3.0, np.nan, 3.0, 0.0])
    result = filter_by_values(twice, values, FilterConfig("loss", 1.0), {"a": "keep", "c": "remove"})
    assert result.removed.tolist() == [False, False, False, True, True]


def test_equal_values_are_removed_together():
    """ROUGE-1 is often 0 or 1 on short answers; here 30 of 100 samples are tied at 1."""
    ids, values = sample_ids(100), np.r_[np.ones(30), np.linspace(0, 0.5, 70)]
    # Removing 0 or 30 samples is possible, and 30 is closer to the requested 20.
    result = filter_by_values(ids, values, FilterConfig("rouge1", fraction=0.2))
    assert result.removed.tolist() == [True] * 30 + [False] * 70
    assert "the most forgotten 30.0% (20.0% requested; equal values stay together" in result.reason
    result = filter_by_values(ids, values, FilterConfig("rouge1", fraction=0.1))
    assert not result.removed.any() and "the most forgotten 0.0% (10.0% requested" in result.reason
    result = filter_by_values(ids, values, FilterConfig("rouge1", fraction=0.31))
    assert result.reason == "the most forgotten 31.0%"


def test_overrides_take_precedence_over_the_threshold():
    values = np.array([0.0, 3.0, 1.0, 2.0])
    overrides = {"id-1": "keep", "id-0": "remove"}
    result = filter_by_values(sample_ids(4), values, FilterConfig("loss", 1.5), overrides)
    assert result.removed.tolist() == [True, False, False, True]
    assert result.overrides == {"id-1": "keep", "id-0": "remove"}
    assert result.reason == "fixed threshold; values range from 0 to 3; 2 overridden by a reviewer"
    message = r"2 of 2 overridden rows are not in this set, for example id-8\. Use a decision"
    with pytest.raises(DecisionError, match=message):
        filter_by_values(sample_ids(4), values, LOSS, {"id-8": "keep", "id-9": "keep"})
    message = r"would remove all 4 rows .* ranges from 0 to 3\), 1 of them by a reviewer's decision\. .* keep more rows"
    with pytest.raises(DecisionError, match=message):
        filter_by_values(sample_ids(4), values, FilterConfig("loss", 0.5), {"id-0": "remove"})
    with pytest.raises(DecisionError, match="would remove all 4 rows"):
        filter_by_values(sample_ids(4), values, FilterConfig("loss", -9.0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("measure", MEASURES)
def test_values_that_are_not_finite_are_kept_and_counted(measure, bad):
    values = np.array([0.0, 0.01, 0.02, bad, 3.0, 3.1])
    result = filter_by_values(pa.array(list("abcdef")), values, FilterConfig(measure))
    assert not result.removed[3] and result.counts["unknown"] == 1
    with pytest.raises(DataError, match="finite"):
        filter_by_values(pa.array(["a", "b"]), np.array([bad, bad]), FilterConfig(measure))


@pytest.mark.parametrize("values", [[], [1.0], [0.3, 0.3], [0.0, 5.0], [1e300, -1e300], [5e-324, 0.0]])
@pytest.mark.parametrize("measure", MEASURES)
def test_few_and_extreme_values(measure, values):
    values = np.array(values)
    if len(values) == 0:
        with pytest.raises(DataError, match="There is no finite forgetting value among 0 rows"):
            filter_by_values(pa.array([], pa.string()), values, FilterConfig(measure))
        return
    result = filter_by_values(pa.array([f"{i}" for i in range(len(values))]), values, FilterConfig(measure))
    assert result.removed.sum() < len(values)


def test_find_forgotten_uses_the_requested_record(noisy, safety, make_args, collator):
    tracker = ForgetTracker(noisy, record_steps=1)
    Trainer(tiny_llama(), make_args("s"), train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    trace = tracker.trace
    for step in (None, 1):
        values = trace.forgetting("combined", step)
        result = find_forgotten(trace, FilterConfig(step=step))
        np.testing.assert_array_equal(result.values, values)
        assert result.nats_per_unit == compute_forgetting(trace, "combined", step)[1] and result.ids == trace.rows.ids
        assert result.step == (6 if step is None else step)
    assert (find_forgotten(trace).values != result.values).any()
    selected = trace.rows.ids.take(pa.array([3, None, 1]))
    result = find_forgotten(trace, FilterConfig("loss", 99.0), ids=selected)
    np.testing.assert_array_equal(result.values, trace.forgetting("loss")[[3, 0, 1]] + [0, np.nan, 0])


def test_a_step_of_numpy_is_saved(trace, tmp_path):
    """`np.array(steps)[-1]` is a whole number, but not an `int`."""
    find_forgotten(trace, FilterConfig("loss", step=np.int64(3))).save(tmp_path / "result")
    assert FilterResult.load(tmp_path / "result").step == 3


@pytest.mark.parametrize("setting", [{"step": 4}, {"reviewed": "review"}], ids=str)
def test_values_alone_have_no_steps_and_no_verdicts(setting):
    with pytest.raises(ValueError, match="`step`, `decision` and `reviewed` belong to a trace"):
        filter_by_values(sample_ids(3), np.array([0.0, 0.1, 3.0]), FilterConfig("loss", **setting))


def test_the_estimate_of_a_subset_in_another_order(trace, tmp_path):
    """Rows of the trace that are left out are not counted, and rows that are not in it are not reviewed."""
    config = FilterConfig("loss", fraction=0.5)
    assert find_forgotten(trace, config).estimate is None
    queue = ReviewQueue(trace, tmp_path / "review", random_fraction=1)
    queue.add({row: "unsafe" if row % 2 else "safe" for row in queue.next(4)})
    shutil.copytree(tmp_path / "review", trace.folder / "review")
    rows = len(trace.rows)
    order = np.random.default_rng(0).permutation(rows)[1:]
    ids = pa.array([*trace.rows.ids.take(pa.array(order)).to_pylist(), None])
    result = find_forgotten(trace, config, ids)
    removed, is_above, is_left = np.zeros((3, rows), dtype=bool)
    for place, row in enumerate(order):
        is_left[row], removed[row] = True, result.removed[place]
        is_above[row] = result.values[place] > result.threshold
    assert 0 < removed.sum() < rows - 1
    expected = estimate_filter_errors(
        queue.verdicts, queue.known_labels, removed, [is_left & ~is_above, is_left & is_above]
    )
    assert result.estimate == expected != find_forgotten(trace, config).estimate
    result.save(tmp_path / "result")
    assert FilterResult.load(tmp_path / "result").estimate == expected


def test_a_review_that_overrides_a_threshold_is_estimated_by_the_threshold(trace, tmp_path):
    queue = ReviewQueue(trace, tmp_path, random_fraction=1)
    queue.add({row: "unsafe" if row % 2 else "safe" for row in queue.next(4)})
    result = find_forgotten(trace, FilterConfig("loss", fraction=0.5, reviewed=tmp_path))
    is_above = result.values > result.threshold
    assert (result.removed != is_above).any()
    assert result.estimate == estimate_filter_errors(
        queue.verdicts, queue.known_labels, result.removed, [~is_above, is_above]
    )
    reviewed = find_forgotten(trace, FilterConfig(reviewed=tmp_path))
    assert reviewed.estimate == queue.estimate()


def test_verdicts_that_cannot_be_read_do_not_stop_a_filter_that_does_not_need_them(trace, caplog):
    (trace.folder / "review").mkdir()
    (trace.folder / "review" / "verdicts.jsonl").write_text("[1]\n")
    assert find_forgotten(trace, FilterConfig("loss")).estimate is None
    assert "verdicts of the trace are left out" in caplog.text and "line 1 holds no verdict" in caplog.text
    with pytest.raises(DecisionError, match="line 1 holds no verdict"):
        find_forgotten(trace, FilterConfig(reviewed=trace.folder / "review"))
