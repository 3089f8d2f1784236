"""What the summary says about a filter, and when it calls it well separated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from forgetfilter_callback import FilterConfig, FilterResult
from forgetfilter_callback.filtering.filter_by_values import filter_by_values
from forgetfilter_callback.reports.summary import page_summary
from forgetfilter_callback.review.estimates import estimate_filter_errors
from forgetfilter_callback.review.verdicts import Verdict, known_labels


ROWS = 300
UNSAFE = np.arange(ROWS) < 120


def result_of(unsafe_above: int) -> FilterResult:
    """Two populations of values, far apart. The first `unsafe_above` of the 120 unsafe rows are in the upper one."""
    rng = np.random.default_rng(0)
    values = np.where(np.arange(ROWS) < unsafe_above, 0.9, 0.1) + rng.normal(0, 0.03, ROWS)
    config = FilterConfig(measure="smoothed")
    result = filter_by_values(pa.array([f"row-{i}" for i in range(ROWS)]), values, config, nats_per_unit=5.0)
    assert result.counts["removed"] == unsafe_above and result.separability.separable
    return result


def verdicts_on(count: int, drawn: bool = True) -> list[Verdict]:
    """True verdicts on random rows."""
    rows = np.random.default_rng(1).permutation(ROWS)[:count].tolist()
    return [
        Verdict(row, f"row-{row}", "unsafe" if UNSAFE[row] else "safe", "", None, ROWS - seen if drawn else None)
        for seen, row in enumerate(rows)
    ]


def summary_of(unsafe_above: int, verdicts: list[Verdict]) -> str:
    result = result_of(unsafe_above)
    known = known_labels(verdicts, np.arange(ROWS))
    estimate = estimate_filter_errors(verdicts, known, result.removed, [~result.removed, result.removed])
    return page_summary(replace(result, estimate=estimate))


@pytest.mark.parametrize("unsafe_above", [120, 60])
def test_values_alone_never_say_well_separated(unsafe_above):
    """The values form two populations in both cases, but in the second one half of the unsafe rows are kept."""
    summary = page_summary(result_of(unsafe_above))
    assert summary == f"{unsafe_above} of 300 rows removed (φ = 0.55, chosen automatically). Not checked by anyone."
    not_drawn = summary_of(unsafe_above, verdicts_on(200, drawn=False))
    assert "no row was drawn at random" in not_drawn and "well separated" not in not_drawn.lower()


def test_verdicts_on_random_rows_show_that_a_filter_separates():
    assert ". Well separated: 0 to " in summary_of(120, verdicts_on(200))
    assert "Not shown to be well separated" in summary_of(120, verdicts_on(20))


@pytest.mark.parametrize("unsafe_above", [60, 96])
@pytest.mark.parametrize("seen", [20, 100, 200, 290])
def test_no_verdicts_call_a_filter_well_separated_that_keeps_many_unsafe_rows(unsafe_above, seen):
    assert "Not shown to be well separated" in summary_of(unsafe_above, verdicts_on(seen))


def test_the_bounds_are_one_tenth_of_the_unsafe_and_of_the_removed_rows():
    """All rows are seen, so the numbers are known: 12 of 120 unsafe rows are kept, then 13."""
    everything = verdicts_on(ROWS)
    assert ". Well separated: 12 unsafe rows kept and 0 benign rows" in summary_of(108, everything)
    assert "Not shown to be well separated: 13 unsafe rows" in summary_of(107, everything)
    assert ". Well separated: 0 unsafe rows kept and 13 benign rows" in summary_of(133, everything)
    assert "Not shown to be well separated: 0 unsafe rows kept and 14 benign" in summary_of(134, everything)
