"""`forgetfilter run`: files in, files out, exit codes."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import yaml
from datasets import Dataset
from helpers import call, random_rows, run_options, texts, tiny_llama
from transformers import Trainer

from forgetfilter_callback import RunConfig, Trace
from forgetfilter_callback.pipeline import run as run_module
from forgetfilter_callback.pipeline.cost_estimate import plan


def test_run_splits_the_rows_and_finetunes_on_the_rest(finished, files):
    output, result = finished
    assert result.exit_code == 0, result.output
    account = json.loads(result.stdout)
    rows = [json.loads(line) for line in files["noisy"].read_text().splitlines()]
    kept, removed = (
        [json.loads(line) for line in (output / name).read_text().splitlines()]
        for name in ("kept.jsonl", "removed.jsonl")
    )
    assert (account["samples"], account["removed"], account["kept"]) == (12, len(removed), len(kept)) == (12, 3, 9)
    values = Trace.open(output / "_forgetfilter").forgetting(account["measure"])
    most = set(np.argsort(-values)[:3].tolist())
    assert removed == [row for index, row in enumerate(rows) if index in most]
    assert kept == [row for index, row in enumerate(rows) if index not in most]
    assert (output / "model" / "adapter_model.safetensors").exists()
    assert "3 of 12 rows were removed" in (output / "card.md").read_text()


def test_the_written_configuration_reproduces_the_run(finished, files, tmp_path):
    output, _ = finished
    again = call("run", "--config", output / "config.yaml", "--output", tmp_path / "again", "--no-refit", "--json")
    assert again.exit_code == 0, again.output
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["training"]["learning_rate"] == 3e-2
    first, second = (Trace.open(folder / "_forgetfilter") for folder in (output, tmp_path / "again"))
    assert first.records() == second.records()
    np.testing.assert_array_equal(first.losses(), second.losses())
    assert (output / "kept.jsonl").read_bytes() == (tmp_path / "again" / "kept.jsonl").read_bytes()
    assert not (tmp_path / "again" / "model").exists()


@pytest.mark.parametrize(("safety_learning_rate", "alike"), [(3e-2, True), (9e-3, False)])
def test_the_safety_session_uses_the_noisy_settings_by_default(finished, files, tmp_path, safety_learning_rate, alike):
    flags = [*run_options(files, tmp_path), "--fraction", 0.25, "--safety-training"]
    flags += [f"learning_rate={safety_learning_rate}"]
    assert call("run", *flags).exit_code == 0
    first, second = (Trace.open(folder / "_forgetfilter").losses() for folder in (finished[0], tmp_path))
    np.testing.assert_array_equal(first[:2], second[:2])  # the noisy session
    assert (first == second).all() == alike


def test_dry_run_reports_the_cost_and_writes_nothing(files, tmp_path):
    result = call("run", *run_options(files, tmp_path / "out"), "--dry-run", "--json")
    cost = json.loads(result.stdout)
    assert result.exit_code == 0 and not (tmp_path / "out").exists()
    assert (cost["samples"], cost["safety_samples"], cost["steps"], cost["safety_steps"]) == (12, 6, 12, 4)
    result = call("run", *run_options(files, tmp_path / "out"), "--dry-run")
    of_time, of_memory = result.stdout.splitlines()
    assert "the whole run takes" in of_time and of_memory.startswith("The longest row has")
    made = RunConfig(*(str(files[name]) for name in ("model", "noisy", "safety")), output="out", record_steps=0.5)
    assert plan(made).records == 3 + 1 + 1


@pytest.fixture
def sizes(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of all training batches."""
    made: list[tuple[int, ...]] = []
    training_step = Trainer.training_step

    def remember(trainer, model, inputs, *more):
        made.append(tuple(inputs["input_ids"].shape))
        return training_step(trainer, model, inputs, *more)

    monkeypatch.setattr(Trainer, "training_step", remember)
    return made


@pytest.mark.parametrize("long_set", ["noisy", "safety"])
def test_dry_run_predicts_the_largest_batch(long_set, files, sizes, tmp_path, byte_tokenizer):
    """One row is much longer than all others. Truncated as advised, it is no longer."""
    given = {**files, long_set: tmp_path / "rows.jsonl"}
    rows = texts(12, seed=1) if long_set == "noisy" else texts(6, seed=2)
    Dataset.from_list([*rows, {**rows[0], "completion": " cat" * 50}]).to_json(given[long_set])
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 3}
    training = [argument for name, value in settings.items() for argument in ("--training", f"{name}={value}")]
    arguments = [*run_options(given, tmp_path / "out"), *training, "--fraction", 0.25]
    planned = json.loads(call("run", *arguments, "--dry-run", "--json").stdout)
    assert call("run", *arguments).exit_code == 0
    largest = max(sizes, key=math.prod)
    assert (planned["batch_rows"], planned["longest_row"]) == largest
    assert planned["logits_bytes"] == 4 * math.prod(largest) * len(byte_tokenizer)
    assert planned["long_rows"] == 1
    assert planned["peak_bytes"] > planned["logits_bytes"] and planned["seconds"] > 0
    told = call("run", *arguments, "--dry-run").stdout
    assert f"1 row is at least 1.5 times as long as all others: `--max-length {planned['other_rows']}`" in told
    assert "gradient_checkpointing=true" in told
    assert "On this machine, the whole run takes about" in told and "The tensors of training on it take about" in told
    sizes.clear()
    shorter = [*arguments, "--max-length", planned["other_rows"], "--training", "gradient_checkpointing=true"]
    again = call("run", *shorter, "--output", tmp_path / "again", "--dry-run").stdout
    assert call("run", *shorter, "--output", tmp_path / "again").exit_code == 0
    assert f"the largest batch then has {math.prod(max(sizes, key=math.prod))} tokens" in told
    assert "times as long" not in again and "gradient_checkpointing" not in again


def test_run_exits_with_3_when_not_separable(files, tmp_path):
    flags = run_options(files, tmp_path / "out")
    flags[flags.index("learning_rate=3e-2")] = "learning_rate=1e-6"  # nothing is learned, so nothing is forgotten
    result = call("run", *flags)
    assert result.exit_code == 3
    assert "Removed 0 of 12 rows: " in result.output and "nothing is removed" in result.output
    assert len((tmp_path / "out" / "kept.jsonl").read_text().splitlines()) == 12


def test_run_warns_about_each_set_once(files, tmp_path, caplog):
    for name, blank in (("noisy", 2), ("safety", 1)):
        rows = texts(12 if name == "noisy" else 6, seed=len(name))
        Dataset.from_list([row | {"completion": " "} if i < blank else row for i, row in enumerate(rows)]).to_json(
            tmp_path / f"{name}.jsonl"
        )
    given = {**files, "noisy": tmp_path / "noisy.jsonl", "safety": tmp_path / "safety.jsonl"}
    assert call("run", *run_options(given, tmp_path / "out"), "--fraction", 0.25).exit_code == 0
    messages = [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]
    warnings = [message.partition(" a completion")[0] for message in messages if "only white space" in message]
    assert warnings == [f"{given['safety']}: 1 of 6 rows has", "2 of 12 rows have"]


def test_other_failures_exit_with_1(files, tmp_path, monkeypatch):
    def full_disk(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_module, "load_inputs", full_disk)
    result = call("run", *run_options(files, tmp_path / "out"))
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "OSError: [Errno 28] No space left on device" in result.stderr


def test_output_lines_are_the_input_lines(files, tmp_path):
    """Dates, long floats and optional keys would change if rows were parsed and written again. A second run works too."""
    lines = [
        json.dumps({**row, "date": "2024-05-01 10:00:00", "x": 0.12345678901234566, **({"only": 1} if i == 3 else {})})
        for i, row in enumerate(texts(12, seed=1))
    ]
    (tmp_path / "noisy.jsonl").write_text("\n".join(lines) + "\n")
    given = {**files, "noisy": tmp_path / "noisy.jsonl"}
    assert call("run", *run_options(given, tmp_path / "out"), "--fraction", 0.25).exit_code == 0
    kept, removed = ((tmp_path / "out" / f"{name}.jsonl").read_text().splitlines() for name in ("kept", "removed"))
    assert sorted(kept + removed) == sorted(lines) and len(removed) == 3
    assert [line for line in lines if line in kept] == kept
    # A second round on the kept rows must not overwrite them.
    again = call(
        "run", *run_options({**files, "noisy": tmp_path / "out" / "kept.jsonl"}, tmp_path / "out"), "--fraction", 0.25
    )
    assert again.exit_code == 2 and "would be overwritten" in again.output
    assert (tmp_path / "out" / "kept.jsonl").read_text().splitlines() == kept


def test_a_run_on_other_rows_does_not_overwrite_an_earlier_run(files, tmp_path):
    assert call("run", *run_options(files, tmp_path / "out"), "--fraction", 0.25).exit_code == 0
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    Dataset.from_list(texts(12, seed=77)).to_json(tmp_path / "others.jsonl")
    result = call(
        "run", *run_options({**files, "noisy": tmp_path / "others.jsonl"}, tmp_path / "out"), "--fraction", 0.25
    )
    assert result.exit_code == 2 and "other rows" in result.output
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}


def test_dry_run_predicts_the_number_of_steps(files, tmp_path):
    Dataset.from_list(texts(13, seed=1)).to_json(tmp_path / "noisy.jsonl")
    given = {**files, "noisy": tmp_path / "noisy.jsonl"}
    arguments = [
        *run_options(given, tmp_path / "out"),
        "--training",
        "per_device_train_batch_size=4",
        "--training",
        "gradient_accumulation_steps=2",
        "--fraction",
        0.25,
    ]
    planned = json.loads(call("run", *arguments, "--dry-run", "--json").stdout)
    assert call("run", *arguments).exit_code == 0
    made = [entry["max_steps"] for entry in Trace.open(tmp_path / "out" / "_forgetfilter").manifest["sessions"]]
    assert [planned["steps"], planned["safety_steps"]] == made


@pytest.mark.parametrize("batch", [5, 20])
def test_dry_run_counts_no_batch_that_the_trainer_drops(batch, files, tmp_path, make_args, collator):
    Dataset.from_list(texts(13, seed=1)).to_json(tmp_path / "noisy.jsonl")
    options = {"per_device_train_batch_size": batch, "dataloader_drop_last": True, "num_train_epochs": 1}
    trainer = Trainer(tiny_llama(), make_args(**options), train_dataset=random_rows(13), data_collator=collator)
    batches = len(trainer.get_train_dataloader())
    training = [part for name, value in options.items() for part in ("--training", f"{name}={json.dumps(value)}")]
    given = run_options({**files, "noisy": tmp_path / "noisy.jsonl"}, tmp_path / "out")
    planned = json.loads(call("run", *given, *training, "--dry-run", "--json").stdout)
    assert batches == 13 // batch and planned["steps"] == max(batches, 1)


def test_truncated_rows_are_counted(files, tmp_path, caplog):
    long = {**texts(1, seed=3)[0], "completion": " cat" * 100}
    Dataset.from_list([*texts(11, seed=1), long]).to_json(tmp_path / "long.jsonl")
    given = {**files, "noisy": tmp_path / "long.jsonl"}
    assert call("run", *run_options(given, tmp_path / "out"), "--fraction", 0.25).exit_code == 0
    scored = call("score", "--noisy", given["noisy"], "--before", files["model"], "--output", tmp_path / "scored")
    assert scored.exit_code == 0
    assert caplog.text.count("1 of 12 rows was truncated on the right, to 64 tokens") == 2
    for folder in (tmp_path / "out" / "_forgetfilter", tmp_path / "scored"):
        assert Trace.open(folder).manifest["truncated"] == 1


def test_a_run_in_a_locked_folder_is_refused(finished, files):
    output, _ = finished
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file() and file.name != ".lock"}
    lock = output / "_forgetfilter" / ".lock"
    hold = "import filelock, sys; l = filelock.FileLock(sys.argv[1]); l.acquire(); print('held', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    result = call("run", *run_options(files, output), "--training", "seed=99")
    other.kill()
    other.wait()
    assert result.exit_code == 2 and "Another process is recording" in result.output
    assert before == {file: file.read_bytes() for file in output.rglob("*") if file.is_file() and file.name != ".lock"}


def test_a_file_that_changes_during_a_run_does_not_mix_up_rows(files, tmp_path, monkeypatch):
    noisy = tmp_path / "noisy.jsonl"
    noisy.write_text(files["noisy"].read_text())
    given = [json.loads(line) for line in noisy.read_text().splitlines()]
    decided = run_module.find_forgotten

    def decide_after_a_change(*arguments, **more):
        noisy.write_text("\n".join(reversed(noisy.read_text().splitlines())))
        return decided(*arguments, **more)

    monkeypatch.setattr(run_module, "find_forgotten", decide_after_a_change)
    result = call("run", *run_options({**files, "noisy": noisy}, tmp_path / "out"), "--fraction", 0.25, "--json")
    assert result.exit_code == 0, result.output
    values = Trace.open(tmp_path / "out" / "_forgetfilter").forgetting()
    most = np.argsort(-values)[:3].tolist()
    removed = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    assert removed == [row for index, row in enumerate(given) if index in most]


def test_the_safety_set_is_not_overwritten(files, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "kept.jsonl").write_text(files["safety"].read_text())
    result = call("run", *run_options({**files, "safety": output / "kept.jsonl"}, output))
    assert result.exit_code == 2 and "would be overwritten" in result.output
    assert (output / "kept.jsonl").read_text() == files["safety"].read_text()
