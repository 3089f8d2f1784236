"""Rows of JSON and CSV files keep their values and their text."""

from __future__ import annotations

import csv
import json
import tracemalloc
from contextlib import suppress

import pytest

from forgetfilter_callback import encode_rows
from forgetfilter_callback.data.json_rows import JsonRows
from forgetfilter_callback.data.load_rows import load_rows
from forgetfilter_callback.data.output_lines import source_lines
from forgetfilter_callback.errors import DataError


DATES = ["2021-03-01", "2024-05-01T10:00:00Z", "2024-05-01 10:00:00", "12:30:00"]
# Text of a row that parsing and serializing, or a common table of all rows, would change.
LINES = [
    '{"prompt": "a", "completion": "2021-03-01"}',
    '{"prompt": "b", "completion": "007",   "id": 1.10}',
    '{"prompt": "c", "completion": "x", "id": 12345678901234567890.5, "only": null}',
    '{"prompt": "d", "completion": "\\u00e9 é\\u2028\u2028", "id": "+4915"}',
    '{"completion": "y", "prompt": "e", "id": [1e5, {"deep": "2024-05-01"}], "prompt": "f"}',
    '{"prompt": "g", "completion": "\u00a0\x85"}',
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    "text",
    {
        "lines": "\n".join(LINES),
        "lines of Windows": "\ufeff" + "\r\n".join(LINES) + "\r\n\r\n",
        "a list": f"[{','.join(LINES)}]",
        "a list over lines": "\ufeff\n[\n  " + ",\r\n  ".join(LINES) + "\n]\n",
    }.items(),
    ids=lambda item: item[0],
)
def test_rows_keep_their_text(name, text, tmp_path):
    (tmp_path / name).write_bytes(text[1].encode())
    rows = load_rows(tmp_path / name)
    assert list(source_lines(rows)) == LINES
    assert list(rows) == [json.loads(line) for line in LINES]


def test_a_row_over_several_lines_becomes_one_line(tmp_path):
    row = {"prompt": "a \n\t  b", "completion": {"deep": [1, " \r\n "]}, "id": "\u2028 \u00a0"}
    for indented in (json.dumps([row, row], indent=4, ensure_ascii=False), json.dumps([row, row], indent="\t")):
        (tmp_path / "rows.json").write_text(indented.replace("\n", "\r\n"))
        lines = list(source_lines(load_rows(tmp_path / "rows.json")))
        assert [json.loads(line) for line in lines] == [row, row]
        assert not any("\n" in line or "\r" in line for line in lines)
    assert lines[0].startswith('{ "prompt": "a \\n\\t  b", "completion": {')


def test_values_of_a_csv_file_are_text(tmp_path):
    values = ["007", "+4915", "2021-03-01", "None", "NA", "", "1.10", "True", 'a, "b"\r\nc', " x ", "null", "nan"]
    text = "prompt,answer\r\n" + "".join(
        f'"{value.replace(chr(34), 2 * chr(34))}",{index}\r\n' for index, value in enumerate(values)
    )
    (tmp_path / "rows.csv").write_bytes(("\ufeff" + text + "\r\n").encode())
    rows = load_rows(tmp_path / "rows.csv")
    expected = [{"prompt": value, "answer": str(index)} for index, value in enumerate(values)]
    assert list(rows) == [json.loads(line) for line in source_lines(rows)] == expected


def test_a_long_value_of_a_csv_file(tmp_path):
    (tmp_path / "rows.csv").write_text("text\n" + "a" * 200_000 + "\n")
    assert list(load_rows(tmp_path / "rows.csv")) == [{"text": "a" * 200_000}]


def test_the_limits_of_the_csv_module_stay_as_they_are(tmp_path):
    before = csv.field_size_limit(100_000)
    try:
        for name, text in (("rows.csv", "text\na\n"), ("wrong.csv", 'text\n"a\n')):
            (tmp_path / name).write_text(text)
            with suppress(DataError):
                load_rows(tmp_path / name)
            assert csv.field_size_limit() == 100_000
    finally:
        csv.field_size_limit(before)


def test_a_quote_that_is_not_closed_is_refused(tmp_path):
    """The rows after it would become a part of its value."""
    (tmp_path / "rows.csv").write_text('text,label\na,"b\nc,d\ne,f\n')
    with pytest.raises(DataError, match="unexpected end of data"):
        load_rows(tmp_path / "rows.csv")


@pytest.mark.parametrize("form", ["prompt and completion", "messages", "conversations"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_dates_are_encoded_as_text(form, name, tokenizer, tmp_path):
    """`datasets` would turn a column of ISO dates into timestamps."""
    rows = {
        "prompt and completion": [{"prompt": "the", "completion": date} for date in DATES],
        "messages": [{"messages": [{"role": "user", "content": date}]} for date in DATES],
        "conversations": [{"conversations": [{"from": "user", "value": date}]} for date in DATES],
    }[form]
    (tmp_path / name).write_text(
        json.dumps(rows) if name == "rows.json" else "".join(json.dumps(row) + "\n" for row in rows)
    )
    loaded = load_rows(tmp_path / name)
    assert list(loaded) == rows
    assert encode_rows(loaded, tokenizer).ids == encode_rows(rows, tokenizer).ids


def test_rows_are_a_sequence():
    rows = JsonRows(['{"a": 1}', '{"b": 2}', '{"c": 3}'])
    assert len(rows) == 3 and rows[-1] == {"c": 3} and list(rows[1:]) == [{"b": 2}, {"c": 3}]
    with pytest.raises(IndexError):
        rows[3]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_file_takes_its_size_in_memory(name, tmp_path):
    """An emoji makes each character of a string take four bytes."""
    lines = [
        json.dumps({"text": f"\N{PARTY POPPER}{'the cat sat ' * 100}{index}"}, ensure_ascii=False)
        for index in range(400)
    ]
    if name == "rows.csv":
        lines = ["text", *(json.loads(line)["text"] for line in lines)]
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    tracemalloc.start()
    rows = load_rows(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 400 and rows[7]["text"].endswith("sat 7")
    assert peak < 1.5 * (tmp_path / name).stat().st_size
