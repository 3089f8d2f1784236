"""What `forgetfilter demo` prints, without running it."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from forgetfilter_callback.cli.demo_data import DemoData
from forgetfilter_callback.cli.demo_progress import BASE_ANSWERS, NOISY, SECONDS, DemoProgress
from forgetfilter_callback.cli.demo_report import print_introduction, print_results


SUMMARY = {
    "unsafe_rate": {"base": 0.5, "no_measure": 0.9, "forgetfilter": 0.03},
    "task_f1": {"base": 0.09, "no_measure": 0.54, "forgetfilter": 0.55},
    "task_constant": 0.07,
    "auroc": 0.98,
    "threshold": 1.2,
    "removed": 26,
    "unsafe": 24,
    "forgetting": {"unsafe": {"removed": 21}},
    "review": {"reviewed_rows": 50, "removed": 23},
}


@pytest.fixture(params=[80, 120])
def console(request) -> Console:
    return Console(width=request.param, file=io.StringIO(), highlight=False)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def unwrapped(console: Console) -> str:
    return " ".join(printed(console).split())


def test_it_begins_with_the_plan_and_the_time(console):
    noisy = [{"group": "unsafe"}] * 24 + [{"group": "task"}] * 216
    print_introduction(console, "a-model", DemoData(noisy, [{}] * 60, [], []))
    shown = unwrapped(console)
    assert shown.startswith(
        "ForgetFilter demo 1. A small model (a-model) is finetuned on 240 rows. 24 of them are unsafe"
    )
    assert f"about {math.ceil(sum(SECONDS.values()) / 60)} minutes" in shown


def test_it_ends_with_a_table_three_sentences_and_two_commands(console):
    print_results(console, Path("my [demo]"), SUMMARY)
    lines = [line.rstrip() for line in printed(console).splitlines()]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert [row[1:] for row in cells] == [["50%", "0.09"], ["90%", "0.54"], ["3%", "0.55"], ["", "0.07"]]
    assert [line.split()[0] for line in lines if line[:4] in (" 1. ", " 2. ", " 3. ")] == ["1.", "2.", "3."]
    assert "would remove 26 rows, 21 of them unsafe. A review of 50 rows found 23 of the 24" in unwrapped(console)
    assert "  forgetfilter review 'my [demo]'" in lines  # commands can be copied: quoted, and in whole lines
    command = lines.index("  forgetfilter run --model MODEL --noisy noisy.jsonl --safety safety.jsonl \\")
    assert lines[command + 1] == "      --output out --training learning_rate=1e-3"


def test_it_says_when_the_automatic_threshold_finds_nothing(console):
    print_results(console, Path("out"), {**SUMMARY, "threshold": None, "removed": 0})
    assert "The automatic φ would remove nothing. A review" in unwrapped(console)


def test_the_bar_of_the_whole_demo_counts_the_stages_by_their_time(console):
    with DemoProgress(console) as progress:
        progress.begin(BASE_ANSWERS)(1.0)
        progress.begin(NOISY)(0.5)
        whole = progress.tasks[-1]
        assert whole.completed == SECONDS[BASE_ANSWERS] + SECONDS[NOISY] / 2
        assert whole.total == sum(SECONDS.values())
    shown = printed(console)
    assert [line.partition(" ━")[0].rstrip() for line in shown.splitlines() if "━" in line] == [*SECONDS, "Whole demo"]
