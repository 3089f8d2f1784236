"""Does a twentieth of unsafe rows do harm, and which filter prevents it? `python benchmarks/few_defences.py`.

Uses the sets and the cache of `few.py` (5 % of 600 rows, scenarios `bias` and `toxicity`) and adds held-out rows. Arms:

- `base`: the base model.
- `no_measure`: finetuned on all rows.
- `forgetfilter`: finetuned on the rows that the automatic threshold keeps. Nobody looks at a row.
- `forgetfilter_60_looks`: a person reviews 60 rows with a `ReviewQueue`, and the rows found to be unsafe are removed.
- `oracle`: finetuned on the rows labeled safe.
"""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from transformers.utils import logging

from defences import mean_and_sd, without_texts
from few import Set, verdicts_on
from forgetfilter_callback import ReviewQueue, Trace, find_forgotten
from judging import judge, train_second_scorer
from redraws import LOOKS, ROUND
from scenarios import load_scenario
from sessions import Cache, DataDir, Json, Scenarios, Seeds, Sessions, earlier_results, write_results


RESULTS = Path(__file__).parent / "results" / "few_defences.json"
ARMS = ("base", "no_measure", "forgetfilter", "forgetfilter_60_looks", "oracle")
Arms = Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(ARMS)}; can be given several times.")]
HELD_OUT, HELD_OUT_TASK = 100, 200


def reviewed(trace: Trace, unsafe: np.ndarray, seed: int) -> np.ndarray:
    """Reviews `LOOKS` rows. Returns a mask of those found to be unsafe."""
    with tempfile.TemporaryDirectory() as folder:
        queue = ReviewQueue(trace, folder, seed=seed)
        for _ in range(LOOKS // ROUND):
            queue.add(verdicts_on(queue.next(ROUND), unsafe))
        return queue.is_known & unsafe


def run_arm(arm: str, sessions: Sessions, data_dir: Path | None) -> dict[str, Any]:
    """Runs and scores one arm."""
    unsafe = np.array([row["group"] == "unsafe" for row in sessions.scenario.noisy])
    trace = sessions.tracked()
    removed = {
        "base": np.zeros_like(unsafe),
        "no_measure": np.zeros_like(unsafe),
        "forgetfilter": find_forgotten(trace).removed,
        "forgetfilter_60_looks": reviewed(trace, unsafe, sessions.seed),
        "oracle": unsafe,
    }[arm]
    adapter = "base" if arm == "base" else sessions.kept(removed)
    judged = sessions.judged(adapter, partial(judge, train_second_scorer(sessions.scenario.name, data_dir)))
    return {
        "arm": arm,
        "removed": int(removed.sum()),
        "unsafe_removed": int((removed & unsafe).sum()),
        **without_texts(judged),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Formats a table with one line per arm: mean ± standard deviation over seeds."""
    lines = [
        "| scenario | arm | seeds | unsafe | task | removed | of them unsafe |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (scenario, arm), runs in pd.DataFrame(results).groupby(["scenario", "arm"], sort=False):
        cells = [mean_and_sd(runs[name]) for name in ("unsafe", "task", "removed", "unsafe_removed")]
        lines.append(f"| {scenario} | {arm} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    data_dir: DataDir = None,
    scenario: Scenarios = None,
    seed: Seeds = None,
    arm: Arms = None,
    cache: Cache = Path("few-cache"),
    json_file: Json = RESULTS,
) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in scenario if scenario is not None else ["bias", "toxicity"]:
        for run_seed in seed if seed is not None else [0, 1, 2]:
            chosen = Set(name, 0.05, 600, run_seed)
            sizes = dataclasses.replace(chosen.sizes, held_out=HELD_OUT, held_out_task=HELD_OUT_TASK)
            rows = load_scenario(name, data_dir, run_seed, sizes)
            sessions = Sessions(cache / chosen.name, rows, None, run_seed, chosen.settings, chosen.sizes)
            for run in arm if arm is not None else ARMS:
                results = earlier_results(json_file)
                if not any((r["scenario"], r["seed"], r["arm"]) == (name, run_seed, run) for r in results):
                    result = {"scenario": name, "seed": run_seed, **run_arm(run, sessions, data_dir)}
                    write_results([*earlier_results(json_file), result], json_file)
    print(table(earlier_results(json_file)))


if __name__ == "__main__":
    typer.run(main)
