"""A second run or filter into a folder overwrites nothing without a word."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers import call, refused, run_options

from forgetfilter_callback import FilterResult, Trace
from forgetfilter_callback.pipeline.output_record import FILTER_OUTPUTS


@pytest.fixture
def output(finished_run, tmp_path) -> Path:
    """The output of a run, for tests that change it."""
    return Path(shutil.copytree(finished_run, tmp_path / "out"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def test_a_second_run_is_refused(output, files):
    before = contents(output)
    result = call("run", *run_options(files, output), "--fraction", 0.5)
    refused(result, "contains an earlier run.", "pass `--resume` to continue the run or `--overwrite` to replace it")
    assert contents(output) == before


def test_a_second_run_replaces_the_first_when_told_so(finished, files, tmp_path):
    output = Path(shutil.copytree(finished[0], tmp_path / "out"))
    before = Trace.open(output / "_forgetfilter").losses()
    checkpoint = output / "sessions" / "noisy" / "checkpoint-999"  # `--resume` must not find it later
    checkpoint.mkdir(parents=True)
    mine = [output / name for name in ("notes.txt", "sessions/notes.txt", "filter_result/notes.txt")]
    for file in (checkpoint / "old.txt", *mine):
        file.write_text("mine")
    assert (output / "model" / "adapter_model.safetensors").exists()
    options = [*run_options(files, output), "--training", "learning_rate=1e-2"]
    assert call("run", *options, "--fraction", 0.5, "--overwrite").exit_code == 0
    assert not (output / "model").exists() and not checkpoint.exists()
    assert [file.read_text() for file in mine] == ["mine"] * 3
    assert len((output / "removed.jsonl").read_text().splitlines()) == 6
    settings = yaml.safe_load((output / "config.yaml").read_text())
    assert settings["training"]["learning_rate"] == 1e-2 and "overwrite" not in settings and "resume" not in settings
    second = Trace.open(output / "_forgetfilter")
    assert not np.array_equal(before[1], second.losses()[1])
    assert {file.name for file in (second.folder / "superseded").rglob("*.parquet")} >= {
        record.file_name for record in second.records() if record.step > 0
    }


def test_overwrite_keeps_the_inputs_of_the_new_run(finished, files, tmp_path):
    output = Path(shutil.copytree(finished[0], tmp_path / "out"))
    before = contents(output)
    result = call("run", *run_options({**files, "model": output / "model"}, output), "--overwrite")
    refused(result, "belongs to the run that `--overwrite` replaces")
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


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *itertools.product(("run", "run --overwrite", "filter"), (*FILTER_OUTPUTS, ".forgetfilter-outputs.json")),
        *itertools.product(("run --overwrite", "run --refit"), ("model/weights.bin", "sessions/noisy/checkpoint-1/a.bin")),
        ("run", "config.yaml"), ("run --overwrite", "config.yaml"), ("run --overwrite", "sessions/notes.txt"),
    ],
)  # fmt: skip
def test_files_from_elsewhere_are_not_overwritten(command, name, output, files, tmp_path):
    target = tmp_path / "elsewhere"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text("mine")
    if command == "filter":
        result = call("filter", output, "--output", target, "--fraction", 0.25)
    else:
        result = call(*command.split(), *run_options(files, target))
    named = target / "sessions" if name.startswith("sessions") else target / name
    refused(result, f"{named} cannot be read" if name.startswith(".") else f"{named} would be overwritten")
    assert contents(target) == {target / name: b"mine"}


@pytest.mark.parametrize("name", ["kept.jsonl", "card.md", "filter_result/values.parquet", "config.yaml"])
def test_an_output_that_was_changed_is_not_overwritten(name, output, files, finished_run):
    (output / name).write_bytes((finished_run / name).read_bytes() + b"# mine")
    before = contents(output)
    message = f"{output / name} would be overwritten, but it was changed after an earlier run"
    if name != "config.yaml":
        refused(call("filter", finished_run, "--output", output, "--fraction", 0.5), message)
    refused(call("run", *run_options(files, output), "--overwrite"), message)
    assert contents(output) == before


def test_the_settings_of_the_user_are_not_replaced(files, tmp_path):
    """`--config` may name a file in the output folder, with comments and with less than all settings."""
    settings = {**{name: str(files[name]) for name in ("model", "noisy", "safety")}, "output": str(tmp_path / "out")}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text(f"# mine\n{yaml.safe_dump(settings)}")
    before = contents(tmp_path / "out")
    for more in ((), ("--lora", 'target_modules=["nothing"]')):
        result = call("run", "--config", tmp_path / "out" / "config.yaml", *more)
        refused(result, "config.yaml would be overwritten, but no earlier run or filter has written it")
        assert contents(tmp_path / "out") == before


def test_a_run_that_fails_restores_the_settings_of_the_run_before(output, files):
    before = contents(output)
    wrong = ("--lora", 'target_modules=["nothing"]')
    result = call("run", *run_options(files, output), "--overwrite", *wrong)
    assert result.exit_code != 0 and "nothing" in result.output
    names = ("config.yaml", ".forgetfilter-outputs.json")
    assert [(output / name).read_bytes() for name in names] == [before[output / name] for name in names]
    assert call("run", *run_options(files, output), "--overwrite", "--fraction", 0.25).exit_code == 0


def test_a_record_of_outputs_from_elsewhere_deletes_nothing_else(output, files, tmp_path):
    """A folder of a run may come from another person."""
    (tmp_path / "notes.txt").write_text("mine")
    record = json.loads((output / ".forgetfilter-outputs.json").read_text())
    names = ["../notes.txt", str(tmp_path / "notes.txt"), "model/../../notes.txt", ".."]
    (output / ".forgetfilter-outputs.json").write_text(json.dumps({**record, **dict.fromkeys(names)}))
    assert call("run", *run_options(files, output), "--overwrite", "--fraction", 0.25).exit_code == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.fixture
def written(output, files, tmp_path) -> dict[str, tuple[Path, str]]:
    """Existing files, and why `report` and `export` do not replace them."""
    other = "exists, and it is not an earlier output of this command"
    (tmp_path / "mine.html").write_text("<!DOCTYPE html><title>mine</title>")
    return {
        "noisy": (files["noisy"], "is the noisy set and would be overwritten"),
        "safety": (files["safety"], other),
        "kept": (output / "kept.jsonl", other),
        "settings": (output / "config.yaml", other),
        "decision": (output / "filter_result" / "values.parquet", other),
        "rows": (output / "_forgetfilter" / "rows.parquet", "is in the folder of a trace"),
        "new record": (output / "_forgetfilter" / "records" / "noisy-00000001.parquet", "is in the folder of a trace"),
        "mine": (tmp_path / "mine.html", other),
        "folder": (tmp_path, other),
    }


@pytest.mark.parametrize("command", [("report",), ("export",), ("export", "--format", "parquet")], ids=" ".join)
def test_report_and_export_replace_only_their_own_output(command, written, output, files, tmp_path):
    before = contents(tmp_path) | contents(files["noisy"].parent)
    for file, message in written.values():
        refused(call(*command, output, "--output", file), f"{file} {message}")
    assert contents(tmp_path) | contents(files["noisy"].parent) == before
    (tmp_path / "link").symlink_to(files["noisy"])
    refused(call(*command, output, "--output", tmp_path / "link"), "is the noisy set")
    for settings in ((), ("--fraction", 0.5)):  # the second time, its own output is there
        assert call(*command, output, "--output", output / "new file", *settings).exit_code == 0
    other = "export" if command[0] == "report" else "report"
    refused(call(other, output, "--output", output / "new file"), "is not an earlier output of this command")
    assert contents(files["noisy"].parent).items() <= before.items()


def test_an_export_with_a_column_of_the_user_is_not_replaced(output, tmp_path):
    assert call("export", output, "--output", tmp_path / "rows.jsonl").exit_code == 0
    pd.read_json(tmp_path / "rows.jsonl", lines=True).assign(mine=1).to_json(
        tmp_path / "rows.jsonl", lines=True, orient="records"
    )
    before = contents(tmp_path)
    refused(call("export", output, "--output", tmp_path / "rows.jsonl"), "is not an earlier output of this command")
    assert contents(tmp_path) == before
