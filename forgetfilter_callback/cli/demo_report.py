"""What the demo prints, and the files that it writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..data.output_lines import to_json_lines
from ..filtering.result import FilterResult
from ..pipeline.outputs import write_kept_and_removed
from ..utils.atomic_files import write_json
from ..utils.counted import counted
from .demo_data import DemoData
from .demo_progress import SECONDS
from .next_step import command_to_review


MODELS = {
    "base": "base model",
    "no_measure": "finetuned on all rows",
    "forgetfilter": "finetuned without the unsafe rows found",
}


def print_introduction(console: Console, model: str, data: DemoData) -> None:
    """Prints what the demo is going to do, and how long that takes."""
    unsafe = sum(row["group"] == "unsafe" for row in data.noisy)
    minutes = math.ceil(sum(SECONDS.values()) / 60)
    console.print(Text("ForgetFilter demo", style="bold"))
    _print_list(
        console,
        f"A small model ({model}) is finetuned on {counted(len(data.noisy), 'row')}. {unsafe} of them are unsafe: they "
        "answer a question with a prejudice.",
        f"Then it is finetuned on {counted(len(data.safety), 'safe row')}. The rows that it forgets most are suspicious, "
        "and some are reviewed.",
        "Finally, the base model is finetuned without the unsafe rows that were found, and the models are compared.",
    )
    console.print(f"This takes about {minutes} minutes on 2 CPU cores with bfloat16, and longer on other CPUs.\n")


def print_results(console: Console, output: Path, summary: Mapping[str, Any]) -> None:
    """Prints the scores of the models, what happened, and what to type next."""
    unsafe_rate, task_f1, review = summary["unsafe_rate"], summary["task_f1"], summary["review"]
    table = Table(
        "model",
        caption="Unsafe: the answer names a person without any reason in the question.\n"
        "Task F1: words in common with the solution of a word problem, 0 to 1.",
        caption_justify="left",
    )
    table.add_column("unsafe answers", justify="right")
    table.add_column("task F1", justify="right")
    for arm, label in MODELS.items():
        table.add_row(label, f"{unsafe_rate[arm]:.0%}", f"{task_f1[arm]:.2f}", end_section=arm == "forgetfilter")
    table.add_row("always the same answer, at best", "", f"{summary['task_constant']:.2f}", style="dim")
    console.print("", table, "")

    if summary["threshold"] is None:
        automatic = "The automatic φ would remove nothing."
    else:
        right = summary["forgetting"]["unsafe"]["removed"]
        automatic = f"The automatic φ would remove {counted(summary['removed'], 'row')}, {right} of them unsafe."
    _print_list(
        console,
        f"Finetuning on all rows changed the task F1 from {task_f1['base']:.2f} to {task_f1['no_measure']:.2f}. The model "
        f"then gives an unsafe answer to {unsafe_rate['no_measure']:.0%} of the held-out questions.",
        f"Forgetting ranks the unsafe rows with an AUROC of {summary['auroc']:.2f} (0.5 is chance, 1 is perfect). "
        f"{automatic} A review of {counted(review['reviewed_rows'], 'row')} found {review['removed']} of the "
        f"{summary['unsafe']} unsafe rows.",
        f"Finetuned without these rows, the model gives an unsafe answer to {unsafe_rate['forgetfilter']:.0%} of the "
        f"questions. Its task F1 is {task_f1['forgetfilter']:.2f}.",
    )
    console.print(Text(f"\nThe files are in {output}. Next, look at the rows yourself:"))
    console.print(Text(f"  {command_to_review(output)}", style="bold"))
    console.print("Find the unsafe rows in your own data:")
    console.print(Text("  forgetfilter run --model MODEL --noisy noisy.jsonl --safety safety.jsonl \\", style="bold"))
    console.print(Text("      --output out --training learning_rate=1e-3", style="bold"))


def write_results(
    output: Path,
    data: DemoData,
    automatic: FilterResult,
    reviewed: FilterResult,
    answers: Mapping[str, list[str]],
    summary: Mapping[str, Any],
) -> None:
    """Writes `summary.json`, the rows, the answers and the histogram of forgetting."""
    write_json(summary, output / "summary.json")
    noisy = Dataset.from_list(data.noisy)
    noisy.to_json(output / "noisy.jsonl", force_ascii=False)
    Dataset.from_list(data.safety).to_json(output / "safety.jsonl", force_ascii=False)
    lines = to_json_lines(noisy.add_column("forgetting", reviewed.values))
    write_kept_and_removed(output / "kept.jsonl", output / "removed.jsonl", lines, reviewed.removed)
    _held_out(data, answers).to_json(output / "answers.jsonl", force_ascii=False)
    automatic.plot(noisy["group"]).savefig(output / "forgetting.png", dpi=150)


def _held_out(data: DemoData, answers: Mapping[str, list[str]]) -> Dataset:
    """Each held-out question with its reference and the answers of the three models."""
    rows = [*data.held_out_questions, *data.held_out_task]
    return Dataset.from_dict(
        {
            "question": [row["prompt"][-1]["content"] for row in rows],
            "reference": [row["completion"][0]["content"] for row in rows],
            **answers,
        }
    )


def _print_list(console: Console, *sentences: str) -> None:
    table = Table.grid(padding=(0, 1))
    for number, sentence in enumerate(sentences, start=1):
        table.add_row(f"{number}.", Text(sentence))
    console.print(Padding(table, (0, 0, 0, 1)))
