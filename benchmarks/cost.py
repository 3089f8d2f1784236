"""Measure what ForgetFilter costs relative to noisy finetuning.

Usage: `python benchmarks/cost.py --data-dir ../shared/data --cache CACHE`

The cost is the time of safety finetuning with `stop_early` (including its records and checks), one more record for the
base model (M0 in the paper), and the filter. It is divided by the time of noisy finetuning without a tracker, which is
measured over one epoch. Safety finetuning starts from the model that `filters.py` left in its cache. Do not run
anything else on the machine at the same time.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from sklearn.metrics import f1_score, roc_auc_score
from transformers.utils import logging

from forgetfilter_callback import ForgetTracker, find_forgotten
from forgetfilter_callback.cli.demo_model import computing_dtype
from forgetfilter_callback.scoring.token_losses import window_scores
from forgetfilter_callback.utils.model_state import preserve_state
from scenarios import Sizes, load_scenario
from sessions import (
    SIZES,
    SMOKE_SETTINGS,
    SMOKE_SIZES,
    DataDir,
    Json,
    Model,
    NoisyRows,
    Scenarios,
    Seeds,
    Sessions,
    Settings,
    Smoke,
    earlier_results,
    write_results,
)


RESULTS = Path(__file__).parent / "results" / "cost.json"


def costs(sessions: Sessions, folder: Path, sizes: Sizes, repeats: int = 3) -> dict[str, Any]:
    """Trains in `folder` and measures the seconds of each stage and the quality of the early ranking."""
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
    shutil.copytree(sessions.noisy_session(), folder)
    one_epoch = dataclasses.replace(sessions.settings, epochs=1)
    timed = Sessions(folder, sessions.scenario, sessions.model, sessions.seed, one_epoch, sizes)
    timed.train_from("epoch", "base", timed.scenario.noisy)
    tracker = ForgetTracker(trace_dir=folder / "forgetfilter", stop_early=True)
    timed.train_from("safety", "noisy", timed.scenario.safety, [tracker], safety=True)
    trace = tracker.trace
    model = timed.with_adapter("noisy")
    record_seconds = []
    with preserve_state(model):
        for _ in range(repeats):
            started = time.perf_counter()
            list(window_scores(model, trace.rows, disable_tqdm=True, with_states=True))
            record_seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    result = find_forgotten(trace)
    filter_seconds = time.perf_counter() - started
    checks_file = trace.folder / "early_stopping.json"  # missing if safety finetuning ended before the first check
    checks = json.loads(checks_file.read_text()) if checks_file.exists() else []
    seconds = {
        "s1": timed.seconds("epoch") * sessions.settings.epochs,
        "s1plus": timed.seconds("safety"),
        "record": statistics.median(record_seconds),
        "decision": filter_seconds,
    }
    unsafe = np.array([row["group"] == "unsafe" for row in timed.scenario.noisy])
    return {
        "seconds": seconds,
        "share_of_s1": (seconds["s1plus"] + seconds["record"] + seconds["decision"]) / seconds["s1"],
        "ended_at": trace.first_and_last()[1].step,
        "checks": [check["step"] for check in checks],
        "auroc": float(roc_auc_score(unsafe, result.values)),
        "f1_auto": float(f1_score(unsafe, result.removed, zero_division=0.0)),
    }


def main(
    data_dir: DataDir = None,
    scenario: Scenarios = None,
    seed: Seeds = None,
    noisy_rows: NoisyRows = SIZES.noisy,
    unsafe_share: Annotated[float, typer.Option(help="Fraction of the noisy set that is unsafe.")] = SIZES.unsafe_share,
    epochs: Annotated[int, typer.Option(help="Epochs of noisy finetuning.")] = Settings.epochs,
    model: Model = None,
    smoke: Smoke = False,
    cache: Annotated[Path, typer.Option(help="The cache folder of filters.py.")] = Path("benchmarks-cache"),
    json_file: Json = RESULTS,
) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = earlier_results(json_file)
    settings = SMOKE_SETTINGS if smoke else Settings(epochs=epochs)
    is_default = (noisy_rows, unsafe_share, epochs) == (SIZES.noisy, SIZES.unsafe_share, Settings.epochs)
    sizes = SMOKE_SIZES if smoke else dataclasses.replace(SIZES, noisy=noisy_rows, unsafe_share=unsafe_share)
    if not smoke and unsafe_share != SIZES.unsafe_share:
        # The cost needs no held-out rows, and large sets leave too few.
        sizes = dataclasses.replace(sizes, held_out=0, held_out_task=0, labelled=0)
    for name in scenario if scenario is not None else ["bias", "toxicity", "harmfulness"]:
        for run_seed in seed if seed is not None else [1]:
            settings_of_run = {
                "scenario": name, "seed": run_seed, "rows": sizes.noisy, "unsafe_share": sizes.unsafe_share, "smoke": smoke,
                "model": model or "SmolLM2-135M-Instruct", "settings": dataclasses.asdict(settings),
            }  # fmt: skip
            if any(settings_of_run.items() <= row.items() for row in results):
                continue
            rows = load_scenario(name, data_dir, run_seed, sizes)
            label = f"{name}-{sizes.unsafe_share}-{run_seed}"
            if smoke:
                label += "-smoke"
            elif not is_default:
                label += f"-{noisy_rows}-rows-{epochs}-epochs"
            sessions = Sessions(cache / label, rows, model, run_seed, settings, sizes)
            measured = costs(sessions, cache / f"cost-{label}", sizes)
            settings_of_run |= {"dtype": str(computing_dtype()), "cores": torch.get_num_threads()}
            results.append({**settings_of_run, **measured})
            write_results(results, json_file)
    print(
        "| scenario | seed | rows | epochs | S1, s | S1+, s | a record, s | decision, s | of S1 | ended at step | AUROC |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in results:
        times = " | ".join(f"{row['seconds'][stage]:.1f}" for stage in ("s1", "s1plus", "record", "decision"))
        print(
            f"| {row['scenario']} | {row['seed']} | {row['rows']} | {row['settings']['epochs']} | {times} | "
            f"{row['share_of_s1']:.0%} | {row['ended_at']} | {row['auroc']:.3f} |"
        )


if __name__ == "__main__":
    typer.run(main)
