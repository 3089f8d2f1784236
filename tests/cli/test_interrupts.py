"""What a command says after Ctrl-C: what is on disk, and how to continue."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from helpers import call, refused, run_options

from forgetfilter_callback import Trace
from forgetfilter_callback.cli import export_command, run_commands, trace_commands
from forgetfilter_callback.pipeline import checkpoints, forget_filter, output_record
from forgetfilter_callback.pipeline import run as run_module
from forgetfilter_callback.pipeline.output_record import FILTER_OUTPUTS


def saving_options(files, output: Path) -> list[object]:
    return [*run_options(files, output), "--fraction", 0.25, "--training", "save_strategy=epoch"]


def interrupt(*arguments: object, **more: object) -> None:
    raise KeyboardInterrupt


def stopped(result) -> str:
    """What a command says after Ctrl-C: one line, and nothing on standard output."""
    assert result.exit_code == 130 and result.stdout == "" and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("forgetfilter: ")]
    assert result.stderr.endswith(f"{line}\n") and line.startswith("forgetfilter: Interrupted.")
    return line.removeprefix("forgetfilter: Interrupted.").strip()


def test_ctrl_c_in_a_run(files, tmp_path, monkeypatch):
    options = saving_options(files, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "load_inputs", interrupt)
        assert (
            stopped(call("run", *options))
            == "There was no record yet, so nothing was kept. Type the same command again."
        )
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(forget_filter.ForgetFilter, "safety_finetune", interrupt)
        kept, _, command = stopped(call("run", *options, "--json")).partition(" Continue it: ")
    assert kept == f"The finished records are kept. The run in {tmp_path / 'out'} has not finished."
    with monkeypatch.context() as patch:  # the other processes of `torchrun` are silent
        patch.setenv("RANK", "1")
        patch.setattr(run_module, "load_inputs", interrupt)
        result = call("run", *options, "--resume")
        assert result.exit_code == 130 and "Interrupted" not in result.output
    assert call(*command.split()[1:]).exit_code == 0


def test_ctrl_c_before_the_first_record_of_a_run_that_overwrites_another(finished_run, files, tmp_path, monkeypatch):
    """The settings on disk are those of the run before, so `--resume` would not continue this one."""
    output = Path(shutil.copytree(finished_run, tmp_path / "out"))
    options = [*run_options(files, output), "--overwrite", "--training", "learning_rate=7e-3"]
    monkeypatch.setattr(run_module, "load_model", interrupt)
    assert stopped(call("run", *options)) == "There was no new record yet. Type the same command again."
    assert (output / "config.yaml").read_bytes() == (finished_run / "config.yaml").read_bytes()


def test_ctrl_c_while_models_are_scored(files, tmp_path, monkeypatch):
    command = ("score", "--noisy", files["noisy"], "--before", files["model"], "--output", tmp_path / "trace")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "window_scores", interrupt)
        assert "nothing was kept" in stopped(call(*command))
        assert call(*command[:-1], tmp_path / "other").exit_code == 130
    score, roles = checkpoints.window_scores, []

    def interrupt_the_second(*arguments, **more):
        roles.append(more["description"])
        return score(*arguments, **more) if len(roles) == 1 else interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "window_scores", interrupt_the_second)
        said = stopped(call(*command, "--after", files["model"]))
    assert said.startswith("The finished records are kept. ")
    assert "has no record of the model after safety finetuning. Record it" in said
    monkeypatch.setattr(checkpoints, "window_scores", interrupt)
    said = stopped(call(*command, "--after", files["model"]))
    assert said == "There was no new record yet. Type the same command again."


def test_ctrl_c_after_all_is_written(files, finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = ("--before", files["model"])
    with monkeypatch.context() as patch:
        patch.setattr(Trace, "mean_losses", interrupt)
        assert stopped(call("score", "--noisy", files["noisy"], *models, "--output", "t")) == "Wrote the trace to t."
    for module, name in (
        (run_commands, "print_result"),
        (trace_commands, "print_result"),
        (trace_commands, "say"),
        (export_command, "say"),
    ):
        monkeypatch.setattr(module, name, interrupt)
    said = stopped(call("run", *run_options(files, tmp_path / "out"), "--json"))
    assert said == f"The run in {tmp_path / 'out'} is complete."
    written = ", ".join(str(Path("f") / name) for name in FILTER_OUTPUTS)
    assert stopped(call("filter", finished_run, "--fraction", 0.5, "--output", "f")) == f"Written: {written}."
    assert stopped(call("report", finished_run, "--output", "p.html")) == "Written: p.html."
    assert stopped(call("export", finished_run, "--output", "e", "--fraction", 0.5)) == "Written: e."


def test_ctrl_c_while_the_outputs_of_a_filter_are_hashed(finished_run, tmp_path, monkeypatch):
    """All of them are on disk, and the next filter must replace them."""
    command = ("filter", finished_run, "--output", tmp_path / "out", "--fraction")
    with monkeypatch.context() as patch:
        patch.setattr(output_record, "_digest", interrupt)
        assert stopped(call(*command, 0.25)).startswith("Written: ")
    assert len((tmp_path / "out" / "removed.jsonl").read_text().splitlines()) == 3
    again = call(*command, 0.5)
    assert again.exit_code == 0, again.output
    assert len((tmp_path / "out" / "removed.jsonl").read_text().splitlines()) == 6


def test_ctrl_c_between_two_outputs_of_a_filter(finished_run, tmp_path, monkeypatch):
    output = tmp_path / "out"
    command = ("filter", finished_run, "--output", output, "--fraction")
    assert call(*command, 0.25).exit_code == 0
    replace, kept = os.replace, output / "kept.jsonl"

    def interrupt_the_last(source: Path, target: Path) -> None:
        if target == kept:
            interrupt()
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt_the_last)
        said = stopped(call(*command, 0.5))
    assert said.startswith("Not all files were written, only ") and said.endswith(". Type the same command again.")
    assert str(output / "removed.jsonl") in said and str(kept) not in said
    before = kept.read_text()
    kept.write_text("mine")
    refused(call(*command, 0.5), f"{kept} would be overwritten, but it was changed after")
    kept.write_text(before)
    assert call(*command, 0.5).exit_code == 0
    assert len(kept.read_text().splitlines()) == len((output / "removed.jsonl").read_text().splitlines()) == 6


def test_ctrl_c_with_a_trace_that_cannot_be_read(files, tmp_path, monkeypatch):
    manifest = tmp_path / "out" / "_forgetfilter" / "manifest.json"

    def damage_and_interrupt(*arguments: object, **more: object) -> None:
        manifest.write_text("{")
        interrupt()

    monkeypatch.setattr(forget_filter.ForgetFilter, "safety_finetune", damage_and_interrupt)
    assert str(manifest.parent) in stopped(call("run", *saving_options(files, tmp_path / "out"), "--json"))


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("filter", "--output", "f"), "pipeline.outputs.find_forgotten"),
        (("report", "--output", "p.html"), "reports.review_page.decide"),
        (("export", "--output", "e", "--fraction", 0.5), "pipeline.export.find_forgotten"),
        (("show",), "reports.terminal.show"),
        (("doctor",), "trace.validate_trace.validate_trace"),
    ],
    ids=str,
)
def test_ctrl_c_in_commands_that_read_a_trace(command, name, finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"forgetfilter_callback.{name}", interrupt)
    writes = len(command) > 1
    assert stopped(call(command[0], finished_run, *command[1:])) == ("No file was written." if writes else "")
    assert [*tmp_path.iterdir()] == []


def test_ctrl_c_in_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr("forgetfilter_callback.cli.demo.run_demo", interrupt)
    output = tmp_path / "demo"
    said = stopped(call("demo", "--output", output))
    assert said == f"The demo cannot be continued. Delete {output}, or choose another --output, and start it again."
