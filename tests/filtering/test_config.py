"""FilterConfig: valid values, and arguments that exclude each other."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
from helpers import sample_ids, tiny_llama

from forgetfilter_callback import (
    FilterConfig,
    FilteredSFTTrainer,
    FilteredTrainer,
    ForgetFilter,
    RunConfig,
    find_forgotten,
    to_dataset,
)
from forgetfilter_callback.filtering.filter_by_values import filter_by_values
from forgetfilter_callback.measures.names import MEASURES
from forgetfilter_callback.pipeline.outputs import filter_rows
from forgetfilter_callback.reports.review_page import write_review_page


def test_the_defaults():
    config = FilterConfig()
    assert (config.measure, config.threshold, config.fraction) == (None, "auto", None)
    assert (config.step, config.decision) == (None, None)


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_is_accepted(measure):
    assert FilterConfig(measure).measure == measure


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [("0.5", 0.5), (" -1e-3 ", -0.001), (math.inf, math.inf), (2, 2.0), (np.float32(0.25), 0.25), ("auto", "auto")],
)
def test_a_threshold_becomes_a_number(threshold, expected):
    config = FilterConfig("loss", threshold)
    assert config.threshold == expected and type(config.threshold) is type(expected)


def test_a_threshold_given_as_text_filters_like_the_number():
    values = np.array([0.1, 0.5, 0.50001, 2.0])
    result = filter_by_values(sample_ids(4), values, FilterConfig("loss", "0.5"))
    assert result.removed.tolist() == [False, False, True, True]
    assert (result.threshold, result.method) == (0.5, "fixed")


@pytest.mark.parametrize("threshold", [math.nan, "nan", "high", "", "0.5 nats", "inf", None, [0.5], True], ids=repr)
def test_a_threshold_that_is_not_a_number_is_refused(threshold):
    with pytest.raises(ValueError, match=r"^threshold=.* must be a number, 'auto' or 'fdr'\.$"):
        FilterConfig("loss", threshold)


@pytest.mark.parametrize("measure", ["vibes", "Loss", ""])
def test_an_unknown_measure_is_refused(measure):
    message = f"measure='{measure}' is unknown. Choose one of combined, loss, relative, pooled, smoothed, rouge1"
    with pytest.raises(ValueError, match=message):
        FilterConfig(measure)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf, "0.5"])
def test_a_fraction_outside_0_and_1_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"fraction={fraction!r} must be between 0 and 1 \(both excluded\)"):
        FilterConfig(fraction=fraction)


@pytest.mark.parametrize("step", [-1, 0.5, "4", True], ids=repr)
def test_a_step_that_is_not_a_whole_number_is_refused(step):
    with pytest.raises(ValueError, match=rf"^step={step!r} must be a whole number of at least 0\.$"):
        FilterConfig(step=step)


def test_weights_that_are_neither_true_nor_false_are_refused():
    """The text "no" would count as true."""
    with pytest.raises(ValueError, match=r"^weights='no' must be True or False\.$"):
        FilterConfig(weights="no", reviewed="review")


@pytest.mark.parametrize("threshold", [0.0, 0.5, "0.5", -math.inf])
def test_threshold_and_fraction_exclude_each_other(threshold):
    with pytest.raises(ValueError, match="`threshold` and `fraction` exclude each other"):
        FilterConfig(threshold=threshold, fraction=0.5)
    with pytest.raises(ValueError, match="`threshold` and `fraction` exclude each other"):
        replace(FilterConfig(fraction=0.5), threshold=threshold)


@pytest.mark.parametrize(
    "others", [{"measure": "smoothed"}, {"threshold": 0.0}, {"fraction": 0.5}, {"step": 0}, {"step": 4}], ids=str
)
def test_a_decision_excludes_the_other_arguments(others):
    with pytest.raises(ValueError, match="`decision` already contains the measure and the threshold"):
        FilterConfig(decision="review_decision.json", **others)


@pytest.mark.parametrize("others", [{"measure": "loss"}, {"measure": "smoothed"}, {"step": 0}, {"step": 4}], ids=str)
def test_the_ranking_of_a_review_excludes_measure_and_step(others):
    """`"fdr"` removes rows by the ranking of the review. The values of a measure decide nothing."""
    with pytest.raises(
        ValueError, match=r"threshold='fdr' uses the ranking of the review.*Leave out `measure` and `step`"
    ):
        FilterConfig(threshold="fdr", reviewed="review", **others)
    assert FilterConfig(reviewed="review", **others).reviewed == "review"


def test_a_level_without_fdr_is_refused():
    for others in ({}, {"reviewed": "review"}, {"threshold": 0.5}):
        with pytest.raises(ValueError, match=r"level=0\.2 has an effect only with threshold='fdr'"):
            FilterConfig(level=0.2, **others)
    assert FilterConfig(threshold="fdr", reviewed="review", level=0.2).level == 0.2


def test_fdr_without_a_review_is_refused():
    with pytest.raises(ValueError, match=r"needs verdicts on rows.*as `reviewed` \(`forgetfilter filter --reviewed`\)"):
        FilterConfig(threshold="fdr")


@pytest.mark.parametrize("file", ["review_decision.json", Path("review_decision.json")], ids=["text", "path"])
def test_a_decision_is_accepted_alone(file):
    """`"auto"` is the default threshold, so it may be written out."""
    assert FilterConfig(decision=file).decision == file
    assert FilterConfig(threshold="auto", decision=file).threshold == "auto"


def test_a_config_cannot_be_changed_without_its_checks():
    config = FilterConfig("loss", 0.5)
    with pytest.raises(FrozenInstanceError):
        config.fraction = 7
    with pytest.raises(ValueError, match="fraction=7 must be between 0 and 1"):
        replace(config, threshold="auto", fraction=7)


def test_only_the_measure_and_the_threshold_are_positional():
    with pytest.raises(TypeError, match="positional arguments"):
        FilterConfig("loss", "auto", 0.5)


def test_a_dictionary_is_no_config(trace, noisy, safety, make_args, byte_tokenizer, tmp_path):
    settings = {"threshold": 0.5}
    rows = trace.rows.as_dataset()
    for name, calls in {
        "filter_config": [
            lambda: find_forgotten(trace, settings),
            lambda: filter_by_values(trace.rows.ids, np.zeros(7), settings),
            lambda: filter_rows(trace, tmp_path / "out", settings, source=str(tmp_path / "noisy.jsonl")),
            lambda: to_dataset(trace, rows, settings),
            lambda: write_review_page(trace, tmp_path / "page.html", byte_tokenizer, settings),
            lambda: ForgetFilter(tiny_llama, noisy, safety, make_args(), filter_config=settings),
            lambda: FilteredTrainer(
                tiny_llama(), make_args(), train_dataset=noisy, forgetting=np.zeros(24), filter_config=settings
            ),
            lambda: FilteredSFTTrainer("model", forgetting=np.zeros(24), filter_config=settings),
        ],
        "filter": [lambda: RunConfig("model", "noisy", "safety", "out", filter=settings)],
    }.items():
        for each in calls:
            with pytest.raises(TypeError, match=f"`{name}` must be a FilterConfig, but it is dict"):
                each()
