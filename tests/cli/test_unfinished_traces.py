"""What commands say about a trace that is not complete: it is still being recorded, or a run was interrupted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import call, refused, run_options

from forgetfilter_callback.pipeline import forget_filter


@pytest.fixture
def output(finished_run, tmp_path) -> Path:
    """The output of a run, for tests that change it."""
    return Path(shutil.copytree(finished_run, tmp_path / "out"))


def fail(*arguments: object, **more: object) -> None:
    raise RuntimeError("interrupted")


def saving_options(files, output: Path) -> list[object]:
    return [*run_options(files, output), "--fraction", 0.25, "--training", "save_strategy=epoch"]


@pytest.fixture
def interrupted(files, tmp_path, monkeypatch) -> Path:
    """The output of a run that failed at the beginning of its safety session."""
    with monkeypatch.context() as patch:
        patch.setattr(forget_filter.ForgetFilter, "safety_finetune", fail)
        assert call("run", *saving_options(files, tmp_path / "out")).exit_code == 1
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
    refused(call("run", *saving_options(files, interrupted)), "contains an earlier run")
    doctor = call("doctor", interrupted)
    assert doctor.exit_code == 0 and doctor.output.startswith(f"The files are intact. {advice}"), doctor.output
    (note,) = [text for text in json.loads(call("doctor", interrupted, "--json").stdout)["notes"] if advice in text]
    typed = note.partition(advice)[2].split()
    assert typed[0] == "forgetfilter" and call(*typed[1:]).exit_code == 0
    assert call("show", interrupted).exit_code == 0
    assert call("doctor", interrupted).output == f"{interrupted} is complete, and its files are intact.\n"


def test_a_run_without_checkpoints_starts_again(files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(forget_filter.ForgetFilter, "safety_finetune", fail)
        assert call("run", *run_options(files, tmp_path / "out"), "--fraction", 0.25).exit_code == 1
    result = call("show", tmp_path / "out")
    refused(result, "so this command trains from the beginning: ")
    typed = result.output.partition("trains from the beginning: ")[2].split()
    assert call(*typed[1:]).exit_code == 0
    assert "is complete" in call("doctor", tmp_path / "out").output


def test_a_run_that_has_filtered_but_not_refitted_has_not_finished(files, tmp_path, monkeypatch):
    options = [*saving_options(files, tmp_path / "out"), "--refit"]
    with monkeypatch.context() as patch:
        patch.setattr(forget_filter.ForgetFilter, "refit", fail)
        assert call("run", *options).exit_code == 1
    assert (tmp_path / "out" / "kept.jsonl").exists()
    advice = f"The run in {tmp_path / 'out'} has not finished. Continue it: "
    doctor, show = call("doctor", tmp_path / "out"), call("show", tmp_path / "out")
    assert doctor.output.startswith(f"The files are intact. {advice}")
    assert show.exit_code == 0 and f"forgetfilter: {advice}" in show.stderr  # its records are complete
    assert call("run", *options, "--resume").exit_code == 0
    assert "is complete" in call("doctor", tmp_path / "out").output


RECORDER = """
import sys
from forgetfilter_callback import Trace
lock = Trace.lock(sys.argv[1])
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def recorded_elsewhere():
    """Lets another process hold the lock of a trace until the block ends, as a run does."""

    @contextmanager
    def record(folder: Path) -> Iterator[None]:
        command = [sys.executable, "-c", RECORDER, str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "locked\n"
            yield
            process.stdin.close()

    return record


def test_commands_say_that_a_run_is_still_going_on(interrupted, tmp_path, recorded_elsewhere):
    advice = (
        f"The run in {interrupted} is still going on in another process. Wait until it has finished, or end it. Then type "
        "this command again."
    )
    with recorded_elsewhere(interrupted / "_forgetfilter"):
        for command in (
            ("show", interrupted),
            ("report", interrupted),
            ("filter", interrupted, "--output", tmp_path / "f"),
            ("export", interrupted, "--output", tmp_path / "e"),
        ):
            result = call(*command)
            refused(result, advice)
            assert "--resume" not in result.output
        unfinished = interrupted / "_forgetfilter" / "records" / ".safety-00000000.parquet.1.tmp"
        unfinished.touch()  # the other process writes it
        doctor = call("doctor", interrupted)
        assert doctor.exit_code == 0 and doctor.output == f"The files are intact. {advice}\n"
    refused(call("show", interrupted), "Continue it")
    assert f"{unfinished} is an unfinished file of a process that has ended" in call("doctor", interrupted).output


def test_a_trace_that_another_process_extends(output, files, tmp_path, recorded_elsewhere):
    """What can be measured already is shown."""
    with recorded_elsewhere(output / "_forgetfilter"):
        result = call("show", output, "--json")
        assert result.exit_code == 0 and "is still going on" in result.stderr
    models = ("--base", files["model"])
    assert call("score", "--noisy", files["noisy"], *models, "--output", tmp_path / "trace").exit_code == 0
    with recorded_elsewhere(tmp_path / "trace"):
        refused(
            call("show", tmp_path / "trace"),
            f"{tmp_path / 'trace'} is being recorded by another process.",
            "A notebook in which training was interrupted locks the trace until it trains again or its kernel is restarted.",
        )
    assert call("show", output, "--json").stderr == ""


def test_a_run_that_has_just_begun(tmp_path, recorded_elsewhere):
    (tmp_path / "_forgetfilter").mkdir()
    with recorded_elsewhere(tmp_path / "_forgetfilter"):
        for command in ("show", "doctor"):
            refused(
                call(command, tmp_path), f"The run in {tmp_path} is still going on in another process, and it has no"
            )
    refused(call("show", tmp_path), "contains no trace")


def test_the_settings_of_another_program_are_no_run(output, tmp_path):
    """A trainer has written its trace beside a config.yaml that is not from `forgetfilter run`."""
    shutil.copytree(output / "_forgetfilter", tmp_path / "_forgetfilter")
    (tmp_path / "config.yaml").write_text("trainer: mine")
    for command in ("show", "doctor"):
        assert "forgetfilter run" not in call(command, tmp_path).output
    assert "is complete" in call("doctor", tmp_path).output


def test_a_session_of_a_trainer_that_ended_early(output, tmp_path):
    """It may be intended. A finished `forgetfilter run` can only have been stopped early on purpose."""
    for folder in (
        shutil.copytree(output, tmp_path / "run"),
        shutil.copytree(output / "_forgetfilter", tmp_path / "a"),
    ):
        file = next(folder.rglob("manifest.json"))
        manifest = json.loads(file.read_text())
        for session in manifest["sessions"]:
            session["max_steps"] = 100
        file.write_text(json.dumps(manifest))
    said = "The files are intact. The noisy session ended at step 12 of 100. If it was not stopped early on purpose, resume"
    assert call("doctor", tmp_path / "a").output.startswith(said)
    assert "is complete" in call("doctor", tmp_path / "run").output
    for record in (tmp_path / "a" / "records").glob("safety-*"):
        record.unlink()
    doctor = call("doctor", tmp_path / "a").output
    assert doctor.startswith("The files are intact. The trace in") and "records of noisy finetuning only" in doctor


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


def with_unknown_setting(settings: str) -> str:
    return f"{settings}new_setting: 1\n"


def damaged(settings: str) -> str:
    return f"[{settings}"


@pytest.mark.parametrize("change", [with_unknown_setting, damaged])
def test_the_settings_of_a_finished_run_may_be_those_of_another_version(change, output, finished, tmp_path):
    """Commands that read a trace need them only to find out whether the run finetunes on the kept rows."""
    refitted = Path(shutil.copytree(finished[0], tmp_path / "refitted"))
    for folder in (output, refitted):
        (folder / "config.yaml").write_text(change((folder / "config.yaml").read_text()))
        assert "is complete" in call("doctor", folder).output
        shown = call("show", folder, "--json")
        assert shown.exit_code == 0 and shown.stderr == ""
        filtered = call("filter", folder, "--output", tmp_path / f"{folder.name} filtered", "--fraction", 0.25)
        assert filtered.exit_code == 0, filtered.output
    record = refitted / ".forgetfilter-outputs.json"
    names = {name: digest for name, digest in json.loads(record.read_text()).items() if not name.startswith("model/")}
    record.write_text(json.dumps({**names, "model": None}))  # the run has ended while it saved the model
    assert "has not finished" in call("doctor", refitted).output
