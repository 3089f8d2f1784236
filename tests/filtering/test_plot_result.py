"""The plot of a filter result, and how a notebook shows a result."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import HOSTILE, sample_ids, two_populations

from forgetfilter_callback import FilterConfig, FilterResult
from forgetfilter_callback.filtering.filter_by_values import filter_by_values


@pytest.fixture
def result() -> FilterResult:
    values, _ = two_populations(0.25, count=40)
    values[3] = np.nan
    return filter_by_values(sample_ids(40), values, FilterConfig("loss"))


def bars(axes) -> list[np.ndarray]:
    """The heights of the bars of each group."""
    return [np.array([bar.get_height() for bar in container]) for container in axes.containers]


def test_the_plot_is_a_histogram_with_the_threshold(result):
    figure = result.plot()
    (axes,) = figure.axes
    (heights,) = bars(axes)
    edges = [bar.get_x() for bar in axes.containers[0]] + [max(b.get_x() + b.get_width() for b in axes.containers[0])]
    np.testing.assert_array_equal(heights, np.histogram(result.values[np.isfinite(result.values)], edges)[0])
    (line,) = axes.lines
    assert line.get_xdata() == pytest.approx([result.threshold] * 2)
    assert axes.get_title() == f"{result.removed.sum()} of 40 rows removed (auto φ)"
    assert plt.get_fignums() == []  # a notebook would show it a second time


def test_groups_are_stacked(result):
    groups = ["unsafe" if index % 4 == 0 else "task" for index in range(40)]
    (axes,) = result.plot(groups).axes
    assert [round(heights.sum()) for heights in bars(axes)] == [29, 10]  # one value of `task` is unknown
    assert {"task (29)", "unsafe (10)"} < {text.get_text() for text in axes.get_legend().get_texts()}


def test_a_result_without_a_threshold_has_no_line(result):
    assert replace(result, threshold=None).plot().axes[0].lines[:] == []


def test_the_plot_is_written_to_a_file(result, tmp_path):
    result.plot().savefig(tmp_path / "forgetting.png", dpi=150)
    assert plt.imread(tmp_path / "forgetting.png").shape == (675, 1200, 4)


def test_a_notebook_shows_what_is_removed_and_why(result):
    html = result._repr_html_()
    assert f"{result.removed.sum()} of 40 rows" in html and f"{result.threshold:.3g} (auto)" in html
    assert "kept because forgetting is unknown" in html and len(html) < 2_000
    for text in HOSTILE:
        shown = replace(result, reason=text)._repr_html_()
        assert not set("\x00\x1b\u202e") & set(shown)
        assert shown.count("<") == html.count("<")
