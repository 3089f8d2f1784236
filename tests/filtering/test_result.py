"""Saving and loading a FilterResult."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from helpers import sample_ids, two_populations

from forgetfilter_callback import FilterConfig, FilterResult
from forgetfilter_callback.errors import DecisionError
from forgetfilter_callback.filtering.filter_by_values import filter_by_values


def test_saving_and_loading_gives_the_same_decision(tmp_path):
    values, _ = two_populations(0.25, count=40)
    values[3] = np.nan
    result = filter_by_values(sample_ids(40), values, FilterConfig("loss"), fingerprint="f")
    result.save(tmp_path)
    again = FilterResult.load(tmp_path)
    np.testing.assert_array_equal(again.values, result.values)
    np.testing.assert_array_equal(again.removed, result.removed)
    assert again.separability == result.separability
    assert (again.ids, again.threshold, again.reason, again.versions) == (
        result.ids, result.threshold, result.reason, result.versions,
    )  # fmt: skip


def test_a_result_is_saved_with_the_removed_rows(tmp_path):
    values = np.array([0.0, 3.0, 0.1, 2.0])
    result = filter_by_values(sample_ids(4), values, FilterConfig("loss", 1.5))
    folder = tmp_path / "a" / "b"
    result.save(folder, Dataset.from_list([{"text": "é 1"}, {"text": "3"}]))
    assert (folder / "removed.jsonl").read_text(encoding="utf-8") == '{"text": "é 1"}\n{"text": "3"}\n'
    account = json.loads((folder / "filter_result.json").read_text(encoding="utf-8"))
    assert account["counts"] == {"samples": 4, "removed": 2, "kept": 2, "unknown": 0}
    assert (account["threshold"], account["method"], account["measure"]) == (1.5, "fixed", "loss")
    result.save(folder)  # without a `Dataset` no rows are written, and the old file is deleted
    assert sorted(file.name for file in folder.iterdir()) == ["filter_result.json", "values.parquet"]
    assert FilterResult.load(str(folder)).removed.tolist() == result.removed.tolist()


def test_saving_deletes_only_removed_rows_of_an_earlier_result(tmp_path):
    """The folder may be the output folder of a run, which has a file of this name too."""
    result = filter_by_values(sample_ids(3), np.array([0.0, 0.1, 3.0]), FilterConfig("loss"))
    (tmp_path / "removed.jsonl").write_text("mine")
    for _ in range(2):  # the second time, there is an earlier result
        result.save(tmp_path)
        assert (tmp_path / "removed.jsonl").read_text() == "mine"


def test_invalid_results_are_not_loaded(tmp_path):
    filter_by_values(sample_ids(3), np.array([0.0, 0.1, 3.0]), FilterConfig("loss")).save(tmp_path)
    account = json.loads((tmp_path / "filter_result.json").read_text())
    assert account["schema_version"] == 2
    another_version = "was written by another version of forgetfilter-callback"
    for content, message in (
        (json.dumps(account | {"schema_version": 3}), another_version),
        (json.dumps(account | {"schema_version": 1}), another_version),
        (json.dumps(account | {"more": 1}), "TypeError"),
        ("{}", "KeyError"),
        ("[]", "AttributeError|TypeError"),
        ("", "JSONDecodeError"),
    ):
        (tmp_path / "filter_result.json").write_text(content)
        with pytest.raises(DecisionError, match=message):
            FilterResult.load(tmp_path)
    (tmp_path / "filter_result.json").write_text(json.dumps(account))
    (tmp_path / "values.parquet").write_bytes(b"")
    with pytest.raises(DecisionError, match="is damaged"):
        FilterResult.load(tmp_path)


@pytest.mark.parametrize("given", ["folder", "file"])
def test_the_decision_of_a_reviewer_is_not_a_result(given, tmp_path):
    file = tmp_path / "review_decision.json"
    file.write_text(json.dumps({"measure": "loss", "threshold": 0.5, "overrides": {}, "trace": "t"}))
    with pytest.raises(DecisionError) as raised:
        FilterResult.load(tmp_path if given == "folder" else file)
    message = str(raised.value)
    assert "is not the folder of a filter result" in message
    assert "Pass a folder with filter_result.json, which `FilterResult.save` and `forgetfilter filter` write" in message
    assert "review_decision.json is something else: a reviewer's decision, for `FilterConfig(decision=...)`" in message


def test_images_are_left_out_of_the_removed_rows(tmp_path):
    """Their files may be gone, and to decode them needs further packages."""
    images = [{"path": "gone.png", "bytes": None}] * 2
    features = Features(
        {"text": Value("string"), "image": Image(), "undecoded": Image(decode=False), "frames": List(Image())}
    )
    columns = {"text": ["a", "b"], "image": images, "undecoded": images, "frames": [images, []]}
    rows = Dataset.from_dict(columns, features)
    result = filter_by_values(sample_ids(4), np.array([0.0, 3.0, 0.1, 2.0]), FilterConfig("loss", 1.5))
    result.save(tmp_path, rows)
    assert (tmp_path / "removed.jsonl").read_text() == '{"text": "a"}\n{"text": "b"}\n'
