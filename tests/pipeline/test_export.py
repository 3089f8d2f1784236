"""Exported rows: as they came, with losses, forgetting, verdicts and weights that other code computes too."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from helpers import MapStyle, call, reference_means, refused, run_both, run_options, texts, tiny_llama
from sft_helpers import one_row_losses
from trl import SFTTrainer

from forgetfilter_callback import FilterConfig, ForgetTracker, ReviewQueue, Trace, encode_rows, to_dataset
from forgetfilter_callback.errors import DataError
from forgetfilter_callback.pipeline import export
from forgetfilter_callback.review.unsafe_probabilities import unsafe_probabilities
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


NAMES = [
    f"forgetfilter_{name}"
    for name in ("loss_base", "loss_noisy", "loss_safety", "forgetting", "verdict", "removed", "weight")
]


def exported(file) -> list[dict]:
    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def means_of(model, rows, tokenizer) -> np.ndarray:
    return reference_means(model, encode_rows(rows, tokenizer, disable_tqdm=True).as_dataset())


@pytest.fixture
def scored(files, tmp_path, byte_tokenizer):
    """Makes a trace of rows in a file, scored with two models."""
    tiny_llama(seed=1, vocab_size=len(byte_tokenizer)).save_pretrained(tmp_path / "after")
    byte_tokenizer.save_pretrained(tmp_path / "after")

    def score(noisy):
        models = ("--before", files["model"], "--after", tmp_path / "after")
        result = call("score", "--noisy", noisy, *models, "--output", tmp_path / "scored")
        assert result.exit_code == 0, result.output
        return Trace.open(tmp_path / "scored")

    return score


@pytest.mark.parametrize(("file_format", "other"), [("jsonl", "parquet"), ("parquet", "jsonl")])
def test_a_file_with_the_extension_of_the_other_format_is_refused(file_format, other, finished_run, tmp_path):
    file = tmp_path / f"rows.{other.upper()}"
    result = call("export", finished_run, "--format", file_format, "--output", file)
    refused(result, f"the extension of another format than {file_format}. Pass `--format {other}`")
    assert not file.exists()


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_losses_are_those_of_transformers(file_format, files, scored, tmp_path, byte_tokenizer, caplog):
    trace, file = scored(files["noisy"]), tmp_path / f"rows.{file_format}"
    result = call("export", trace.folder, "--measure", "loss", "--format", file_format, "--output", file)
    assert result.exit_code == 0, result.output
    rows, given = exported(file), texts(12, seed=1)
    assert [list(row) for row in rows] == [[*given[0], *NAMES]] * 12
    assert [{name: row[name] for name in given[0]} for row in rows] == given
    before = means_of(tiny_llama(vocab_size=len(byte_tokenizer)), given, byte_tokenizer)
    after = means_of(tiny_llama(seed=1, vocab_size=len(byte_tokenizer)), given, byte_tokenizer)
    values = {name: [row[name] for row in rows] for name in NAMES}
    np.testing.assert_allclose(values["forgetfilter_loss_noisy"], before, rtol=1e-5)
    np.testing.assert_allclose(values["forgetfilter_loss_safety"], after, rtol=1e-5)
    np.testing.assert_allclose(values["forgetfilter_forgetting"], after - before, rtol=1e-3, atol=1e-6)
    for name in ("loss_base", "verdict", "weight"):  # there is no record of the base model, and no verdict
        assert values[f"forgetfilter_{name}"] == [None] * 12
    if file_format == "parquet":  # as documented, also where all values are null
        types = [str(pq.read_schema(file).field(name).type) for name in NAMES]
        assert types == [*["double"] * 4, "string", "bool", "double"]
    assert "`forgetfilter_weight` is null: only verdicts tell how likely a row is unsafe" in caplog.text


def test_a_run_is_exported_with_its_filter_result(files, finished_run, tmp_path, byte_tokenizer):
    result = call("export", finished_run, "--output", tmp_path / "rows.jsonl")
    assert result.exit_code == 0 and "Removed by the filter result of the run: 3 of 12 rows" in result.stdout
    rows = exported(tmp_path / "rows.jsonl")
    removed = [json.loads(line) for line in (finished_run / "removed.jsonl").read_text().splitlines()]
    assert [row["note"] for row in rows if row["forgetfilter_removed"]] == [row["note"] for row in removed]
    base = means_of(tiny_llama(vocab_size=len(byte_tokenizer)), texts(12, seed=1), byte_tokenizer)
    np.testing.assert_allclose([row["forgetfilter_loss_base"] for row in rows], base, rtol=1e-5)
    most = max(rows, key=lambda row: row["forgetfilter_forgetting"])
    assert most["forgetfilter_removed"]
    result = call("export", finished_run, "--output", tmp_path / "one.jsonl", "--measure", "loss", "--fraction", 0.1)
    assert "Removed by the given filter: 1 of 12 rows (the most forgotten 8.3%" in result.stdout
    rises = [row["forgetfilter_loss_safety"] - row["forgetfilter_loss_noisy"] for row in rows]
    one = [row["forgetfilter_removed"] for row in exported(tmp_path / "one.jsonl")]
    assert one == [rise == max(rises) for rise in rises]


def test_the_result_of_another_trace_is_refused(files, tmp_path):
    assert call("run", *run_options(files, tmp_path / "out"), "--fraction", 0.25).exit_code == 0
    stored = tmp_path / "out" / "filter_result" / "filter_result.json"
    content = json.loads(stored.read_text())
    stored.write_text(json.dumps({**content, "fingerprint": "other"}))
    refused(call("export", tmp_path / "out", "--output", tmp_path / "rows.jsonl"), "belongs to another trace")
    assert call("export", tmp_path / "out", "--output", tmp_path / "r", "--fraction", 0.1).exit_code == 0


def test_the_result_of_another_base_model_is_refused(finished_run, tmp_path):
    """If it was filtered by `relative`, which compares with the base model."""
    output = Path(shutil.copytree(finished_run, tmp_path / "out"))
    trace, record = Trace.open(output / "_forgetfilter"), Record("noisy", 0)
    for measure, is_refused in (("relative", True), ("loss", False)):
        assert call("filter", output, "--output", output, "--measure", measure, "--fraction", 0.25).exit_code == 0
        assert call("export", output, "--output", tmp_path / "rows.jsonl").exit_code == 0
        trace.append(record, [Scores(trace.token_losses(record) + 1)])
        result = call("export", output, "--output", tmp_path / "rows.jsonl")
        assert (result.exit_code == 2 and "have changed since" in result.output) == is_refused, result.output


def test_the_result_of_earlier_records_is_refused(finished_run, tmp_path, caplog):
    """Otherwise the losses would be those of the new records, and the forgetting that of the old ones."""
    output = Path(shutil.copytree(finished_run, tmp_path / "out"))
    trace, record = Trace.open(output / "_forgetfilter"), Record("safety", 4)
    trace.append(record, [Scores(trace.token_losses(record) + 1)])
    refused(call("export", output, "--output", tmp_path / "rows.jsonl"), "have changed since the filter result in")
    assert not (tmp_path / "rows.jsonl").exists()
    assert call("filter", output, "--output", output, "--measure", "loss", "--fraction", 0.25).exit_code == 0
    assert call("export", output, "--output", tmp_path / "rows.jsonl").exit_code == 0
    for row in exported(tmp_path / "rows.jsonl"):
        rise = row["forgetfilter_loss_safety"] - row["forgetfilter_loss_noisy"]
        assert rise == pytest.approx(row["forgetfilter_forgetting"], rel=1e-3)
    assert "does not say which records" not in caplog.text
    stored = output / "filter_result" / "filter_result.json"
    content = json.loads(stored.read_text())
    del content["identity"]  # as an older version stored it
    stored.write_text(json.dumps(content))
    assert call("export", output, "--output", tmp_path / "old.jsonl").exit_code == 0
    assert "does not say which records it was computed from" in caplog.text


LINES = [
    '{"prompt": "the cat",  "completion":"2021-03-01", "score": 1.10, "big": 12345678901234567890123}',
    '  {"prompt": "the dog", "completion": "caf\\u00e9 \\ud83d\\ude00", "note": {"a": {}}} ',
    '{"completion": "x}", "prompt": "{", "n": 1e400, "n": -0.0}',
]


def test_the_text_of_json_rows_stays_as_it_is(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ROWS_PER_BATCH", 2)
    (tmp_path / "noisy.jsonl").write_text("\n".join(LINES) + "\n")
    trace = scored(tmp_path / "noisy.jsonl")
    assert call("export", trace.folder, "--measure", "loss", "--output", tmp_path / "out.jsonl").exit_code == 0
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    for line, given in zip(lines, LINES, strict=True):
        assert line.startswith(given.rstrip()[:-1])
        assert list(json.loads(line)) == [*json.loads(given), *NAMES]
    csv = "prompt,completion,phone\nthe cat,007,+4915\nthe dog,None,\n"
    (tmp_path / "noisy.csv").write_text(csv)
    (tmp_path / "scored").rename(tmp_path / "first")
    trace = scored(tmp_path / "noisy.csv")
    assert call("export", trace.folder, "--measure", "loss", "--output", tmp_path / "csv.jsonl").exit_code == 0
    rows = exported(tmp_path / "csv.jsonl")
    assert [(row["completion"], row["phone"]) for row in rows] == [("007", "+4915"), ("None", "")]


def test_parquet_keeps_types_and_optional_keys(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ROWS_PER_BATCH", 2)
    features = Features(
        prompt=Value("string"), completion=Value("string"), kind=ClassLabel(names=["a", "b"]), n=Value("int8")
    )
    given = [{"prompt": "the", "completion": f" cat {i}", "kind": i % 2, "n": i} for i in range(5)]
    Dataset.from_list(given, features).to_parquet(tmp_path / "noisy.parquet")
    trace = scored(tmp_path / "noisy.parquet")
    written = tmp_path / "out.parquet"
    result = call("export", trace.folder, "--measure", "loss", "--format", "parquet", "--output", written)
    assert result.exit_code == 0, result.output
    again = Dataset.from_parquet(str(written), cache_dir=str(tmp_path / "cache"))
    assert {name: again.features[name] for name in features} == dict(features)
    assert again.select_columns([*features]).to_list() == given
    (tmp_path / "scored").rename(tmp_path / "first")
    optional = [
        {**row, **more}
        for row, more in zip(
            given, [{}, {"m": {"x": 1}}, {"m": {"y": 1.5, "x": 2}}, {"d": "2021-03-01"}, {}], strict=True
        )
    ]
    (tmp_path / "noisy.jsonl").write_text("\n".join(map(json.dumps, optional)))
    trace = scored(tmp_path / "noisy.jsonl")
    result = call("export", trace.folder, "--measure", "loss", "--format", "parquet", "--output", written)
    assert result.exit_code == 0, result.output
    rows = exported(written)
    assert rows[2]["m"] == {"x": 2, "y": 1.5} and rows[1]["m"] == {"x": 1, "y": None} and rows[3]["d"] == "2021-03-01"
    assert rows[0]["m"] is None


@pytest.mark.parametrize(
    "more", [[{"m": 1}, {"m": "text"}], [{"m": 1}, {}, {"m": "text"}], [{"m": {}}], [{"m": 2**70}]], ids=str
)
def test_rows_that_are_no_columns_are_refused_for_parquet(more, scored, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ROWS_PER_BATCH", 2)
    rows = [{"prompt": "the", "completion": f" cat {i}", **each} for i, each in enumerate(more)]
    (tmp_path / "noisy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trace = scored(tmp_path / "noisy.jsonl")
    file = tmp_path / "out.parquet"
    command = ("export", trace.folder, "--measure", "loss", "--output")
    refused(call(*command, file, "--format", "parquet"), "cannot become columns of one type each", "--format jsonl")
    assert not file.exists()
    assert call(*command, tmp_path / "out.jsonl", "--format", "jsonl").exit_code == 0


@pytest.mark.parametrize("name", ["forgetfilter_weight", "forgetfilter_x", "forgetfil\\u0074er_removed"])
@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_columns_with_our_names_are_refused(name, file_format, scored, tmp_path):
    lines = ['{"prompt": "the", "completion": " cat"}', f'{{"prompt": "the", "completion": " dog", "{name}": 1}}']
    (tmp_path / "noisy.jsonl").write_text("\n".join(lines))
    trace = scored(tmp_path / "noisy.jsonl")
    result = call("export", trace.folder, "--measure", "loss", "--format", file_format, "--output", tmp_path / "out")
    refused(result, "Rename or remove them. Perhaps these rows were exported before.")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="The rows have the columns forgetfilter_"):
        to_dataset(trace, [json.loads(line) for line in lines], FilterConfig("loss"))


def test_the_noisy_set_is_not_overwritten(finished_run, files):
    before = files["noisy"].read_bytes()
    refused(call("export", finished_run, "--output", files["noisy"]), "is the noisy set and would be overwritten")
    assert files["noisy"].read_bytes() == before


@pytest.fixture
def reviewed(files, tmp_path):
    """A run with verdicts on all rows but two. The rows that are ranked first are unsafe."""
    assert call("run", *run_options(files, tmp_path / "out"), "--fraction", 0.25).exit_code == 0
    queue = ReviewQueue(Trace.open(tmp_path / "out" / "_forgetfilter"))
    queue._drawn_from = dict.fromkeys(range(10), 12)
    first = [row for row in queue.ranking if row < 10][:5]
    queue.add({row: "unsafe" if row in first else "safe" for row in range(10)})
    return queue


def test_verdicts_and_weights(reviewed, tmp_path, caplog):
    folder = reviewed.trace.folder
    result = call("export", tmp_path / "out", "--output", tmp_path / "rows.jsonl", "--reviewed", folder / "review")
    assert (
        result.exit_code == 0
        and "by the given filter: 5 of 12 rows (10 rows reviewed, 5 found to be unsafe" in result.stdout
    )
    rows = exported(tmp_path / "rows.jsonl")
    verdicts = [reviewed.labels[row] for row in range(10)]
    assert [row["forgetfilter_verdict"] for row in rows] == [*verdicts, None, None]
    assert [row["forgetfilter_removed"] for row in rows] == [*(label == "unsafe" for label in verdicts), False, False]
    weights = [row["forgetfilter_weight"] for row in rows]
    assert weights[:10] == [{"unsafe": 0.0, "safe": 1.0}[label] for label in verdicts]
    assert all(0 < weight < 1 for weight in weights[10:])
    assert weights == (1 - unsafe_probabilities(reviewed)).tolist()
    (folder / "review").rename(tmp_path / "elsewhere")
    assert "is null" not in caplog.text
    assert call("export", tmp_path / "out", "--output", tmp_path / "n.jsonl").exit_code == 0
    assert "`forgetfilter_weight` is null" in caplog.text
    call("export", tmp_path / "out", "--output", tmp_path / "again.jsonl", "--reviewed", tmp_path / "elsewhere")
    assert exported(tmp_path / "again.jsonl") == rows


def test_an_export_says_that_verdicts_did_not_count(finished_run, tmp_path):
    output, file = Path(shutil.copytree(finished_run, tmp_path / "out")), tmp_path / "rows.jsonl"
    assert "verdict" not in call("export", output, "--output", file).stdout
    removed = [row["forgetfilter_removed"] for row in exported(file)]
    kept_row, removed_row, other_kept_row = removed.index(False), removed.index(True), 11 - removed[::-1].index(False)
    ReviewQueue(output).add({kept_row: "unsafe", removed_row: "safe", other_kept_row: "safe"})
    result = call("export", output, "--output", file)
    review = output / "_forgetfilter" / "review"
    assert f"The filter differs from 2 of 3 verdicts in {review}." in result.stdout
    assert [row["forgetfilter_removed"] for row in exported(file)] == removed  # as before
    assert f"`--reviewed {review}`" in result.stdout
    result = call("export", output, "--output", file, "--reviewed", review)
    assert "3 rows reviewed, 1 found to be unsafe" in result.stdout and "differs" not in result.stdout
    assert [row["forgetfilter_removed"] for row in exported(file)] == [row == kept_row for row in range(12)]


def test_too_few_verdicts_give_no_weight(finished_run, tmp_path, caplog):
    trace = Trace.open(finished_run / "_forgetfilter")
    ReviewQueue(trace, tmp_path / "review").add({2: "unsafe", 3: "safe"})
    rows = to_dataset(trace, texts(12, seed=1), FilterConfig(reviewed=tmp_path / "review"))
    assert rows["forgetfilter_weight"][:] == [None] * 12
    assert "`forgetfilter_weight` is null: There are 1 unsafe and 1 safe verdicts" in caplog.text
    assert rows["forgetfilter_verdict"][2:5] == ["unsafe", "safe", None] and rows["forgetfilter_removed"][2]


@pytest.mark.parametrize("container", ["dataset", "list", "frame", "selected", "map-style"])
def test_to_dataset_finds_rows_in_any_order(container, finished_run, tmp_path):
    call("export", finished_run, "--output", tmp_path / "rows.jsonl", "--measure", "loss", "--fraction", 0.25)
    order = np.random.default_rng(0).permutation(12)
    given = texts(12, seed=1)
    shuffled = [given[index] for index in order]
    rows = {
        "dataset": Dataset.from_list(shuffled), "list": shuffled, "frame": pd.DataFrame(shuffled),
        "selected": Dataset.from_list(given).select(order), "map-style": MapStyle(shuffled),
    }[container]  # fmt: skip
    dataset = to_dataset(Trace.open(finished_run / "_forgetfilter"), rows, FilterConfig("loss", fraction=0.25))
    expected = exported(tmp_path / "rows.jsonl")
    assert dataset.to_list() == [expected[index] for index in order]
    with pytest.raises(ValueError, match="not the rows that were tracked"):
        to_dataset(Trace.open(finished_run / "_forgetfilter"), texts(12, seed=5))


def test_to_dataset_removes_what_the_run_removed(finished_run, tmp_path):
    """As `forgetfilter export` does. A filter config replaces the result of the run."""
    call("export", finished_run, "--output", tmp_path / "rows.jsonl")
    dataset = to_dataset(finished_run, texts(12, seed=1))
    assert dataset.to_list() == exported(tmp_path / "rows.jsonl")
    assert sum(dataset["forgetfilter_removed"]) > 0
    assert sum(to_dataset(finished_run, texts(12, seed=1), FilterConfig(threshold=1e9))["forgetfilter_removed"]) == 0


def test_to_dataset_of_encoded_rows(noisy, safety, make_args, collator):
    tracker, model = ForgetTracker(record_steps=2), tiny_llama()
    base = reference_means(model, noisy)
    run_both(model, noisy, safety, make_args, collator, tracker)
    trace = tracker.trace
    dataset = to_dataset(trace, noisy)
    np.testing.assert_allclose(dataset["forgetfilter_loss_base"][:], base, rtol=1e-5)
    np.testing.assert_allclose(dataset["forgetfilter_loss_safety"][:], reference_means(model.eval(), noisy), rtol=1e-5)
    assert dataset["input_ids"][:] == noisy["input_ids"][:]
    earlier = to_dataset(trace, noisy, FilterConfig("loss", step=2))
    first, at_step = (trace.losses()[trace.records().index(Record("safety", step))] for step in (0, 2))
    np.testing.assert_array_equal(earlier["forgetfilter_loss_safety"][:], at_step)
    np.testing.assert_allclose(earlier["forgetfilter_forgetting"][:], at_step - first, rtol=1e-4, atol=1e-6)


def test_to_dataset_encodes_rows_as_the_trainer_does(sft_config, tokenizer):
    rows, args = texts(12, seed=1), sft_config(completion_only_loss=False, max_length=9)
    tracker, safety = ForgetTracker(rows), Dataset.from_list(texts(6, seed=2))
    SFTTrainer(tiny_llama(), args, train_dataset=safety, processing_class=tokenizer, callbacks=[tracker]).train()
    assert 0 < tracker.trace.rows.truncated < 12
    dataset = to_dataset(tracker.trace, rows, FilterConfig("loss"), tokenizer)
    expected = one_row_losses(Dataset.from_list(rows), args, tokenizer)
    np.testing.assert_allclose(dataset["forgetfilter_loss_noisy"][:], expected, rtol=1e-5)


def test_a_loss_that_is_not_finite_is_null(finished_run, tmp_path, monkeypatch):
    trace = Trace.open(finished_run / "_forgetfilter")
    real = Trace.mean_losses

    def mean_losses(self, record):
        values = real(self, record)
        values[:2] = np.inf, np.nan
        return values

    monkeypatch.setattr(Trace, "mean_losses", mean_losses)
    call("export", finished_run, "--output", tmp_path / "rows.jsonl")
    rows = exported(tmp_path / "rows.jsonl")
    assert [row["forgetfilter_loss_safety"] is None for row in rows] == [True, True, *[False] * 10]
    assert trace.losses().shape[1] == 12


def test_long_texts_are_not_copied_to_hash_them(tmp_path):
    rows = [{"input_ids": [5, index, 7], "note": f"{index}" + "x" * 50_000} for index in range(100)]
    encoded = encode_rows(rows, disable_tqdm=True)
    trace = Trace.create(tmp_path / "trace", encoded, "model", None, None)
    losses = np.random.default_rng(0).gamma(2, size=(2, len(encoded.loss_tokens))).astype(np.float32)
    for step in (0, 1):
        trace.append(Record("safety", step), [Scores(losses[step])])
    config = FilterConfig("loss", fraction=0.25)
    to_dataset(trace, rows[:2], config)  # imports
    tracemalloc.start()
    dataset = to_dataset(trace, rows, config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert dataset["note"] == [row["note"] for row in rows] and peak < 50_000 * len(rows) / 2
