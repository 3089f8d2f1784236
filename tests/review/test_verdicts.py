"""Verdicts on disk: nothing is lost, and verdicts about other rows are refused."""

from __future__ import annotations

import logging
from dataclasses import replace

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


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"row": ' + "1" * 5000 + "}", '{"row": 0'], ids=["deep", "digits", "cut"]
)
def test_a_line_that_cannot_be_read_is_skipped(line, tmp_path, caplog):
    file = tmp_path / "verdicts.jsonl"
    file.write_text(line + "\n")
    append_verdicts([verdict(0)], file)
    assert read_verdicts(file, IDS) == [verdict(0)]
    assert f"{file}, line 1 is damaged" in caplog.text


def test_verdicts_in_a_folder_of_their_name_are_refused(tmp_path):
    (tmp_path / "verdicts.jsonl").mkdir()
    with pytest.raises(DecisionError, match=r"The verdicts in .*verdicts.jsonl cannot be read: .*directory"):
        read_verdicts(tmp_path / "verdicts.jsonl", IDS)


def test_draws_from_a_set_of_another_size_do_not_count(tmp_path, caplog):
    """Rows were added to the file, and the trace was recorded again. The new rows could not be drawn."""
    given = [verdict(0, drawn_from=3, rows=3), verdict(1, "unsafe", rows=3)]
    append_verdicts(given, tmp_path / "verdicts.jsonl")
    assert read_verdicts(tmp_path / "verdicts.jsonl", IDS) == given and not caplog.text
    more = pa.array(["a", "b", "c", "d"])
    assert read_verdicts(tmp_path / "verdicts.jsonl", more) == [replace(given[0], drawn_from=None), given[1]]
    assert "were given on a set of 3 rows, but this one has 4" in caplog.text


@pytest.mark.parametrize(("order", "warned"), [([0, 1, 2], False), ([0, 2, 1], False), ([1, 0, 2], True)])
def test_lines_that_are_not_in_the_order_of_their_times_cause_a_warning(order, warned, tmp_path, caplog):
    times = ["2026-11-28T09:59:59+00:00", "2026-11-28T10:00:00+00:00", "2026-11-28T10:00:00+00:00"]
    given = [replace(verdict(row), time=times[row]) for row in (0, 1, 2)]
    append_verdicts([given[place] for place in order], tmp_path / "verdicts.jsonl")
    assert read_verdicts(tmp_path / "verdicts.jsonl", IDS) == [given[place] for place in order]
    assert ("is older than the one in the line before" in caplog.text) == warned


def test_an_editor_may_add_a_byte_order_mark(tmp_path):
    file = tmp_path / "verdicts.jsonl"
    append_verdicts([verdict(0), verdict(1, "unsafe")], file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_verdicts(file, IDS) == [verdict(0), verdict(1, "unsafe")]


def test_verdicts_of_another_trace_are_refused(tmp_path):
    append_verdicts([verdict(0)], tmp_path / "verdicts.jsonl")
    for others in (pa.array(["x", "y", "z"]), pa.array([], pa.string())):
        with pytest.raises(DecisionError, match="line 1: the verdict is about another set"):
            read_verdicts(tmp_path / "verdicts.jsonl", others)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"row": 0}', " holds no verdict. Pass the folder of a review"),
        ("[1]", " holds no verdict"),
        (
            '{"row": 0, "id": "a", "verdict": "Unsafe", "time": ""}',
            ": the verdict is 'Unsafe'. It must be 'unsafe' or 'safe'",
        ),
        ('{"row": "0", "id": "a", "verdict": "safe", "time": ""}', ": `row` must be a whole number"),
        ('{"row": false, "id": "a", "verdict": "safe", "time": ""}', ": `row` must be a whole number"),
        (
            '{"row": 0, "id": "a", "verdict": "safe", "time": null}',
            ": `row` must be a whole number and `time` a string",
        ),
        ('{"row": 0, "id": "a", "verdict": "safe", "time": "", "note": "x"}', ": a verdict has no note. Remove it"),
        (
            '{"row": 0, "id": "a", "verdict": "safe", "time": "", "rows": "3"}',
            ": `rows` must be a positive whole number",
        ),
        ('{"row": 0, "id": "a", "verdict": "safe", "time": "", "rows": 0}', ": `rows` must be a positive whole number"),
        (
            '{"row": 0, "id": "a", "verdict": "safe", "time": "", "identical_to": [1]}',
            r": identical_to=\[1\] must be null or",
        ),
        (
            '{"row": 0, "id": "a", "verdict": "safe", "time": "", "identical_to": 3}',
            ": identical_to=3 must be null or the",
        ),
    ],
)
def test_a_line_without_a_verdict_is_refused(tmp_path, line, said):
    (tmp_path / "verdicts.jsonl").write_text(line + "\n")
    with pytest.raises(DecisionError, match=f"line 1{said}"):
        read_verdicts(tmp_path / "verdicts.jsonl", IDS)


@pytest.mark.parametrize("value", ["3", 3.0, True, 0, -3, 1, 5, [3]], ids=repr)
def test_an_impossible_number_of_drawn_rows_is_refused(tmp_path, value):
    """Two of four rows have a verdict, so a row was drawn from at least the two others."""
    ids, file = pa.array(["a", "b", "c", "d"]), tmp_path / "verdicts.jsonl"
    for possible in (2, 3, 4):
        append_verdicts([verdict(0, drawn_from=possible), verdict(1)], file)
        assert read_verdicts(file, ids)[-2].drawn_from == possible
    append_verdicts([verdict(1, drawn_from=value)], file)
    with pytest.raises(DecisionError) as error:
        read_verdicts(file, ids)
    message = str(error.value)
    assert message.startswith(f"{file}, line 7: drawn_from={value!r} cannot be the number of rows")
    assert "it must be from 2 to 4. Restore the file from a backup, or set the value to null" in message


def test_a_damaged_line_may_have_held_the_verdict_before_a_draw(tmp_path):
    file = tmp_path / "verdicts.jsonl"
    append_verdicts([verdict(0), verdict(1, drawn_from=2)], file)
    file.write_text("{" + file.read_text().partition("}")[2])
    assert read_verdicts(file, IDS) == [verdict(1, drawn_from=2)]
