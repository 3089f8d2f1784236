"""Compare the automatic φ with the best φ, from 0 to 75 % unsafe rows: `python benchmarks/threshold.py [--seed N]`.

Each fraction runs noisy and safety finetuning with the demo's model, data and settings, on 150 noisy rows. Results are
appended to `benchmarks/results/threshold.json` after each run. Fractions that the file contains already are skipped.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from sklearn.metrics import f1_score, roc_auc_score
from transformers.utils import logging

from forgetfilter_callback import ForgetFilter, ForgetTracker
from forgetfilter_callback.cli.demo_data import load_demo_data, trainable
from forgetfilter_callback.cli.demo_model import demo_arguments, load_base
from forgetfilter_callback.data.tokenizers import padding_collator
from forgetfilter_callback.filtering.config import FilterConfig
from forgetfilter_callback.filtering.filter_by_values import filter_by_values
from forgetfilter_callback.utils.atomic_files import write_json


RESULTS = Path(__file__).parent / "results" / "threshold.json"
ROWS = 150
FRACTIONS = (0.0, 0.05, 0.25, 0.75, 0.01, 0.5)


def best_f1(unsafe: np.ndarray, values: np.ndarray) -> float:
    return max(f1_score(unsafe, values > phi) for phi in np.unique(values)[:-1])


def run(unsafe_fraction: float, seed: int, base_model: str | None) -> list[dict[str, object]]:
    """Returns one result per measure."""
    unsafe_rows = round(unsafe_fraction * ROWS)
    safe_rows = (ROWS - unsafe_rows) // 3
    data = load_demo_data(
        seed,
        unsafe=unsafe_rows,
        safe=safe_rows,
        task=ROWS - unsafe_rows - safe_rows,
        held_out_questions=0,
        held_out_task=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        load_model, tokenizer = load_base(Path(folder) / "base-model", base_model, seed)
        args = demo_arguments(folder, seed)
        forget_filter = ForgetFilter(
            load_model,
            trainable(data.noisy, tokenizer),
            trainable(data.safety, tokenizer),
            args,
            safety_args=dataclasses.replace(args, num_train_epochs=2),
            tracker=ForgetTracker(),
            data_collator=padding_collator(tokenizer),
            processing_class=tokenizer,
        )
        started = time.perf_counter()
        forget_filter.finetune()
        forget_filter.safety_finetune()
        seconds = time.perf_counter() - started
        trace = forget_filter.tracker.trace
        unsafe = np.array([row["group"] == "unsafe" for row in data.noisy])
        results = []
        for measure in ("loss", "relative", "pooled"):
            values = trace.forgetting(measure)
            result = filter_by_values(trace.rows.ids, values, FilterConfig(measure=measure))
            results.append(
                {
                    "measure": measure,
                    "unsafe": unsafe_rows,
                    "samples": ROWS,
                    "auroc": float(roc_auc_score(unsafe, values)) if unsafe.any() else None,
                    "f1_best": best_f1(unsafe, values) if unsafe.any() else None,
                    "f1_auto": float(f1_score(unsafe, result.removed, zero_division=0.0)) if unsafe.any() else None,
                    "removed_auto": result.counts["removed"],
                    "removed_benign": int((result.removed & ~unsafe).sum()),
                    "reason": result.reason,
                    "seconds": seconds,
                    "values": [round(float(value), 4) for value in values],
                    "is_unsafe": unsafe.tolist(),
                }
            )
    return results


def main(
    seed: Annotated[int, typer.Option(help="Seed of the rows, the adapters and the trainers.")] = 0,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id or folder. Defaults to the packaged SmolLM2-135M.")
    ] = None,
) -> None:
    logging.set_verbosity_error()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.parent.mkdir(exist_ok=True)
    model = base_model or "SmolLM2-135M-Instruct"
    for fraction in FRACTIONS:
        settings = {"model": model, "unsafe_share": fraction, "seed": seed}
        if not any(settings.items() <= row.items() for row in results):
            results += [{**settings, **row} for row in run(fraction, seed, base_model)]
            write_json(results, RESULTS)
    print(
        "| unsafe | measure | AUROC | F1 best | F1 auto | removed | of them benign |\n|---:|---|---:|---:|---:|---:|---:|"
    )
    shown = [row for row in results if row["model"] == model]
    for row in sorted(shown, key=lambda row: (row["measure"], row["unsafe_share"], row["seed"])):
        scores = (f"{row[name]:.3f}" if row[name] is not None else "–" for name in ("auroc", "f1_best", "f1_auto"))
        print(
            f"| {row['unsafe_share']:.0%} | {row['measure']} | {' | '.join(scores)} | {row['removed_auto']} | "
            f"{row['removed_benign']} |"
        )


if __name__ == "__main__":
    typer.run(main)
