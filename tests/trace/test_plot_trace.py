"""The plot of a trace, and how a notebook shows a trace."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import HOSTILE, hostile_trace

from forgetfilter_callback import Trace
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.scoring.scores import Scores


@pytest.fixture
def trace(tmp_path, byte_tokenizer) -> Trace:
    return hostile_trace(tmp_path / "trace", byte_tokenizer, samples=60)[0]


def test_the_plot_shows_losses_by_record_and_forgetting(trace):
    losses, forgetting = trace.plot("loss").axes
    (median,) = losses.lines
    expected = [np.median(trace.mean_losses(record)) for record in trace.records()]
    np.testing.assert_allclose(median.get_ydata(), expected)
    assert [label.get_text() for label in losses.get_xticklabels()] == [
        "noisy\n0", "noisy\n9", "safety\n0", "safety\n4", "safety\n8"
    ]  # fmt: skip
    values = trace.forgetting("loss")
    heights = [bar.get_height() for bar in forgetting.containers[0]]
    assert sum(heights) == 60
    split = [bar.get_height() for bar in forgetting.containers[0] if bar.get_x() > 1]
    assert abs(sum(split) - (values > 1).sum()) <= max(heights)
    assert forgetting.get_xlabel().startswith("loss forgetting [nats")
    assert plt.get_fignums() == []  # a notebook would show it a second time


def test_before_the_safety_session_there_are_losses_only(trace, tmp_path):
    noisy = Trace.create(tmp_path / "noisy", trace.rows, "tiny", None, None)
    assert len(noisy.plot().axes) == 1  # no record yet
    for record in trace.records()[:2]:
        noisy.append(record, [Scores(trace.token_losses(record))])
    (axes,) = noisy.plot().axes
    assert axes.get_ylabel() == "mean loss of a sample [nats per token]" and len(axes.lines) == 1


def test_a_session_that_diverged_has_no_bars(trace):
    trace.append(trace.records()[-1], [Scores(np.full(trace.rows.loss_offsets[-1], np.nan, np.float32))])
    losses, forgetting = trace.plot("loss").axes
    assert forgetting.containers == [] and len(losses.lines) == 0


def test_a_measure_that_needs_other_records_is_refused(trace):
    with pytest.raises(TraceError, match="rouge1=True"):
        trace.plot("rouge1")


def test_a_notebook_shows_what_a_trace_holds(trace):
    html = trace._repr_html_()
    assert "60 rows" in html and "safety session, step 8" in html and str(trace.folder) in html
    for text in HOSTILE:
        trace.manifest["model"] = f"/models/{text}"
        shown = trace._repr_html_()
        assert "<script" not in shown and "<img" not in shown and "\u202e" not in shown
        assert shown.count("<") == html.count("<")
