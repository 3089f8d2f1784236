"""Mistakes in tables, texts and arguments: a clear error or a counted warning, the documented exit code, no traceback."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from datasets import Dataset
from helpers import PAIR, call, refused, run_options, texts, tiny_llama

from forgetfilter_callback import ForgetTracker, RunConfig, Trace, encode_rows
from forgetfilter_callback.data.encode_collated import encode_collated
from forgetfilter_callback.errors import EncodingError
from forgetfilter_callback.pipeline import run as run_module
from forgetfilter_callback.pipeline.checkpoints import score_source


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
    "null for `text`": ("noisy.jsonl", json.dumps({"text": None}), "Row 0: `text` must be text, but it is None"),
    "messages without roles": ("noisy.jsonl", json.dumps({"messages": [{"content": "a"}]}), "Row 0"),
    "messages that are a text": ("noisy.jsonl", json.dumps({"messages": "hello"}), "Row 0"),
    "no messages": ("noisy.jsonl", json.dumps({"messages": []}), "Row 0"),
    "a list of numbers": ("noisy.json", "[1, 2, 3]", "noisy.json"),
    "no JSON": ("noisy.json", "hello", "cannot be read"),
    "not UTF-8": ("noisy.jsonl", b'{"prompt": "\xff\xfe", "completion": "a"}', "cannot be read"),
    "ids in batches": (
        "noisy.jsonl",
        json.dumps({"input_ids": [[1, 2, 3]]}),
        "Row 0: `input_ids` must be a list of integers",
    ),
    "ids that are fractions": (
        "noisy.jsonl",
        json.dumps({"input_ids": [1.5, 2.0]}),
        "Row 0: `input_ids` must be a list of integers",
    ),
    "ids that are null": ("noisy.jsonl", json.dumps({"input_ids": None}), "Row 0"),
    "ids that are too large": (
        "noisy.jsonl",
        json.dumps({"input_ids": [1, 3_000_000_000]}),
        "Row 0: `input_ids` must be between 0 and 2**31 - 1, but they range from 1 to 3000000000",
    ),
    "ids below zero": (
        "noisy.jsonl",
        json.dumps({"input_ids": [1, -5]}),
        "Row 0: `input_ids` must be between 0 and 2**31 - 1, but they range from -5",
    ),
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
def test_bad_tables_are_refused(name, command, files, tmp_path):
    file, content, said = BAD_TABLES[name]
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    output = tmp_path / "out"
    if command == "run":
        result = call("run", *run_options({**files, "noisy": path}, output))
    else:
        result = call("score", "--noisy", path, "--before", files["model"], "--output", output)
    refused(result, said)
    assert (
        not (output / "kept.jsonl").exists() and not Trace.exists(output) and not Trace.exists(output / "_forgetfilter")
    )


def test_a_folder_that_is_not_a_dataset_is_refused(files, tmp_path):
    Dataset.from_list([PAIR]).save_to_disk(tmp_path / "rows")
    (tmp_path / "rows" / "state.json").write_text("{}")
    refused(
        call("score", "--noisy", tmp_path / "rows", "--before", files["model"], "--output", tmp_path / "out"),
        "cannot be read",
    )


@pytest.mark.parametrize("row", [{"prompt": "", "completion": ""}, {"prompt": "the cat", "completion": ""}])
def test_rows_without_loss_tokens_are_kept(row, files, tmp_path):
    Dataset.from_list([*texts(12, seed=1), {**texts(1, seed=9)[0], **row}]).to_json(tmp_path / "noisy.jsonl")
    result = call(
        "run", *run_options({**files, "noisy": tmp_path / "noisy.jsonl"}, tmp_path / "out"), "--fraction", 0.25
    )
    assert result.exit_code == 0, result.output
    kept = [json.loads(line) for line in (tmp_path / "out" / "kept.jsonl").read_text().splitlines()]
    assert any(row.items() <= each.items() for each in kept)


def test_duplicate_rows_are_separate_samples(files, tmp_path):
    rows = texts(6, seed=1) * 2
    Dataset.from_list(rows).to_json(tmp_path / "noisy.jsonl")
    result = call(
        "run", *run_options({**files, "noisy": tmp_path / "noisy.jsonl"}, tmp_path / "out"), "--fraction", 0.25
    )
    assert result.exit_code == 0, result.output
    kept, removed = ((tmp_path / "out" / f"{name}.jsonl").read_text().splitlines() for name in ("kept", "removed"))
    assert len(kept) + len(removed) == 12


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
def test_texts_of_all_kinds_are_written_unchanged(name, finished_run, files, tmp_path, byte_tokenizer):
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
    refused(call("run", *run_options({**files, "noisy": tmp_path / "noisy.jsonl"}, tmp_path / "out")), "noisy.jsonl")
    with pytest.raises(ValueError, match="Row 0"):
        encode_rows([{"prompt": "a", "completion": "\ud800"}], load_tokenizer(files), disable_tqdm=True)


def load_tokenizer(files):
    from forgetfilter_callback.data.tokenizers import load_tokenizer

    return load_tokenizer(str(files["model"]))


ARGUMENTS = [
    ("--max-length", "0"), ("--fraction", "0"), ("--fraction", "1"), ("--fraction", "nan"), ("--threshold", "nan"),
    ("--threshold", "high"), ("--threshold", "inf"), ("--measure", "vibes"), ("--measure", "rouge1"),
    ("--dtype", "float13"), ("--model", "no/such-model"), ("--record-steps", "-1"), ("--record-steps", "1.5"),
    ("--noisy", "no-such-file.jsonl"), ("--safety", "no-such-file.jsonl"), ("--colour", "red"),
]  # fmt: skip
NOT_POSITIVE = ("0", "-1", "many", "nan", "inf", "NaN", "Infinity", "null", "true", "[1]")
FIELDS = [
    *(("--training", "num_train_epochs", value) for value in NOT_POSITIVE),
    *(("--training", "learning_rate", value) for value in NOT_POSITIVE),
    *(("--training", "per_device_train_batch_size", value) for value in (*NOT_POSITIVE, "2.5")),
    *(("--training", "gradient_accumulation_steps", value) for value in (*NOT_POSITIVE, "2.5")),
    *(("--training", "seed", value) for value in ("-5", "4294967296", "many", "nan", "1.5", "null")),
    *(("--safety-training", "num_train_epochs", value) for value in NOT_POSITIVE),
    *(("--safety-training", "learning_rate", value) for value in NOT_POSITIVE),
    *(("--lora", "r", value) for value in (*NOT_POSITIVE, "2.5")),
    ("--training", "weight_decay", "much"), ("--training", "bf16", "maybe"), ("--training", "save_strategy", "sometimes"),
    ("--training", "colour", "red"), ("--safety-training", "colour", "red"), ("--lora", "colour", "red"),
    ("--lora", "init_lora_weights", "gausian"), ("--lora", "init_lora_weights", "pissa_niter_many"),
    ("--lora", "init_lora_weights", "5"), ("--lora", "bias", "nne"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), ARGUMENTS)
def test_invalid_command_line_arguments_are_refused(flag, value, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "load_model", fail)
    result = call("run", *run_options(files, tmp_path / "out"), flag, value)
    refused(result)
    named = value if "no-such" in value or "no/such" in value else flag.removeprefix("--").replace("-", ".")
    assert re.search(rf"\b{named}\b", result.output), result.output  # `max-length` or `max_length`
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flag", "field", "value"), FIELDS)
def test_invalid_training_and_lora_fields_are_refused(flag, field, value, files, tmp_path, monkeypatch):
    """In one line, before a model is loaded and before anything is written; on the command line and in a file."""
    monkeypatch.setattr(run_module, "load_model", fail)
    section = flag.removeprefix("--").replace("-", "_")
    options = run_options(files, tmp_path / "out")
    with_flag = call("run", *options, flag, f"{field}={value}")
    (tmp_path / "config.yaml").write_text(f"{section}: {{{field}: {'.' if value in ('nan', 'inf') else ''}{value}}}\n")
    required = [
        option for option in options if option != "--training" and "=" not in str(option) and option != "--lora"
    ]
    with_file = call("run", *required, "--config", tmp_path / "config.yaml")
    named = value if field == "save_strategy" else field  # `transformers` names only the value
    for result in (with_flag, with_file):
        refused(result, f"forgetfilter: {section}")
        assert re.search(rf"\b{named}\b", result.output) and result.output.count("\n") == 1, result.output
    assert not (tmp_path / "out").exists()


def fail(*arguments: object) -> None:
    raise AssertionError("the model was loaded")


def test_invalid_arguments_of_the_library_are_refused(byte_tokenizer, noisy):
    for value in (None, 5, "text", [1, 2], [["prompt"]]):
        with pytest.raises(EncodingError):
            encode_rows(value, byte_tokenizer, disable_tqdm=True)
    for wrong in ({"audit_column": "no such"}, {"max_length": -1}, {"batch_tokens": 0}, {"record_steps": float("nan")},
                  {"max_new_tokens": 0}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ForgetTracker(noisy, **wrong)


@pytest.mark.parametrize("max_length", [-1, 0, 1, 2.5, True, "9"])
def test_a_max_length_without_a_token_to_predict_is_refused(max_length, byte_tokenizer, noisy, collator):
    """Slicing by -1 would drop the last token of each row, and 0 all of them."""
    uses = (
        lambda: encode_rows([PAIR], byte_tokenizer, max_length),
        lambda: encode_collated(noisy, collator, tiny_llama(), max_length),
        lambda: ForgetTracker(max_length=max_length),
        lambda: RunConfig("m", "n", "s", "o", max_length=max_length),
        lambda: score_source("out", "noisy.jsonl", {"before": "m"}, max_length=max_length),
    )
    for use in uses:
        with pytest.raises(ValueError, match=f"max_length={max_length!r} must be a whole number of at least 2"):
            use()


@pytest.mark.parametrize("name", ["gpt2", 5, None], ids=repr)
def test_a_tokenizer_of_the_wrong_type_is_named(name):
    kind = "None" if name is None else f"of type {type(name).__name__}"
    message = (
        f"Row 0: rows of text require a tokenizer, but `processing_class` is {kind}. Pass a `PreTrainedTokenizerBase`"
    )
    with pytest.raises(EncodingError, match=message) as error:
        encode_rows([PAIR], name)
    assert "trainer" not in str(error.value)
