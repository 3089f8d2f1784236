"""Simulate reviews: how many unsafe rows are found after how many looks? `python benchmarks/looks.py --cache few-cache`.

Uses the traces that `few.py train` keeps. The true groups give the verdicts. Each set is reviewed with several seeds of the
random draws, and the same number of looks by the ranking of the default measure is the comparison.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import typer

from few import Final, cached_sets, verdicts_on
from forgetfilter_callback import ReviewQueue, Trace
from sessions import Cache, Json, earlier_results, write_results


RESULTS = Path(__file__).parent / "results" / "looks.json"
ROUND = 10  # rows per round
LOOKS = (20, 30, 40, 60, 80, 100, 120, 200)
SEEDS = range(5)


def simulate(trace: Trace, unsafe: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """Reviews rows until the largest number of looks. Returns one result per number of looks."""
    results = []
    by_measure = unsafe[np.argsort(-trace.forgetting(), kind="stable")]
    with tempfile.TemporaryDirectory() as folder:
        queue = ReviewQueue(trace, folder, seed=seed)
        looks = 0
        while looks < max(LOOKS) and not queue.is_known.all():
            queue.add(verdicts_on(queue.next(ROUND), unsafe))
            estimate = queue.estimate()
            looks = estimate.seen
            if looks not in LOOKS:
                continue
            left = int(unsafe.sum()) - estimate.unsafe_found
            results.append(
                {
                    "looks": looks,
                    "found": estimate.unsafe_found / max(int(unsafe.sum()), 1),
                    "found_by_measure": float(by_measure[:looks].sum()) / max(int(unsafe.sum()), 1),
                    "left": left,
                    "interval": estimate.unsafe_left,
                    "covered": estimate.unsafe_left[0] <= left <= estimate.unsafe_left[1],
                }
            )
    return results


def main(cache: Cache = Path("few-cache"), final: Final = False, json_file: Json = RESULTS) -> None:
    results = earlier_results(json_file)
    for chosen, trace, unsafe in cached_sets(cache, final):
        results = [row for row in results if row["set"] != chosen.name]
        for seed in SEEDS:
            results += [{"set": chosen.name, "seed": seed, **row} for row in simulate(trace, unsafe, seed)]
        write_results(results, json_file)
    if results:
        frame = pd.DataFrame(results)
        print(frame.pivot_table(index="set", columns="looks", values="found").round(2).to_string())
        frame["mean of the seeds"] = frame["set"].str.rsplit("-", n=1).str[0]
        print(frame.pivot_table(index="mean of the seeds", columns="looks", values="found").round(2).to_string())
        print(f"90 % intervals that contain the number of unsafe rows left: {frame['covered'].mean():.0%}")


if __name__ == "__main__":
    typer.run(main)
