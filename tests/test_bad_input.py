"""What people give by mistake, by classes, through the command line and the library: a clear error or a counted warning, the
documented exit code, no traceback, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import texts, tiny_llama
from datasets import Dataset
from test_cli import call, settings

from forgetfilter_callback import (
    EncodingError,
    FilteredTrainer,
    ForgetTracker,
    Record,
    Trace,
    TraceError,
    decide,
    encode_rows,
    load_rows,
)
from forgetfilter_callback.forgetting import MEASURES
from forgetfilter_callback.scoring import Scores, token_losses


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    assert call("run", *settings(files, output), "--share", 0.25).exit_code == 0
    return output


@pytest.fixture
def run_folder(finished, tmp_path) -> Path:
    """A copy of a finished run, to be damaged."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def refused(result, *said: str) -> None:
    """Ended as the documentation says bad data ends: with 2, in a line, without a traceback."""
    assert result.exit_code == 2, (result.exit_code, result.output[-2000:])
    assert "Traceback" not in result.output
    output = " ".join(result.output.replace("│", " ").split())
    for words in said:
        assert words in output, output[-600:]


# ---- tables ----

PAIR = {"prompt": "the cat", "completion": " sat"}
BAD_TABLES = {
    "no rows": ("noisy.jsonl", "", "is empty"),
    "blank lines": ("noisy.jsonl", "\n\n\n", "noisy.jsonl"),
    "cut off": ("noisy.jsonl", json.dumps(PAIR) + "\n" + '{"prompt": "the c', "cannot be read"),
    "no known columns": ("noisy.jsonl", json.dumps({"question": "a", "answer": "b"}), "prompt"),
    "a number for a text": ("noisy.jsonl", json.dumps({"prompt": 1, "completion": 2}), "Row 0"),
    "null for a text": (
        "noisy.jsonl",
        json.dumps(PAIR) + "\n" + json.dumps({"prompt": None, "completion": None}),
        "Row 1",
    ),
    "messages without roles": ("noisy.jsonl", json.dumps({"messages": [{"content": "a"}]}), "Row 0"),
    "messages that are a text": ("noisy.jsonl", json.dumps({"messages": "hello"}), "Row 0"),
    "no messages": ("noisy.jsonl", json.dumps({"messages": []}), "Row 0"),
    "a list of numbers": ("noisy.json", "[1, 2, 3]", "noisy.json"),
    "no JSON": ("noisy.json", "hello", "cannot be read"),
    "not UTF-8": ("noisy.jsonl", b'{"prompt": "\xff\xfe", "completion": "a"}', "cannot be read"),
    "no table": ("noisy.parquet", "PAR1 and no more", "cannot be read"),
    "a header only": ("noisy.csv", "prompt,completion\n", "noisy.csv"),
    "schemas that differ": (
        "noisy.jsonl",
        json.dumps(PAIR) + "\n" + json.dumps({"prompt": {"a": 1}, "completion": []}),
        "noisy.jsonl",
    ),
}


@pytest.mark.parametrize("command", ["run", "score"])
@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables(name, command, files, tmp_path):
    file, content, said = BAD_TABLES[name]
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    output = tmp_path / "out"
    if command == "run":
        result = call("run", *settings({**files, "noisy": path}, output))
    else:
        result = call("score", "--noisy", path, "--before", files["model"], "--output", output)
    refused(result, said)
    assert (
        not (output / "kept.jsonl").exists() and not Trace.exists(output) and not Trace.exists(output / "forgetfilter")
    )


@pytest.mark.parametrize("row", [{"prompt": "", "completion": ""}, {"prompt": "the cat", "completion": ""}])
def test_rows_of_which_nothing_counts_are_counted_and_kept(row, files, tmp_path):
    Dataset.from_list([*texts(12, seed=1), {**texts(1, seed=9)[0], **row}]).to_json(tmp_path / "noisy.jsonl")
    result = call("run", *settings({**files, "noisy": tmp_path / "noisy.jsonl"}, tmp_path / "out"), "--share", 0.25)
    assert result.exit_code == 0, result.output
    kept = [json.loads(line) for line in (tmp_path / "out" / "kept.jsonl").read_text().splitlines()]
    assert any(row.items() <= each.items() for each in kept)


def test_duplicate_rows_stay_apart(files, tmp_path):
    rows = texts(6, seed=1) * 2
    Dataset.from_list(rows).to_json(tmp_path / "noisy.jsonl")
    result = call("run", *settings({**files, "noisy": tmp_path / "noisy.jsonl"}, tmp_path / "out"), "--share", 0.25)
    assert result.exit_code == 0, result.output
    kept, removed = ((tmp_path / "out" / f"{name}.jsonl").read_text().splitlines() for name in ("kept", "removed"))
    assert len(kept) + len(removed) == 12


# ---- texts ----

TEXTS = {
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈",
    "right to left": "\u202eشكرا\u202c שלום",
    "NUL": "a\x00b",
    "escape sequences": "\x1b[2J\x1b]0;title\x07",
    "combining": "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L",
    "byte order mark": "\ufeffthe cat",
    "line ends": "a\r\nb\u2028c\x85d",
    "one character": "a",
    "very long": "the cat sat " * 3000,
    "special tokens": "<eos><|im_end|><s>",
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_all_kinds_come_out_as_they_came_in(name, finished, files, tmp_path, byte_tokenizer):
    """Read, encoded, scored, filtered and written."""
    rows = [*texts(11, seed=1), {"prompt": "the cat", "completion": TEXTS[name], "unsafe": True, "note": 11}]
    Dataset.from_list(rows).to_json(tmp_path / "noisy.jsonl", force_ascii=False)
    scored = call("score", "--noisy", tmp_path / "noisy.jsonl", "--before", files["model"], "--after", files["model"],
                  "--max-length", 64, "--output", tmp_path / "scored")  # fmt: skip
    assert scored.exit_code == 0, scored.output
    assert np.isfinite(Trace.open(tmp_path / "scored").losses()).all()
    filtered = call("filter", tmp_path / "scored", "--threshold", 0.1, "--output", tmp_path / "out")
    assert filtered.exit_code in (0, 3), filtered.output
    kept = [
        json.loads(line) for line in (tmp_path / "out" / "kept.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    assert {row["note"]: row for row in kept} == {row["note"]: row for row in rows}
    assert call("show", tmp_path / "scored", "--threshold", 0.1).exit_code == 0
    assert call("report", tmp_path / "scored", "--output", tmp_path / "page.html").exit_code == 0


def test_lone_surrogates_are_refused(files, tmp_path):
    (tmp_path / "noisy.jsonl").write_text('{"prompt": "a", "completion": "\\ud800"}\n' * 3)
    refused(call("run", *settings({**files, "noisy": tmp_path / "noisy.jsonl"}, tmp_path / "out")), "noisy.jsonl")
    with pytest.raises(ValueError, match="Row 0"):
        encode_rows([{"prompt": "a", "completion": "\ud800"}], load_tokenizer(files), disable_tqdm=True)


def load_tokenizer(files):
    from forgetfilter_callback.run import load_tokenizer

    return load_tokenizer(str(files["model"]))


# ---- values ----


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("measure", MEASURES)
def test_values_that_are_not_finite_are_kept_and_counted(measure, bad):
    values = np.array([0.0, 0.01, 0.02, bad, 3.0, 3.1])
    result = decide(pa.array(list("abcdef")), values, measure)
    assert not result.removed[3] and result.counts["unknown"] == 1
    with pytest.raises(ValueError, match="finite"):
        decide(pa.array(["a", "b"]), np.array([bad, bad]), measure)


@pytest.mark.parametrize("values", [[], [1.0], [0.3, 0.3], [0.0, 5.0], [1e300, -1e300], [5e-324, 0.0]])
@pytest.mark.parametrize("measure", MEASURES)
def test_few_and_extreme_values(measure, values):
    values = np.array(values)
    if len(values) == 0:
        with pytest.raises(ValueError):
            decide(pa.array([], pa.string()), values, measure)
        return
    result = decide(pa.array([f"{i}" for i in range(len(values))]), values, measure)
    assert result.removed.sum() < len(values)


def test_a_model_that_diverges_says_so_and_removes_nothing_for_it(files, tmp_path, byte_tokenizer):
    model = tiny_llama(vocab_size=len(byte_tokenizer))
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    model.save_pretrained(tmp_path / "diverged")
    byte_tokenizer.save_pretrained(tmp_path / "diverged")
    scored = call("score", "--noisy", files["noisy"], "--before", files["model"], "--after", tmp_path / "diverged",
                  "--output", tmp_path / "scored")  # fmt: skip
    assert scored.exit_code == 0, scored.output
    refused(call("filter", tmp_path / "scored", "--output", tmp_path / "out"), "finite")
    assert not (tmp_path / "out").exists()
    doctor = call("doctor", tmp_path / "scored")
    assert doctor.exit_code == 0 and "not finite" in doctor.output


def test_a_row_of_a_hundred_thousand_tokens(byte_tokenizer):
    rows = encode_rows([{"text": "ab" * 50_000}, {"text": "the cat"}], byte_tokenizer, 64, disable_tqdm=True)
    assert rows.truncated == 1 and len(rows.sample(0)[0]) == 64
    assert np.isfinite(token_losses(tiny_llama(vocab_size=len(byte_tokenizer)), rows, disable_tqdm=True)).all()


# ---- traces ----


def edit(folder: Path, **changes: object) -> None:
    file = folder / "forgetfilter" / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (manifest | changes).items() if value != "DELETED"}))


DAMAGES = {
    "a newer version": lambda out: edit(out, schema_version=99),
    "no version": lambda out: edit(out, schema_version="DELETED"),
    "a version that is a text": lambda out: edit(out, schema_version="one"),
    "another fingerprint": lambda out: edit(out, fingerprint="0" * 32),
    "no sessions": lambda out: edit(out, sessions="DELETED"),
    "a manifest that is a list": lambda out: (out / "forgetfilter" / "manifest.json").write_text("[]"),
    "an empty manifest": lambda out: (out / "forgetfilter" / "manifest.json").write_text(""),
    "no rows": lambda out: (out / "forgetfilter" / "rows.parquet").unlink(),
    "rows cut off": lambda out: cut(out / "forgetfilter" / "rows.parquet"),
    "rows of another trace": lambda out: swap_rows(out),
    "a record cut off": lambda out: cut(last_record(out)),
    "an empty record": lambda out: last_record(out).write_bytes(b""),
    "a record of other data": lambda out: other_record(out),
    "no manifest": lambda out: (out / "forgetfilter" / "manifest.json").unlink(),
}


def last_record(out: Path) -> Path:
    return sorted((out / "forgetfilter" / "records").glob("S1+*"))[-1]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def swap_rows(out: Path) -> None:
    trace = Trace.open(out / "forgetfilter")
    Trace.create(out / "other", trace.rows.select([0, 1, 2]), "m", None, None)
    shutil.copyfile(out / "other" / "rows.parquet", trace.folder / "rows.parquet")


def other_record(out: Path) -> None:
    trace = Trace.open(out / "forgetfilter")
    rows = trace.rows.select([0, 1, 2])
    other = Trace.create(out / "other", rows, "m", None, None)
    other.append(Record("S1+", 0), [Scores(np.ones(rows.counted_offsets[-1], np.float32))])
    shutil.copyfile(out / "other" / "records" / Record("S1+", 0).file_name, last_record(out))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_traces_are_refused_by_every_command(damage, run_folder, tmp_path):
    DAMAGES[damage](run_folder)
    output = tmp_path / "new"
    refused(call("doctor", run_folder))
    refused(call("show", run_folder))
    refused(call("report", run_folder, "--output", tmp_path / "page.html"))
    refused(call("filter", run_folder, "--output", output))
    assert not output.exists() and not (tmp_path / "page.html").exists()
    with pytest.raises(TraceError):
        Trace.open(run_folder / "forgetfilter").forgetting()


def test_a_missing_record_is_told(run_folder):
    (run_folder / "forgetfilter" / "records" / Record("S1+", 0).file_name).unlink()
    refused(call("show", run_folder), "no record at step 0")
    assert "no record at step 0" in call("doctor", run_folder).output


def test_a_sound_trace_is_sound(finished):
    result = call("doctor", finished)
    assert result.exit_code == 0 and result.output.strip().endswith("is sound.")
    assert json.loads(call("doctor", finished, "--json").stdout) == {"problems": [], "notes": []}


def test_rows_that_a_trace_does_not_know(finished, files, tmp_path):
    Dataset.from_list(texts(12, seed=77)).to_json(tmp_path / "others.jsonl")
    refused(
        call("filter", finished, "--noisy", tmp_path / "others.jsonl", "--output", tmp_path / "out"), "not the rows"
    )
    assert not (tmp_path / "out").exists()


# ---- arguments ----

ARGUMENTS = [
    ("--epochs", "0"), ("--epochs", "-1"), ("--epochs", "many"), ("--safety-epochs", "0"), ("--learning-rate", "0"),
    ("--learning-rate", "nan"), ("--batch-size", "0"), ("--lora-r", "-1"), ("--max-length", "0"), ("--share", "0"),
    ("--share", "1"), ("--share", "nan"), ("--threshold", "nan"), ("--threshold", "high"), ("--measure", "vibes"),
    ("--measure", "rouge1"), ("--dtype", "float13"), ("--seed", "-5"), ("--records", "0"), ("--model", "no/such-model"),
    ("--record-steps", "-1"), ("--record-steps", "1.5"), ("--epochs", "inf"), ("--learning-rate", "inf"),
    ("--noisy", "no-such-file.jsonl"), ("--safety", "no-such-file.jsonl"), ("--colour", "red"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), ARGUMENTS)
def test_arguments_that_make_no_sense(flag, value, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("run", *settings(files, tmp_path / "out"), flag, value)
    refused(result)
    assert not (tmp_path / "out" / "kept.jsonl").exists()


def test_a_bare_call_with_wrong_things(byte_tokenizer, noisy):
    for value in (None, 5, "text", [1, 2], [["prompt"]]):
        with pytest.raises(EncodingError):
            encode_rows(value, byte_tokenizer, disable_tqdm=True)
    for wrong in ({"audit_column": "no such"}, {"max_length": -1}, {"batch_tokens": 0}, {"record_steps": float("nan")},
                  {"max_new_tokens": 0}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ForgetTracker(noisy, **wrong)
    with pytest.raises(ValueError, match="audit_column"):
        ForgetTracker([], audit_column="unsafe")
    with pytest.raises(ValueError, match="holds text"):
        ForgetTracker([{"input_ids": [1], "unsafe": "False"}], audit_column="unsafe")


def test_tokens_beyond_the_vocabulary():
    rows = encode_rows([{"input_ids": [1, 2, 99_999]}], disable_tqdm=True)
    with pytest.raises(EncodingError, match="vocabulary of 128"):
        token_losses(tiny_llama(), rows, disable_tqdm=True)


@pytest.mark.parametrize("name", ["data[1].jsonl", "NOISY.JSONL", "ro ws*.jsonl"])
def test_file_names_that_mean_something_else_elsewhere(name, tmp_path):
    (tmp_path / name).write_text(json.dumps(PAIR) + "\n")
    assert load_rows(tmp_path / name).to_list() == [PAIR]


def test_a_filter_without_anything_to_filter_by(noisy, make_args):
    with pytest.raises(ValueError, match="nothing to filter by"):
        FilteredTrainer(tiny_llama(), make_args(), train_dataset=noisy, share=0.2)
