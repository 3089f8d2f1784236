"""Verdicts on disk: nothing is lost, and verdicts about other rows are refused."""

from __future__ import annotations

import logging

import pyarrow as pa
import pytest

from forgetfilter_callback.errors import DecisionError
from forgetfilter_callback.review.verdicts import Verdict, append_verdicts, read_verdicts


IDS = pa.array(["a", "b", "c"])


def verdict(row: int, label: str = "safe", **others) -> Verdict:
    return Verdict(row, IDS[row].as_py(), label, "2026-01-01T00:00:00+00:00", **others)


def test_verdicts_are_read_in_the_order_in_which_they_were_given(tmp_path):
    given = [verdict(2, "unsafe", reviewer="Zoë", drawn_from=3), verdict(0), verdict(2)]
    append_verdicts(given[:1], tmp_path / "review" / "verdicts.jsonl")
    append_verdicts(given[1:], tmp_path / "review" / "verdicts.jsonl")
    assert read_verdicts(tmp_path / "review" / "verdicts.jsonl", IDS) == given


def test_there_are_no_verdicts_without_a_file(tmp_path):
    assert read_verdicts(tmp_path / "verdicts.jsonl", IDS) == []


def test_a_last_line_that_is_cut_short_costs_only_itself(tmp_path, caplog):
    file = tmp_path / "verdicts.jsonl"
    append_verdicts([verdict(0), verdict(1, "unsafe")], file)
    file.write_bytes(file.read_bytes()[:-20])
    append_verdicts([verdict(2)], file)
    with caplog.at_level(logging.WARNING):
        assert read_verdicts(file, IDS) == [verdict(0), verdict(2)]
    assert "line 2 is damaged" in caplog.text


def test_verdicts_of_another_trace_are_refused(tmp_path):
    append_verdicts([verdict(0)], tmp_path / "verdicts.jsonl")
    for others in (pa.array(["x", "y", "z"]), pa.array([], pa.string())):
        with pytest.raises(DecisionError, match="line 1: the verdict is about another set"):
            read_verdicts(tmp_path / "verdicts.jsonl", others)


@pytest.mark.parametrize(
    "line",
    [
        '{"row": 0}',
        "[1]",
        '{"row": 0, "id": "a", "verdict": "maybe", "time": ""}',
        '{"row": "0", "id": "a", "verdict": "safe", "time": ""}',
    ],
)
def test_a_line_without_a_verdict_is_refused(tmp_path, line):
    (tmp_path / "verdicts.jsonl").write_text(line + "\n")
    with pytest.raises(DecisionError, match="line 1 holds no verdict"):
        read_verdicts(tmp_path / "verdicts.jsonl", IDS)
