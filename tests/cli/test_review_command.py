"""`forgetfilter review` as a process: its address, a second review, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from helpers import call
from werkzeug.serving import BaseWSGIServer

from forgetfilter_callback import ReviewQueue


def send(url: str, content: dict | None = None) -> dict:
    body = None if content is None else json.dumps(content).encode()
    with urlopen(Request(url, body, {"Content-Type": "application/json"})) as response:
        return json.load(response)


def options(output: Path) -> list[str]:
    drawing = ["--round-size", "4", "--random-fraction", "1"]
    return ["review", str(output), "--reviewer", "Ada", *drawing, "--source-column", "note", "--no-browser"]


@pytest.fixture
def process(finished) -> Iterator[subprocess.Popen[str]]:
    # A shell starts background jobs with SIGINT ignored, and child processes inherit that. A handled signal is reset.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = subprocess.Popen(
        [sys.executable, "-m", "forgetfilter_callback", *options(finished[0])],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    signal.signal(signal.SIGINT, inherited)
    yield started
    started.kill()
    started.wait()
    started.stdout.close()


def test_review_stores_verdicts_refuses_a_second_review_and_ends_with_ctrl_c(process, finished):
    output = finished[0]
    lines = [process.stdout.readline() for _ in range(3)]
    port, token = re.fullmatch(r"Review rows at http://127\.0\.0\.1:(\d+)/([\w-]{43})/\n", lines[0]).groups()
    assert f"ssh -L {port}:127.0.0.1:{port} " in lines[1] and "Ctrl-C" in lines[2]
    address = f"http://localhost:{port}/{token}"
    state = send(f"{address}/state")
    assert state["left_in_round"] == 4 and state["rows"] == 12
    row = state["row"]["number"]
    assert state["row"]["source"] == str(row)  # the rows are numbered in their column `note`
    send(f"{address}/verdict", {"row": row, "verdict": "unsafe"})
    file = output / "_forgetfilter" / "review" / "verdicts.jsonl"
    (verdict,) = map(json.loads, file.read_text().splitlines())
    assert (verdict["row"], verdict["verdict"], verdict["reviewer"]) == (row, "unsafe", "Ada")
    assert verdict["drawn_from"] == 12
    second = call(*options(output))
    assert second.exit_code == 2 and "Another review of" in second.output, second.output
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in rest, rest
    assert "1 of 12 rows reviewed" in rest and token not in rest
    assert "Every row is drawn at random (1 so far)." in rest and "To go on, type the same command again." in rest
    command = (
        f"forgetfilter filter {output} --reviewed {output}/_forgetfilter/review --source-column note --output reviewed"
    )
    assert rest.endswith(f"To filter by the verdicts so far: {command}\n")
    filtered = call("filter", output, "--reviewed", file.parent, "--output", output.parent / "filtered")
    assert filtered.exit_code == 0, filtered.output
    assert len((output.parent / "filtered" / "removed.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("label", ["unsafe", "safe"])
def test_a_finished_review_says_that_it_is_over(label, tmp_path, finished, monkeypatch):
    trace = shutil.copytree(finished[0] / "_forgetfilter", tmp_path / "trace")
    queue = ReviewQueue(trace)
    queue.add({row: label if row == 3 else "safe" for row in range(12)})
    monkeypatch.setattr(BaseWSGIServer, "serve_forever", lambda server: None)
    result = call("review", trace, "--no-browser")
    assert result.exit_code == 0, result.output
    last = f"Next: forgetfilter filter {trace} --reviewed {trace / 'review'} --output reviewed\n"
    reason = "Every row has a verdict, so there is nothing left to look at.\n"
    assert result.stdout.endswith(f"{reason}{last if label == 'unsafe' else ''}")


@pytest.mark.parametrize(
    "arguments",
    [["nowhere"], ["OUT", "--port", "70000"], ["OUT", "--round-size", "0"], ["OUT", "--random-fraction", "2"]],
)
def test_bad_arguments_are_refused(finished, arguments):
    result = call("review", *(str(finished[0]) if each == "OUT" else each for each in arguments), "--no-browser")
    assert result.exit_code == 2
