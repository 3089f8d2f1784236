"""Messages in a terminal: lines end between words, paths stay whole, and the last line says what to type next."""

from __future__ import annotations

import io
import json
import logging
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from datasets import load_dataset
from helpers import call
from rich.console import Console

from forgetfilter_callback import FilterConfig, ReviewQueue, Trace, find_forgotten
from forgetfilter_callback.cli.commands import app
from forgetfilter_callback.cli.messages import LogFormatter, fitted
from forgetfilter_callback.data.decode import load_decoder
from forgetfilter_callback.data.source_paths import cannot_be_loaded
from forgetfilter_callback.reports.terminal import show


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


PATH = f"/data/{'customer-tickets/' * 6}smollm2-1.7b-instruct/_forgetfilter"
MESSAGE = f"The trace in {PATH} does not name the file of its rows. Pass the noisy set, as the run was given it."
COMMAND = f"forgetfilter run --config {PATH}/config.yaml --output {PATH} --resume"


@pytest.mark.parametrize("width", [80, 120])
def test_lines_end_between_words(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = fitted(MESSAGE, Terminal()).split("\n")
    assert [word for line in lines for word in line.split()] == MESSAGE.split()  # no word is cut, also not the path
    assert len(lines) > 1 and all(len(line) <= width or line == PATH for line in lines)
    assert fitted(MESSAGE, io.StringIO()) == MESSAGE  # a pipe or a file
    assert fitted("out is valid.", Terminal()) == "out is valid."


@pytest.mark.parametrize("width", [80, 120])
def test_a_command_can_be_copied(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert fitted(f"{MESSAGE} Continue: {COMMAND}", Terminal()).endswith(f"Continue:\n{COMMAND}")


def test_log_messages_fit_too(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stderr", Terminal())
    text = LogFormatter().format(logging.makeLogRecord({"msg": f"[RANK 0] {MESSAGE}"}))
    assert text == fitted(MESSAGE, Terminal())


@pytest.fixture
def run_folder(finished_run, tmp_path) -> Path:
    """A finished run without a review."""
    return shutil.copytree(finished_run, tmp_path / "my out")


def next_line(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code in (0, 3), result.output
    start, _, step = result.stdout.splitlines()[-1].partition(": ")
    assert start == "Next", result.stdout
    return step


def next_command(*arguments: object) -> list[str]:
    command = shlex.split(next_line(*arguments))
    # Raises if it cannot be typed.
    typer.main.get_command(app).commands[command[1]].make_context(command[1], command[2:])
    return command


def test_after_a_look_the_next_step_is_a_review(run_folder, tmp_path):
    to_review = ["forgetfilter", "review", str(run_folder)]
    looks = (("show", run_folder), ("report", run_folder, "--output", tmp_path / "page.html"))
    for look in looks:
        assert next_command(*look) == to_review
    assert next_command("filter", run_folder, "--threshold", 99, "--output", tmp_path / "none") == to_review
    queue = ReviewQueue(run_folder)
    queue.add({0: "safe"})
    for look in looks:  # there is nothing to remove yet
        assert next_command(*look) == to_review
    queue.add({1: "unsafe"})
    by_verdicts = ["--reviewed", str(run_folder / "_forgetfilter" / "review")]
    for look in looks:
        assert next_command(*look) == ["forgetfilter", "filter", str(run_folder), *by_verdicts, "--output", "reviewed"]


def test_the_next_step_says_where_the_rows_are(run_folder, files):
    """The trace of a callback does not know the file of its rows."""
    manifest = run_folder / "_forgetfilter" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["source"]
    manifest.write_text(json.dumps(content))
    ReviewQueue(run_folder).add({1: "unsafe"})
    rows = ["--noisy", "NOISY"]
    assert next_command("show", run_folder)[-4:] == [*rows, "--output", "reviewed"]
    rows = ["--noisy", str(files["noisy"]), "--tokenizer", str(files["model"])]
    assert next_command("show", run_folder, *rows)[-6:] == [*rows, "--output", "reviewed"]


def test_after_a_look_at_verdicts_the_next_step_is_to_filter_by_them(run_folder, tmp_path):
    ReviewQueue(run_folder, tmp_path / "mine").add({1: "unsafe"})
    given = ["--threshold", "fdr", "--reviewed", str(tmp_path / "mine"), "--level", "0.2"]
    expected = ["forgetfilter", "filter", str(run_folder), *given, "--output", "reviewed"]
    for look in (("show", run_folder), ("report", run_folder, "--output", tmp_path / "page.html")):
        assert next_command(*look, *given) == expected


def test_after_a_filter_the_next_step_is_to_finetune(run_folder, tmp_path):
    step = next_line("filter", run_folder, "--fraction", 0.25, "--output", tmp_path)
    assert step.startswith(f"finetune the base model on {tmp_path / 'kept.jsonl'}, ")
    code = re.search(r"SFTTrainer takes (load_dataset\(.*\)) as `train_dataset`\.$", step)[1]
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert eval(code, {"load_dataset": load_dataset}).to_list() == kept


@pytest.mark.parametrize("width", [80, 120])
def test_a_row_takes_one_line(finished_run, files, width, monkeypatch):
    monkeypatch.setattr(
        "forgetfilter_callback.reports.terminal.completion_text", lambda *_, **__: "a b\n" + "word " * 60
    )
    trace = Trace.open(finished_run / "_forgetfilter")
    console = Console(width=width, file=io.StringIO())
    show(trace, find_forgotten(trace, FilterConfig(fraction=0.25)), console, load_decoder(str(files["model"])), head=10)
    head, _, rows = console.file.getvalue().partition("┡")
    listed = rows.splitlines()[1:-1]
    assert len(listed) == 10 and all("a b word" in line and "…" in line and len(line) <= width for line in listed)
    assert all(name in head.splitlines()[-1] for name in ("row", "forgetting", "tokens", "decision"))
    cells = [line.split("│")[1:5] for line in listed]
    assert all(row.strip().isdecimal() and decision.strip() in ("removed", "kept") for row, _, _, decision in cells)


def test_score_says_how_to_complete_a_trace(files, tmp_path):
    result = call("score", "--noisy", files["noisy"], "--before", files["model"], "--output", tmp_path / "trace")
    assert result.exit_code == 0, result.output
    said, _, command = result.stdout.splitlines()[-1].partition(": ")
    assert said.endswith("has no record of the model after safety finetuning. Record it")
    expected = ["forgetfilter", "score", "--noisy", str(files["noisy"]), "--after", "MODEL", "--output"]
    assert shlex.split(command) == [*expected, str(tmp_path / "trace")]


@pytest.mark.parametrize("exists", [True, False])
def test_a_model_that_cannot_be_loaded(exists, tmp_path):
    error = OSError("We couldn't connect to the Hub\nand some advice")
    name = str(tmp_path if exists else tmp_path / "modle")
    place = "" if exists else "There is no such folder. From the Hub: "
    said = f"The model {name!r} cannot be loaded. {place}We couldn't connect to the Hub"
    assert cannot_be_loaded(name, error) == said
