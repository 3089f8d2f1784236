"""Containers of rows: data frames are accepted, dictionaries of splits are refused with a sentence."""

from __future__ import annotations

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from helpers import texts

from forgetfilter_callback import encode_rows
from forgetfilter_callback.data.as_rows import as_rows
from forgetfilter_callback.errors import EncodingError


def test_a_data_frame_is_encoded_as_its_rows(byte_tokenizer):
    frame = pd.DataFrame(texts(5, seed=0), index=[3, 1, 4, 1, 5])
    assert encode_rows(frame, byte_tokenizer).ids == encode_rows(texts(5, seed=0), byte_tokenizer).ids
    assert as_rows(frame, "`rows`").column_names == ["prompt", "completion", "unsafe", "note"]


def test_missing_values_of_a_data_frame_are_missing(byte_tokenizer):
    frame = pd.DataFrame({"prompt": ["a", "b"], "completion": ["c", None]})
    with pytest.raises(EncodingError, match="Row 1: `completion` must be text or a list of messages"):
        encode_rows(frame, byte_tokenizer, disable_tqdm=True)


def test_a_data_frame_that_is_not_a_table_is_refused(byte_tokenizer):
    frame = pd.DataFrame({"text": ["a", ["b"]]})
    with pytest.raises(EncodingError, match=r"DataFrame that cannot be converted .* `frame.to_dict\('records'\)`"):
        encode_rows(frame, byte_tokenizer)


def test_a_dictionary_of_splits_is_refused(byte_tokenizer):
    rows = DatasetDict({name: Dataset.from_list(texts(2, seed=0)) for name in ("before", "after")})
    for refused in (rows, rows.map(lambda row: row), DatasetDict()):
        with pytest.raises(EncodingError, match=r"`rows` is a DatasetDict with the splits .*Choose a split"):
            encode_rows(refused, byte_tokenizer)
    with pytest.raises(EncodingError, match=r"splits 'before', 'after'. Choose a split, such as `dataset\['before'\]`"):
        encode_rows(rows, byte_tokenizer)


@pytest.mark.parametrize("rows", ["noisy.jsonl", {"text": ["a"]}, 7, {"a"}, iter([]), {0: {}}.values()])
def test_other_kinds_are_refused(rows, byte_tokenizer):
    with pytest.raises(EncodingError, match=f"must be a dataset or a list of rows, but it is {type(rows).__name__}"):
        encode_rows(rows, byte_tokenizer)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_messages_that_pandas_read_from_a_file(column, tmp_path, chat_tokenizer):
    """They are arrays of dictionaries, and so are the parts of a content."""
    content = [{"type": "text", "text": "the"}] if column == "messages" else "the"
    names = ("role", "content") if column == "messages" else ("from", "value")
    rows = [{column: [dict(zip(names, turn, strict=True)) for turn in (("user", content), ("assistant", content))]}] * 2
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    read = pd.read_parquet(tmp_path / "rows.parquet").to_dict("records")
    assert not isinstance(read[0][column], list)
    assert encode_rows(read, chat_tokenizer).ids == encode_rows(rows, chat_tokenizer).ids


def test_the_format_of_a_dataset_is_named(byte_tokenizer):
    rows = Dataset.from_list([{"text": "the cat"}] * 2).with_format("pandas")
    with pytest.raises(EncodingError, match=r"this one is DataFrame.*`dataset\.with_format\(None\)`"):
        encode_rows(rows, byte_tokenizer)
