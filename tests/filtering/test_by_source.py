"""Counts by source against loops over single rows, and the values that a column of sources may hold."""

from __future__ import annotations

import datetime
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset

from forgetfilter_callback import FilterConfig, FilterResult
from forgetfilter_callback.errors import DataError
from forgetfilter_callback.filtering.by_source import count_by_source, largest_sources, source_name
from forgetfilter_callback.filtering.filter_by_values import filter_by_values
from forgetfilter_callback.review.verdicts import Verdict


SOURCES = ["forum", "vendor A", "crowd", None, "forum ", "Forum", 42, "42", 4.5, True, ""]


def id_of(row: int, copies: int = 1) -> str:
    """A sample id. So many rows in succession are identical."""
    return f"{row // copies}-{row % copies}"


def result_of(values: np.ndarray, overrides: dict | None = None, copies: int = 1) -> FilterResult:
    ids = pa.array([id_of(row, copies) for row in range(len(values))])
    return filter_by_values(ids, values, FilterConfig("loss", 0.0), overrides)


def verdict(row: int, label: str, copies: int = 1) -> Verdict:
    return Verdict(row, id_of(row, copies), label, "2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize("copies", [1, 3])
def test_counts_equal_those_of_a_loop_over_the_rows(copies):
    """A row that is identical to reviewed ones counts as seen. It is unsafe if one of them is."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=300)
    sources = [SOURCES[index] for index in rng.integers(0, len(SOURCES), 300)]
    unsafe = rng.random(300) < 0.3
    overrides = {id_of(row, copies): ("remove", "keep")[row % 2] for row in range(0, 60, 3)}
    verdicts = [verdict(row, ("unsafe", "safe")[row // 7 % 2], copies) for row in rng.integers(50, 300, 90).tolist()]
    last = {each.row: each.verdict for each in verdicts}
    verdicts.append(Verdict(0, "of another set", "unsafe", ""))
    result = result_of(values, overrides, copies)
    table = result.by_source(sources, verdicts, unsafe)
    expected: dict[str, list[int]] = {}
    for row, source in enumerate(sources):
        name = str(source) if source not in (None, "") else "(none)"
        identical = range(row - row % copies, row - row % copies + copies)
        of_others = {last[other] for other in identical if other in last}
        override = overrides.get(id_of(row, copies))
        label = last.get(row, max(of_others, default=None))  # "unsafe" comes after "safe"
        removed = override == "remove" if override else values[row] > 0
        found = override == "remove" if override else label == "unsafe"
        one = [1, override is not None or label is not None, found, not removed, removed, unsafe[row]]
        expected[name] = [int(a + b) for a, b in zip(expected.get(name, [0] * 6), one, strict=True)]
    columns = ["rows", "seen", "unsafe_found", "kept", "removed", "unsafe_labeled"]
    assert table[columns].T.to_dict("list") == expected
    assert set(table.columns) == {*columns, "fraction_removed"} and table.index.name == "source"
    for name, counts in expected.items():
        assert table.loc[name, "fraction_removed"] == pytest.approx(counts[4] / counts[0], abs=1e-12)
    order = list(zip(-table["removed"], -table["rows"], strict=True))
    assert order == sorted(order) and len(set(order)) > 3
    assert table["rows"].sum() == 300 and table["removed"].sum() == result.removed.sum()


def test_names_that_look_alike_are_different_sources():
    names = ["a", "a\x00", "a ", "A", "á", "a\u0301", "a\u202e", "1", "1.0"]
    table = result_of(np.arange(len(names)) + 1.0, {"0-0": "keep"}).by_source(names)
    assert sorted(table.index) == sorted(names) and (table["rows"] == 1).all()


@pytest.mark.parametrize("missing", [None, float("nan"), np.nan, "", "  \n"])
def test_missing_values_are_one_source(missing):
    assert source_name(missing) == "(none)"


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        pd.Series,
        lambda values: pd.Series(values, dtype="string"),
        lambda values: pd.Series(values, index=[7, 3, 5, 1]),
        lambda values: np.array(values, dtype=object),
        lambda values: pa.array(values).to_pylist(),
        lambda values: Dataset.from_dict({"source": values})["source"],
    ],
)
def test_columns_of_every_kind_give_the_same_table(make):
    table = result_of(np.array([-1.0, 1, 1, -1])).by_source(make(["a", None, "b", "a"]))
    assert table["removed"].to_dict() == {"(none)": 1, "b": 1, "a": 0}
    assert table["rows"].to_dict() == {"(none)": 1, "b": 1, "a": 2}


def test_values_that_are_not_text():
    when = datetime.date(2026, 3, 1)
    values = [when, ["a", "b"], {"url": "x"}, 3, np.float32(0.5), pd.NA, pd.NaT]
    table = result_of(np.array([-1.0, *[1] * 6])).by_source(values)
    assert sorted(table.index) == sorted(["2026-03-01", "['a', 'b']", "{'url': 'x'}", "3", "0.5", "(none)"])
    assert table.loc["(none)", "rows"] == 2


def test_wrong_lengths_and_names_of_columns_are_refused():
    result = result_of(np.array([1.0, -1, 1]))
    with pytest.raises(DataError, match=r"Pass one source per row: there are 3 rows, but 2 sources\."):
        result.by_source(["a", "b"])
    with pytest.raises(ValueError, match="3 rows, but 4 audit labels"):
        result.by_source(["a", "b", "c"], unsafe=[True] * 4)
    with pytest.raises(ValueError, match=r"such as `dataset\['url'\]`, not its name"):
        result.by_source("url")  # three characters for three samples


def test_rows_that_a_trainer_drops_have_no_id():
    ids = pa.array(["0-0", None, "2-0"])
    result = filter_by_values(ids, np.array([1.0, np.nan, -1]), FilterConfig("loss", 0.0))
    table = result.by_source(["a", "a", "b"], [verdict(0, "unsafe")])
    assert table[["rows", "seen", "unsafe_found", "kept", "removed"]].T.to_dict("list") == {
        "a": [2, 1, 1, 1, 1],
        "b": [1, 0, 0, 1, 0],
    }


def test_the_rest_of_many_sources_is_summed_up():
    rng = np.random.default_rng(1)
    sources = [f"source {number}" for number in rng.integers(0, 200, 1000)]
    result = result_of(rng.normal(size=1000))
    counts = count_by_source(result, sources, [verdict(row, "unsafe") for row in range(100)], np.arange(1000) % 3 == 0)
    shortened = largest_sources(counts, 20)
    assert len(shortened) == 21 and shortened[:20] == counts[:20]
    rest = shortened[-1]
    assert rest.source == f"{len(set(sources)) - 20} more sources"
    first = {each.source for each in counts[:20]}
    of_rest = np.array([source not in first for source in sources])
    assert rest.rows == of_rest.sum() and rest.removed == (of_rest & result.removed).sum()
    assert rest.kept == rest.rows - rest.removed and rest.fraction_removed == rest.removed / rest.rows
    assert rest.seen == rest.unsafe_found == of_rest[:100].sum() and rest.unsafe_labeled == of_rest[::3].sum()
    assert max(each.removed for each in counts[20:]) <= min(each.removed for each in counts[:20])
    assert largest_sources(counts[:21], 20) == counts[:21]  # one more source has a line of its own


def test_counts_are_saved_with_the_result(tmp_path):
    result = result_of(np.array([1.0, -1, 1]))
    counts = count_by_source(result, ["a\ud800", "b", None])  # half of a surrogate pair
    result = FilterResult(**{**vars(result), "source_counts": counts})
    result.save(tmp_path)
    assert FilterResult.load(tmp_path).source_counts == counts
    stored = json.loads((tmp_path / "filter_result.json").read_text(encoding="utf-8"))["source_counts"]
    assert stored[1] == {
        "source": "a\\ud800", "rows": 1, "seen": 0, "unsafe_found": 0, "unsafe_labeled": None, "kept": 0, "removed": 1,
        "fraction_removed": 1.0,
    }  # fmt: skip
