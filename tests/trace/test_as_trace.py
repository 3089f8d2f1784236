"""Functions that take a trace also take its folder, and name anything else."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest

from forgetfilter_callback import FilterConfig, ForgetTracker, ReviewQueue, Trace, find_forgotten, to_dataset
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.pipeline.outputs import filter_rows
from forgetfilter_callback.reports.review_page import write_review_page


@pytest.fixture
def functions(rows, byte_tokenizer, tmp_path):
    """Each function of the library that takes a trace, with its other arguments."""
    config = FilterConfig("loss", 99.0)
    dataset = rows.as_dataset()
    dataset.to_json(tmp_path / "noisy.jsonl")
    return [
        lambda trace: find_forgotten(trace, config).values,
        lambda trace: ReviewQueue(trace).ranking,
        lambda trace: to_dataset(trace, dataset, config)["forgetfilter_forgetting"][:],
        lambda trace: (
            filter_rows(trace, tmp_path / "filtered", config, str(tmp_path / "noisy.jsonl"), byte_tokenizer).values
        ),
        lambda trace: write_review_page(trace, tmp_path / "page.html", byte_tokenizer, config).values,
    ]


def test_the_folder_of_a_trace_is_as_good_as_the_trace(trace, functions):
    for function in functions:
        np.testing.assert_array_equal(function(trace.folder), function(trace))
        np.testing.assert_array_equal(function(str(trace.folder)), function(trace))


def test_the_output_folder_of_a_run_is_as_good_as_its_trace(trace, tmp_path):
    shutil.copytree(trace.folder, tmp_path / "out" / "_forgetfilter")
    (tmp_path / "out" / "config.yaml").write_text("")
    assert Trace.open(tmp_path / "out").folder == tmp_path / "out" / "_forgetfilter"
    assert not Trace.exists(tmp_path / "out")
    found = find_forgotten(tmp_path / "out", FilterConfig("loss"))
    np.testing.assert_array_equal(found.values, trace.forgetting("loss"))
    with pytest.raises(TraceError, match=re.escape(f"{tmp_path} contains no trace")):
        find_forgotten(tmp_path)


def test_a_new_trace_does_not_hide_that_of_a_run(trace, rows, tmp_path):
    """`Trace.open(folder)` would then read another trace than before."""
    shutil.copytree(trace.folder, tmp_path / "out" / "_forgetfilter")
    with pytest.raises(
        TraceError, match=r"is the output folder of a run, whose trace is in .*_forgetfilter\. Pass that"
    ):
        Trace.create(tmp_path / "out", rows, "a model", None, None)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["_forgetfilter"]


@pytest.mark.parametrize("wrong", [ForgetTracker(), None, np.zeros(7)], ids=lambda wrong: type(wrong).__name__)
def test_anything_else_is_named(wrong, functions):
    message = f"`trace` must be a Trace or its folder, but it is {type(wrong).__name__}. The trace of a tracker is"
    for function in functions:
        with pytest.raises(TypeError, match=message):
            function(wrong)
