"""A command that fails before its first record leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from helpers import call, run_options, texts
from transformers import Trainer

from forgetfilter_callback import RunConfig, Trace
from forgetfilter_callback.callbacks import recorder
from forgetfilter_callback.pipeline import checkpoints, outputs
from forgetfilter_callback.pipeline import run as run_module


def fail(*arguments: object, **more: object) -> None:
    raise MemoryError("no room")


def interrupt(*arguments: object, **more: object) -> None:
    raise KeyboardInterrupt


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


@pytest.mark.parametrize("stop", [fail, interrupt])
@pytest.mark.parametrize("place", [(run_module, "load_model"), (recorder, "window_scores")])
def test_a_run_that_fails_before_its_first_record_leaves_nothing(place, stop, files, tmp_path, monkeypatch):
    """Without a model, and with the trace of the encoded rows already written. The next run may be one on other rows."""
    with monkeypatch.context() as patch:
        patch.setattr(*place, stop)
        assert call("run", *run_options(files, tmp_path / "out")).exit_code != 0
        assert not (tmp_path / "out").exists()
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("mine")
        assert call("run", *run_options(files, tmp_path / "mine")).exit_code != 0
        assert [*contents(tmp_path / "mine")] == [tmp_path / "mine" / "notes.txt"]
    Dataset.from_list(texts(12, seed=5)).to_json(tmp_path / "others.jsonl")
    options = run_options({**files, "noisy": tmp_path / "others.jsonl"}, tmp_path / "out")
    assert call("run", *options, "--fraction", 0.25).exit_code == 0


@pytest.mark.parametrize("stop", [fail, interrupt])
@pytest.mark.parametrize("command", ["run", "score"])
def test_files_that_others_write_meanwhile_are_kept(command, stop, files, tmp_path, monkeypatch):
    """The output folder may be the working directory."""
    output = tmp_path / "out"

    def write_and_stop(*arguments: object, **more: object) -> None:
        for name in ("notes.txt", "folder/notes.txt", "_forgetfilter/notes.txt", "sessions/notes.txt"):
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_text("mine")
        (output / "empty").mkdir(exist_ok=True)
        stop()

    monkeypatch.setattr(recorder if command == "run" else checkpoints, "window_scores", write_and_stop)
    score = ("score", "--noisy", files["noisy"], "--before", files["model"], "--output", output)
    assert call(*(score if command == "score" else ("run", *run_options(files, output)))).exit_code != 0
    names = ["_forgetfilter/notes.txt", "folder/notes.txt", "notes.txt", "sessions/notes.txt"]
    assert sorted(str(file.relative_to(output)) for file in output.rglob("*") if file.is_file()) == names
    assert (output / "empty").is_dir() and not (output / "records").exists()


def test_files_with_the_names_of_a_trace_are_kept(files, tmp_path):
    for name in ("rows.parquet", "records/mine.parquet"):
        folder = tmp_path / name.partition(".")[0].replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"mine")
        result = call("score", "--noisy", files["noisy"], "--before", files["model"], "--output", folder)
        assert result.exit_code == 2 and "hoose another folder" in result.output
        assert [*contents(folder).items()] == [(folder / name, b"mine")]


def test_a_run_that_fails_while_it_saves_the_model_is_resumed(files, tmp_path, monkeypatch):
    """The files of the model are not in the record yet, and no other run may take them for files from elsewhere."""
    output = tmp_path / "out"
    options = [*run_options(files, output), "--fraction", 0.25, "--refit"]

    def save_and_fail(trainer: Trainer, folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_model", save_and_fail)
        assert "no space left" in call("run", *options).output
    assert call("run", *options, "--resume").exit_code == 0
    assert (output / "model" / "adapter_model.safetensors").read_bytes() != b"half"
    (output / "model" / "notes.txt").write_text("mine")
    result = call("run", *options, "--overwrite")
    assert result.exit_code == 2 and "notes.txt would be overwritten" in result.output
    assert (output / "model" / "notes.txt").exists() and (output / "kept.jsonl").exists()


def test_a_filter_that_fails_leaves_the_record_of_outputs(finished_run, tmp_path, monkeypatch):
    """A file that the filter has not written must not become one of its own."""
    command = ("filter", finished_run, "--output", tmp_path, "--fraction", 0.25)
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "dataset_card", fail)
        assert call(*command).exit_code == 1
    assert [file for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    assert call(*command).exit_code == 0
    before = contents(tmp_path)
    monkeypatch.setattr(outputs, "dataset_card", fail)
    assert call(*command).exit_code == 1
    assert contents(tmp_path) == before


def test_a_failed_run_is_repeated_in_the_same_process(files, tmp_path, monkeypatch):
    """The error holds the tracker of the failed run, which holds its lock."""
    config = RunConfig(
        *(str(files[name]) for name in ("model", "noisy", "safety")), output=str(tmp_path / "out"), lora={"r": 4}
    )
    with monkeypatch.context() as patch:
        patch.setattr(recorder, "window_scores", fail)
        with pytest.raises(MemoryError) as error:
            run_module.run(config)
    assert len(run_module.run(config).ids) == 12 and error.value.__traceback__ is not None


def test_a_run_that_fails_later_keeps_its_records(files, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "find_forgotten", fail)
    assert call("run", *run_options(files, tmp_path / "out")).exit_code == 1
    assert len(Trace.open(tmp_path / "out" / "_forgetfilter").records()) == 4
    assert (tmp_path / "out" / "config.yaml").exists()
    before = contents(tmp_path / "out" / "_forgetfilter")
    monkeypatch.setattr(run_module, "load_model", fail)
    assert call("run", *run_options(files, tmp_path / "out"), "--resume").exit_code == 1
    assert contents(tmp_path / "out" / "_forgetfilter") == before


def test_a_filter_does_not_complete_a_run(files, tmp_path, monkeypatch, caplog):
    """It writes the same files, but its settings can be others than those of the run."""
    options = [*run_options(files, tmp_path / "out"), "--fraction", 0.25]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "find_forgotten", fail)
        assert call("run", *options).exit_code == 1
    assert call("filter", tmp_path / "out", "--output", tmp_path / "out", "--fraction", 0.5).exit_code == 0
    result = call("run", *options, "--resume")
    assert result.exit_code == 0 and "Removed 3 of 12" in result.stdout and "nothing was trained" not in caplog.text
    call("run", *options, "--resume")
    assert "is complete, so nothing was trained" in caplog.text


@pytest.mark.parametrize("stop", [fail, interrupt])
def test_a_score_that_fails_before_its_first_record_leaves_nothing(stop, files, tmp_path, monkeypatch):
    options = ("--noisy", files["noisy"], "--before", files["model"], "--output", tmp_path / "trace")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "window_scores", stop)
        assert call("score", *options).exit_code != 0
        assert not (tmp_path / "trace").exists()
    assert call("score", *options).exit_code == 0
    before = contents(tmp_path / "trace")
    monkeypatch.setattr(checkpoints, "window_scores", stop)
    assert call("score", *options, "--after", files["model"]).exit_code != 0
    assert contents(tmp_path / "trace") == before
