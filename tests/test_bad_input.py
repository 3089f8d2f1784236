"""What people give by mistake, by classes, through the command line and the library: a clear error or a counted warning, the
documented exit code, no traceback, and nothing half-written."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import texts, tiny_llama
from datasets import Dataset
from test_cli import call, settings

from forgetfilter_callback import FilteredTrainer, ForgetTracker, Trace, encode_rows
from forgetfilter_callback.data.loading import load_rows
from forgetfilter_callback.errors import EncodingError, TraceError
from forgetfilter_callback.filtering.find_forgotten import filter_by_values
from forgetfilter_callback.measures.names import MEASURES
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.scoring.token_losses import token_losses
from forgetfilter_callback.trace.records import Record


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    assert call("run", *settings(files, output), "--fraction", 0.25).exit_code == 0
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
    "ids in batches": ("noisy.jsonl", json.dumps({"input_ids": [[1, 2, 3]]}), "Row 0: `input_ids` is no list of whole"),
    "ids that are fractions": (
        "noisy.jsonl",
        json.dumps({"input_ids": [1.5, 2.0]}),
        "Row 0: `input_ids` is no list of whole",
    ),
    "ids that are null": ("noisy.jsonl", json.dumps({"input_ids": None}), "Row 0"),
    "ids that are too large": (
        "noisy.jsonl",
        json.dumps({"input_ids": [1, 3_000_000_000]}),
        "Row 0: `input_ids` run from",
    ),
    "ids below zero": ("noisy.jsonl", json.dumps({"input_ids": [1, -5]}), "Row 0: `input_ids` run from -5"),
    "tools that are no JSON": (
        "noisy.jsonl",
        json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": "nope"}),
        "Row 0",
    ),
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
        not (output / "kept.jsonl").exists() and not Trace.exists(output) and not Trace.exists(output / "_forgetfilter")
    )


def test_a_folder_that_is_no_dataset(files, tmp_path):
    Dataset.from_list([PAIR]).save_to_disk(tmp_path / "rows")
    (tmp_path / "rows" / "state.json").write_text("{}")
    refused(
        call("score", "--noisy", tmp_path / "rows", "--before", files["model"], "--output", tmp_path / "out"),
        "cannot be read",
    )


def test_a_chat_template_that_refuses_a_row(byte_tokenizer):
    picky = copy.deepcopy(byte_tokenizer)
    picky.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(EncodingError, match=r"Row 0: System role not supported \(TemplateError\)"):
        encode_rows([{"messages": [{"role": "system", "content": "a"}]}], picky, disable_tqdm=True)


def test_template_settings_that_only_some_rows_have(byte_tokenizer):
    polite = copy.deepcopy(byte_tokenizer)
    polite.chat_template = "{% for m in messages %}{{ m.content }}{% if loud %}!{% endif %}{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "a"}]}] * 2
    rows = Dataset.from_list([{**rows[0], "chat_template_kwargs": {"loud": True}}, rows[1]])
    assert rows[1]["chat_template_kwargs"] is None
    encoded = encode_rows(rows, polite, disable_tqdm=True)
    assert [polite.decode(encoded.sample(index)[0]) for index in range(2)] == ["a!", "a"]


@pytest.mark.parametrize("row", [{"prompt": "", "completion": ""}, {"prompt": "the cat", "completion": ""}])
def test_rows_of_which_nothing_counts_are_counted_and_kept(row, files, tmp_path):
    Dataset.from_list([*texts(12, seed=1), {**texts(1, seed=9)[0], **row}]).to_json(tmp_path / "noisy.jsonl")
    result = call("run", *settings({**files, "noisy": tmp_path / "noisy.jsonl"}, tmp_path / "out"), "--fraction", 0.25)
    assert result.exit_code == 0, result.output
    kept = [json.loads(line) for line in (tmp_path / "out" / "kept.jsonl").read_text().splitlines()]
    assert any(row.items() <= each.items() for each in kept)


def test_duplicate_rows_stay_apart(files, tmp_path):
    rows = texts(6, seed=1) * 2
    Dataset.from_list(rows).to_json(tmp_path / "noisy.jsonl")
    result = call("run", *settings({**files, "noisy": tmp_path / "noisy.jsonl"}, tmp_path / "out"), "--fraction", 0.25)
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
    from forgetfilter_callback.data.tokenizers import load_tokenizer

    return load_tokenizer(str(files["model"]))


# ---- values ----


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("measure", MEASURES)
def test_values_that_are_not_finite_are_kept_and_counted(measure, bad):
    values = np.array([0.0, 0.01, 0.02, bad, 3.0, 3.1])
    result = filter_by_values(pa.array(list("abcdef")), values, measure)
    assert not result.removed[3] and result.counts["unknown"] == 1
    with pytest.raises(ValueError, match="finite"):
        filter_by_values(pa.array(["a", "b"]), np.array([bad, bad]), measure)


@pytest.mark.parametrize("values", [[], [1.0], [0.3, 0.3], [0.0, 5.0], [1e300, -1e300], [5e-324, 0.0]])
@pytest.mark.parametrize("measure", MEASURES)
def test_few_and_extreme_values(measure, values):
    values = np.array(values)
    if len(values) == 0:
        with pytest.raises(ValueError):
            filter_by_values(pa.array([], pa.string()), values, measure)
        return
    result = filter_by_values(pa.array([f"{i}" for i in range(len(values))]), values, measure)
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
    file = folder / "_forgetfilter" / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (manifest | changes).items() if value != "DELETED"}))


DAMAGES = {
    "a newer version": lambda out: edit(out, schema_version=99),
    "no version": lambda out: edit(out, schema_version="DELETED"),
    "a version that is a text": lambda out: edit(out, schema_version="one"),
    "another fingerprint": lambda out: edit(out, fingerprint="0" * 32),
    "no sessions": lambda out: edit(out, sessions="DELETED"),
    "a manifest that is a list": lambda out: (out / "_forgetfilter" / "manifest.json").write_text("[]"),
    "an empty manifest": lambda out: (out / "_forgetfilter" / "manifest.json").write_text(""),
    "no rows": lambda out: (out / "_forgetfilter" / "rows.parquet").unlink(),
    "rows cut off": lambda out: cut(out / "_forgetfilter" / "rows.parquet"),
    "rows of another trace": lambda out: swap_rows(out),
    "a record cut off": lambda out: cut(last_record(out)),
    "an empty record": lambda out: last_record(out).write_bytes(b""),
    "a record of other data": lambda out: other_record(out),
    "no samples": lambda out: edit(out, samples="DELETED"),
    "other samples": lambda out: edit(out, samples=999_999),
    "fewer counted tokens": lambda out: edit(out, loss_tokens=-1),
    "no tokenizer": lambda out: edit(out, tokenizer="DELETED"),
    "a version before the first": lambda out: edit(out, schema_version=-3),
    "sessions that are none": lambda out: edit(out, sessions=[{}]),
    "rows without a column": lambda out: edit_rows(out, lambda table: table.drop_columns("loss_mask")),
    "rows that are no lists": lambda out: edit_rows(out, lambda table: replaced(table, "input_ids", table["id"])),
    "rows with gaps": lambda out: edit_rows(out, with_gaps),
    "a record of texts": lambda out: edit_record(out, lambda losses: pa.array(["a"] * len(losses))),
    "a record with gaps": lambda out: edit_record(
        out, lambda losses: pa.array([None, *losses.to_pylist()[1:]], losses.type)
    ),
    "no manifest": lambda out: (out / "_forgetfilter" / "manifest.json").unlink(),
}


def replaced(table: pa.Table, name: str, column: object) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def with_gaps(table: pa.Table) -> pa.Table:
    rows = table["input_ids"].to_pylist()
    return replaced(table, "input_ids", pa.array([[None, *rows[0][1:]], *rows[1:]], table["input_ids"].type))


def edit_rows(out: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    file = out / "_forgetfilter" / "rows.parquet"
    pq.write_table(change(pq.read_table(file)), file)


def edit_record(out: Path, change: Callable[[pa.Array], pa.Array]) -> None:
    table = pq.read_table(last_record(out))
    pq.write_table(replaced(table, "loss", change(table["loss"].combine_chunks())), last_record(out))


def last_record(out: Path) -> Path:
    return sorted((out / "_forgetfilter" / "records").glob("S1+*"))[-1]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def swap_rows(out: Path) -> None:
    trace = Trace.open(out / "_forgetfilter")
    Trace.create(out / "other", trace.rows.select([0, 1, 2]), "m", None, None)
    shutil.copyfile(out / "other" / "rows.parquet", trace.folder / "rows.parquet")


def other_record(out: Path) -> None:
    trace = Trace.open(out / "_forgetfilter")
    rows = trace.rows.select([0, 1, 2])
    other = Trace.create(out / "other", rows, "m", None, None)
    other.append(Record("safety", 0), [Scores(np.ones(rows.loss_offsets[-1], np.float32))])
    shutil.copyfile(out / "other" / "records" / Record("safety", 0).file_name, last_record(out))


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
        Trace.open(run_folder / "_forgetfilter").forgetting()


def test_a_missing_record_is_told(run_folder):
    (run_folder / "_forgetfilter" / "records" / Record("safety", 0).file_name).unlink()
    refused(call("show", run_folder), "no record at step 0")
    refused(call("doctor", run_folder), "no record at step 0")


def test_a_trace_without_its_folder_of_records_is_told(run_folder):
    shutil.rmtree(run_folder / "_forgetfilter" / "records")
    refused(call("show", run_folder), "the session on the noisy set only")
    assert "There are no records yet" in call("doctor", run_folder).output


def test_rows_that_are_not_what_their_ids_say_are_found_out(run_folder):
    edit_rows(
        run_folder,
        lambda table: replaced(
            table,
            "input_ids",
            pa.array([[7] * len(row) for row in table["input_ids"].to_pylist()], table["input_ids"].type),
        ),
    )
    refused(call("doctor", run_folder), "rows are not what their ids say")


def test_a_page_of_a_record_that_has_rotted_is_found_out(run_folder):
    file = last_record(run_folder)
    content = bytearray(file.read_bytes())
    content[40] ^= 1  # in the first page
    file.write_bytes(content)
    refused(call("doctor", run_folder), "record")


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
    ("--learning-rate", "nan"), ("--batch-size", "0"), ("--lora-r", "-1"), ("--max-length", "0"), ("--fraction", "0"),
    ("--fraction", "1"), ("--fraction", "nan"), ("--threshold", "nan"), ("--threshold", "high"), ("--measure", "vibes"),
    ("--measure", "rouge1"), ("--dtype", "float13"), ("--seed", "-5"), ("--model", "no/such-model"),
    ("--record-steps", "-1"), ("--record-steps", "1.5"), ("--epochs", "inf"), ("--learning-rate", "inf"),
    ("--noisy", "no-such-file.jsonl"), ("--safety", "no-such-file.jsonl"), ("--colour", "red"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), ARGUMENTS)
def test_arguments_that_make_no_sense(flag, value, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("run", *settings(files, tmp_path / "out"), flag, value)
    refused(result)
    named = value if "no-such" in value or "no/such" in value else flag.removeprefix("--").replace("-", ".")
    assert re.search(rf"\b{named}\b", result.output), result.output  # `safety-epochs` or `safety_epochs`
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
        FilteredTrainer(tiny_llama(), make_args(), train_dataset=noisy, fraction=0.2)
