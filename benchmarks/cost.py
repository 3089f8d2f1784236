"""What ForgetFilter costs beside S1: `python benchmarks/cost.py --data-dir ../shared/data --cache CACHE`.

S1+ is ended early (`stop_early`), from the S1 that `filters.py` has in its cache, and timed with its records and checks;
added are the record of M0 and the decision. S1 alone, which that is a part of, is timed over one of its epochs. Nothing else
may run beside it.
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
    """Seconds of S1 and of what comes on top of it, and what the early end does to the ranking. Trains in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
    shutil.copytree(sessions.learnt(), folder)
    one_epoch = dataclasses.replace(sessions.settings, epochs=1)
    here = Sessions(folder, sessions.scenario, sessions.model, sessions.seed, one_epoch, sizes)
    here.go_on("epoch", "base", here.scenario.noisy)
    tracker = ForgetTracker(trace_dir=folder / "forgetfilter", stop_early=True)
    here.go_on("s1plus", "s1", here.scenario.safety, [tracker], safety=True)
    trace = tracker.trace
    model = here.with_adapter("s1")
    records = []
    with preserve_state(model):
        for _ in range(repeats):
            started = time.perf_counter()
            list(window_scores(model, trace.rows, disable_tqdm=True, with_states=True))
            records.append(time.perf_counter() - started)
    started = time.perf_counter()
    decision = find_forgotten(trace)
    early_stopping = trace.folder / "settling.json"  # not there where S1+ has ended before the first check
    checks = json.loads(early_stopping.read_text()) if early_stopping.exists() else []
    seconds = {
        "s1": here.seconds("epoch") * sessions.settings.epochs,
        "s1plus": here.seconds("s1plus"),
        "record": statistics.median(records),
        "decision": time.perf_counter() - started,
    }
    unsafe = np.array([row["group"] == "unsafe" for row in here.scenario.noisy])
    return {
        "seconds": seconds,
        "share_of_s1": (seconds["s1plus"] + seconds["record"] + seconds["decision"]) / seconds["s1"],
        "ended_at": trace.first_and_last()[1].step,
        "checks": [check["step"] for check in checks],
        "auroc": float(roc_auc_score(unsafe, decision.values)),
        "f1_auto": float(f1_score(unsafe, decision.removed, zero_division=0.0)),
    }


def main(
    data_dir: DataDir = None,
    scenario: Scenarios = None,
    seed: Seeds = None,
    encode_noisy_rows: NoisyRows = SIZES.noisy,
    model: Model = None,
    smoke: Smoke = False,
    cache: Annotated[Path, typer.Option(help="That of filters.py.")] = Path("benchmarks-cache"),
    json_file: Json = RESULTS,
) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = earlier_results(json_file)
    settings = SMOKE_SETTINGS if smoke else Settings()
    sizes = SMOKE_SIZES if smoke else dataclasses.replace(SIZES, noisy=encode_noisy_rows)
    for name in scenario if scenario is not None else ["bias", "toxicity", "harmfulness"]:
        for its_seed in seed if seed is not None else [1]:
            where = {
                "scenario": name, "seed": its_seed, "rows": sizes.noisy, "smoke": smoke,
                "model": model or "SmolLM2-135M-Instruct", "settings": dataclasses.asdict(settings),
            }  # fmt: skip
            if any(where.items() <= row.items() for row in results):
                continue
            rows = load_scenario(name, data_dir, its_seed, sizes)
            marks = f"-{encode_noisy_rows}-rows" * (encode_noisy_rows != SIZES.noisy and not smoke) + "-smoke" * smoke
            label = f"{name}-0.5-{its_seed}{marks}"
            sessions = Sessions(cache / label, rows, model, its_seed, settings, sizes)
            found = costs(sessions, cache / f"cost-{label}", sizes)
            where |= {"dtype": str(computing_dtype()), "cores": torch.get_num_threads()}
            results.append({**where, **found})
            write_results(results, json_file)
    print(
        "| scenario | seed | rows | S1, s | S1+ ended early, s | a record, s | decision, s | of S1 | ended at step | AUROC |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in results:
        times = " | ".join(f"{row['seconds'][part]:.1f}" for part in ("s1", "s1plus", "record", "decision"))
        print(
            f"| {row['scenario']} | {row['seed']} | {row['rows']} | {times} | {row['share_of_s1']:.0%} | "
            f"{row['ended_at']} | {row['auroc']:.3f} |"
        )


if __name__ == "__main__":
    typer.run(main)
