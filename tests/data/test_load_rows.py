"""Loading rows from files of all formats."""

from __future__ import annotations

import json
import logging

import pytest
from datasets import Dataset, load_from_disk
from helpers import PAIR, texts

from forgetfilter_callback.data.load_rows import encode_source, load_rows
from forgetfilter_callback.errors import DataError


def test_rows_of_all_file_formats(files, tmp_path):
    rows = Dataset.from_list(texts(12, seed=1))
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "rows")
    (tmp_path / "rows.json").write_text(json.dumps(rows.to_list()))
    assert load_from_disk(tmp_path / "rows").to_list() == rows.to_list() == texts(12, seed=1)
    for path in (files["noisy"], *(tmp_path / name for name in ("rows.parquet", "rows", "rows.json"))):
        assert list(load_rows(path)) == rows.to_list(), path
    assert list(load_rows(tmp_path / "rows.csv")) == [{name: str(row[name]) for name in row} for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, r"The file /.*missing\.jsonl does not exist"),
        ("empty.jsonl", "", "is empty"),
        ("broken.jsonl", '{"prompt": "a"\n', "cannot be read"),
        ("headed.csv", "prompt,completion\n", "has no rows"),
        (
            "short.csv",
            "prompt,completion\na,b\nc\n",
            "short.csv cannot be read: line 3: 1 value, but the header has 2",
        ),
        ("long.csv", 'prompt,completion\n"a\n",b,\n', "line 3: 3 values, but the header has 2"),
        ("twice.csv", "text,text\na,b\n", "line 1: two columns have the same name"),
        ("list.jsonl", '{"text": "a"}\n\n["b"]\n', r"line 3: a row must be an object, but this one is \['b'\]"),
        ("items.json", '["a"]', "items.json cannot be read: a row must be an object"),
        ("open.json", '[{"text": "a"}, ', "open.json cannot be read"),
        ("no-comma.json", '[{"text": "a"} {"text": "b"}]', "the list must go on with a comma or end"),
        ("more.json", '[{"text": "a"}]\n{}', "more text after the end of the list"),
        ("empty-list.json", "[]", "has no rows"),
        (
            "columns.json",
            '{\n"text": ["a"]\n}',
            r"line 1: Expecting property .* one JSON object per line",
        ),
        ("utf16.csv", b"\xff\xfea\x00", "utf16.csv cannot be read: its text is not UTF-8"),
        ("latin.csv", "prompt,completion\na,é\n".encode("latin-1"), r"Save the file as UTF-8\.$"),
        ("latin.jsonl", '{"text": "é"}\n'.encode("latin-1"), r"Save the file as UTF-8\.$"),
        ("semicolon.csv", "prompt;completion\na;b\n", "line 1: the values must be separated by commas, but .* has ';'"),
        ("tab.csv", "prompt\tcompletion\na\tb\n", r"separated by commas, but .* has '\\t'\.$"),
        (
            "data.txt",
            "the cat\n",
            r"data.txt has the extension '.txt', which is not supported. Convert the file to one of",
        ),
        ("data", "the cat\n", "has the extension '', which is not supported"),
        ("broken.parquet", "PAR1", "cannot be read"),
    ],
)
def test_unreadable_rows_are_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_rows(tmp_path / name)


def test_a_folder_of_files_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"nor a `DatasetDict` directory\. It must be a file"):
        load_rows(tmp_path)


@pytest.mark.parametrize("name", ["data[1].jsonl", "NOISY.JSONL", "ro ws*.jsonl"])
def test_file_names_with_glob_characters(name, tmp_path):
    (tmp_path / name).write_text(json.dumps(PAIR) + "\n")
    assert list(load_rows(tmp_path / name)) == [PAIR]


@pytest.mark.parametrize(("keep_end", "side"), [(False, "right"), (True, "left")])
def test_the_warning_says_where_rows_are_truncated(keep_end, side, byte_tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        rows = encode_source("noisy.jsonl", [{"text": "the cat sat"}], byte_tokenizer, 3, keep_end=keep_end)
    assert (rows.sample(0)[0][-1] == byte_tokenizer.eos_token_id) == keep_end
    assert f"1 of 1 row was truncated on the {side}, to 3 tokens" in caplog.text
