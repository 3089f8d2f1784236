"""A second run or filter into a folder overwrites nothing without a word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import call, refused, run_options

from forgetfilter_callback import FilterResult, Trace
from forgetfilter_callback.pipeline import forget_filter


@pytest.fixture
def output(finished_run, tmp_path) -> Path:
    """The output of a run, for tests that change it."""
    return Path(shutil.copytree(finished_run, tmp_path / "out"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def test_a_second_run_is_refused(output, files):
    before = contents(output)
    result = call("run", *run_options(files, output), "--fraction", 0.5)
    refused(result, "contains an earlier run.", "set `resume` to continue the run or `overwrite` to replace it")
    assert contents(output) == before


def test_a_second_run_replaces_the_first_when_told_so(output, files):
    before = Trace.open(output / "_forgetfilter").losses()
    checkpoint = output / "sessions" / "noisy" / "checkpoint-999"  # `--resume` must not find it later
    for folder in (output / "model", checkpoint):
        folder.mkdir(parents=True)
        (folder / "old.txt").write_text("old")
    options = [*run_options(files, output), "--training", "learning_rate=1e-2"]
    assert call("run", *options, "--fraction", 0.5, "--overwrite").exit_code == 0
    assert not (output / "model").exists() and not checkpoint.exists()
    assert len((output / "removed.jsonl").read_text().splitlines()) == 6
    settings = yaml.safe_load((output / "config.yaml").read_text())
    assert settings["training"]["learning_rate"] == 1e-2 and "overwrite" not in settings and "resume" not in settings
    second = Trace.open(output / "_forgetfilter")
    assert not np.array_equal(before[1], second.losses()[1])
    assert {file.name for file in (second.folder / "superseded").rglob("*.parquet")} >= {
        record.file_name for record in second.records() if record.step > 0
    }


def test_overwrite_keeps_the_inputs_of_the_new_run(output, files):
    shutil.copytree(files["model"], output / "model")
    before = contents(output)
    result = call("run", *run_options({**files, "model": output / "model"}, output), "--overwrite")
    refused(result, "belongs to the run that `overwrite` replaces")
    assert contents(output) == before
    refused(call("run", *run_options(files, output), "--overwrite", "--resume"), "Pass one of them")


def test_a_second_filter_says_what_it_replaces(output, tmp_path, caplog):
    command = ("filter", output, "--output", tmp_path / "filtered")
    assert call(*command, "--fraction", 0.25).exit_code == 0
    assert "replaced" not in caplog.text
    assert call(*command, "--fraction", 0.5).exit_code == 0
    assert f"an earlier filter in {tmp_path / 'filtered'} were replaced" in caplog.text
    assert FilterResult.load(tmp_path / "filtered" / "filter_result").counts["removed"] == 6


def test_a_second_score_says_what_it_replaces(files, tmp_path, caplog):
    command = ("score", "--noisy", files["noisy"], "--before", files["model"], "--output", tmp_path / "trace")
    assert call(*command).exit_code == 0
    assert "replaced" not in caplog.text
    assert call(*command).exit_code == 0
    assert "The trace already had a record of the model 'before'. It was replaced" in caplog.text
    assert [file.name for file in (tmp_path / "trace" / "superseded").rglob("*.parquet")] == ["safety-00000000.parquet"]


@pytest.mark.parametrize("name", ["kept.jsonl", "removed.jsonl", "card.md"])
@pytest.mark.parametrize("command", ["run", "run --overwrite", "filter"])
def test_files_from_elsewhere_are_not_overwritten(command, name, output, files, tmp_path):
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / name).write_text("mine")
    if command == "filter":
        result = call("filter", output, "--output", target, "--fraction", 0.25)
    else:
        result = call(*command.split(), *run_options(files, target))
    refused(result, f"{target / name} would be overwritten")
    assert contents(target) == {target / name: b"mine"}


@pytest.fixture
def interrupted(files, tmp_path, monkeypatch) -> Path:
    """The output of a run that failed at the beginning of its safety session."""

    def fail(*arguments: object) -> None:
        raise RuntimeError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(forget_filter.ForgetFilter, "safety_finetune", fail)
        assert call("run", *run_options(files, tmp_path / "out"), "--fraction", 0.25).exit_code == 1
    return tmp_path / "out"


def test_commands_say_how_to_continue_an_interrupted_run(interrupted, files, tmp_path):
    advice = f"The run in {interrupted} has not finished. Continue it: "
    for command in (
        ("show", interrupted),
        ("report", interrupted),
        ("filter", interrupted, "--output", tmp_path / "f"),
    ):
        result = call(*command)
        refused(result, advice)
        assert "Tracker" not in result.output and "resume_from_checkpoint" not in result.output
    refused(call("run", *run_options(files, interrupted), "--fraction", 0.25), "contains an earlier run")
    doctor = call("doctor", interrupted)
    assert doctor.exit_code == 0 and advice in doctor.output and "resume_from_checkpoint" not in doctor.output
    (note,) = [text for text in json.loads(call("doctor", interrupted, "--json").stdout)["notes"] if advice in text]
    typed = note.partition(advice)[2].split()
    assert typed[0] == "forgetfilter" and call(*typed[1:]).exit_code == 0
    assert call("show", interrupted).exit_code == 0
    assert advice not in call("doctor", interrupted).output


@pytest.mark.parametrize(
    ("scored", "missing"),
    [(["--base"], "before and of the model after"), (["--before"], "after"), (["--after"], "before")],
)
def test_commands_say_which_model_must_be_scored(scored, missing, files, tmp_path):
    models = [part for role in scored for part in (role, files["model"])]
    assert call("score", "--noisy", files["noisy"], *models, "--output", tmp_path / "trace").exit_code == 0
    result = call("show", tmp_path / "trace")
    refused(result, f"has no record of the model {missing} safety finetuning. Record it: forgetfilter score --noisy")
    typed = result.output.partition("Record it: ")[2].split()
    typed = [str(files["model"]) if part == "MODEL" else part for part in typed]
    assert call(*typed[1:]).exit_code == 0
    assert call("show", tmp_path / "trace", "--measure", "loss").exit_code == 0


def test_doctor_calls_a_folder_without_a_trace_no_trace(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        result = call("doctor", folder)
        refused(result, f"{folder} contains no trace")
        assert "problems" not in result.output
    (tmp_path / "file.json").write_text("{}")
    refused(call("doctor", tmp_path / "file.json"), "file.json is a file. Pass the folder of a trace.")
