"""Wrong usage ends with exit code 2 and without a traceback; version and help."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from helpers import call, refused

from forgetfilter_callback.cli import trace_commands


RUN = ["run", "--model", "m", "--noisy", "n", "--safety", "s", "--output", "o"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--model", "m", "--noisy", "n"], "Missing settings: `--safety`, `--output`."),
        ([*RUN, "--training", "num_train_epochs=0"], "num_train_epochs=0 must be a finite number larger than 0"),
        ([*RUN, "--training", "num_train_epochs"], "'num_train_epochs' must be FIELD=VALUE"),
        ([*RUN, "--training", "bf16=no"], "bf16='no' must be true or false"),
        ([*RUN, "--lora", "init_lora_weights=No"], "init_lora_weights='No' must be true or false"),
        ([*RUN, "--training", "seed=true"], "seed=True must be a whole number from 0"),
        ([*RUN, "--training", "tf32=no"], "tf32='no' must be true or false"),
        ([*RUN, "--training", "eval_steps=many"], "eval_steps='many' must be a number"),
        ([*RUN, "--fraction", "2"], "between 0 and 1"),
        ([*RUN, "--threshold", "0.5", "--fraction", "0.2"], "`--threshold` and `--fraction` exclude each other"),
        (
            [*RUN, "--no-use-lora", "--lora", "r=2"],
            "`--lora` has settings, but this run trains all weights and no adapter. Leave out `--lora`.",
        ),
        ([*RUN, "--training", "output_dir=elsewhere"], "`--training` must not contain output_dir"),
        (
            [*RUN, "--training", "learning_rte=1"],
            "TrainingArguments has no field learning_rte. Did you mean learning_rate?",
        ),
        ([*RUN, "--lora", "lora_alfa=1"], "LoraConfig has no field lora_alfa. Did you mean lora_alpha?"),
        (["run", "--config", "no-such.yaml"], "no-such.yaml cannot be read: No such file or directory."),
        (["score", "--noisy", "n", "--output", "o"], "Pass at least one model: --before, --after or --base"),
        (["filter", "nowhere", "--output", "o"], "nowhere contains no trace"),
        (
            ["filter", "nowhere", "--output", "o", "--threshold", "high"],
            "--threshold high must be a number, 'auto' or 'fdr'",
        ),
        (["show", "nowhere"], "nowhere contains no trace"),
        (["report", "nowhere", "--measure", "vibes"], "vibes"),
        (["dance"], "No such command"),
    ],
)
def test_bad_usage_exits_with_2_and_no_traceback(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.replace("│", " ").split()) and "Traceback" not in result.output
    assert not (tmp_path / "o").exists()


def test_invalid_configuration_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content, said in (
        ("colour: red", "contains unknown settings: colour. Known settings: model, noisy"),
        ("- 1", "contains no settings"),
        ("a: [", "cannot be read"),
        ("training: 5", "training must map names to values"),
        ("lora: [r]", "lora must map names to values"),
        ("filter: {colour: red}", "`filter` contains unknown settings: colour"),
        ("filter: {step: 3}", "`filter` contains unknown settings: step"),
        ("filter: {fraction: half}", "--fraction half must be between 0 and 1"),
        ("filter: {threshold: [1]}", "threshold=[1] must be a number, 'auto' or 'fdr'"),
        ("max_length: many", "--max-length many must be a whole number"),
        ("record_steps: often", "--record-steps often is invalid"),
        ("refit: 'false'", "--refit false must be true or false"),
        ("model: 5", "--model 5 must be text"),
    ):
        (tmp_path / "config.yaml").write_text(f"{content}\n")
        required = [] if content.startswith("model") else ["--model", "m"]
        result = call("run", "--config", tmp_path / "config.yaml", *required, *RUN[3:])
        refused(result, said)
        assert not (tmp_path / "o").exists()


def test_the_version():
    assert call("--version").output == f"forgetfilter-callback {version('forgetfilter-callback')}\n"


def test_help_does_not_import_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from forgetfilter_callback.cli.commands import app; "
        "assert CliRunner().invoke(app, ['run', '--help']).exit_code == 0; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


OFFLINE = """
import time
def fail(seconds): raise AssertionError("The Hub was tried again")
time.sleep = fail
from forgetfilter_callback.cli.main import main
main()
"""


def test_a_model_that_is_no_folder_without_a_network(files, tmp_path):
    rows = ("--noisy", str(files["noisy"]), "--safety", str(files["safety"]))
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE, "run", "--model", "owner/modle", *rows, "--output", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 2 and "Retry" not in result.stderr, result.stderr
    first, *_, last = result.stderr.splitlines()
    assert first == "forgetfilter: There is no folder owner/modle, so the model is taken from the Hub or its cache."
    assert last.startswith(
        "forgetfilter: The model 'owner/modle' cannot be loaded. There is no such folder. From the Hub: "
    )
    assert "Without a network, pass the folder of a model" in last
    assert not (tmp_path / "out").exists()


def test_a_command_whose_reader_has_ended_says_nothing(finished_run, monkeypatch):
    """As in `forgetfilter doctor out | head -0`."""

    def say(message: str) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(trace_commands, "say", say)
    result = call("doctor", finished_run)
    assert result.exit_code == 1 and result.output == ""
