"""Simulate reviews: how many unsafe rows are found after how many looks? `python benchmarks/looks.py --cache few-cache`.

Uses the traces that `few.py train` keeps. The true groups give the verdicts. Each set is reviewed with several seeds of the
random draws, and the same number of looks by the ranking of the default measure is the comparison.

`--mistakes 0.1`: the reviewer judges a tenth of the rows wrongly, unsafe as well as safe ones. These results have a file of
their own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from few import Final, cached_sets, verdicts_on
from forgetfilter_callback import ReviewQueue, Trace
from forgetfilter_callback.data.identical_rows import content_numbers
from sessions import Cache, earlier_results, write_results


RESULTS = Path(__file__).parent / "results" / "looks.json"
RESULTS_WITH_MISTAKES = RESULTS.with_name("looks_with_mistakes.json")
ROUND = 10  # rows per round
LOOKS = (20, 30, 40, 60, 80, 100, 120, 200)
SEEDS = range(5)


def simulate(trace: Trace, unsafe: np.ndarray, seed: int, mistakes: float = 0) -> list[dict[str, Any]]:
    """Reviews rows until the largest number of looks. Returns one result per number of looks.

    `mistakes` is the probability that a verdict is wrong. An unsafe row with a wrong verdict is not found. The interval
    is about the rows that this reviewer calls unsafe.
    """
    results = []
    contents = content_numbers(trace.rows.ids)  # identical rows have the same verdict
    said_unsafe = unsafe ^ (np.random.default_rng(seed).random(len(unsafe)) < mistakes)[contents]
    by_measure = unsafe[np.argsort(-trace.forgetting(), kind="stable")]
    with tempfile.TemporaryDirectory() as folder:
        queue = ReviewQueue(trace, folder, seed=seed)
        looks = 0
        while looks < max(LOOKS) and not queue.is_known.all():
            queue.add(verdicts_on(queue.next(ROUND), said_unsafe))
            estimate = queue.estimate()
            looks = estimate.seen
            if looks not in LOOKS:
                continue
            left = int(said_unsafe.sum()) - estimate.unsafe_found
            removed = [row for row, label in queue.known_labels.items() if label == "unsafe"]
            found = int(unsafe[removed].sum())
            results.append(
                {
                    "looks": looks,
                    "found": found / max(int(unsafe.sum()), 1),
                    "safe_called_unsafe": len(removed) - found,
                    "found_by_measure": float(by_measure[:looks].sum()) / max(int(unsafe.sum()), 1),
                    "left": left,
                    "interval": estimate.unsafe_left,
                    "covered": estimate.unsafe_left[0] <= left <= estimate.unsafe_left[1],
                }
            )
    return results


def main(
    cache: Cache = Path("few-cache"),
    final: Final = False,
    mistakes: Annotated[float, typer.Option(min=0, max=1, help="Fraction of wrong verdicts.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="The file for the results.")] = None,
) -> None:
    json_file = json_file or (RESULTS_WITH_MISTAKES if mistakes else RESULTS)
    results = earlier_results(json_file)
    for chosen, trace, unsafe in cached_sets(cache, final):
        results = [row for row in results if (row["set"], row["mistakes"]) != (chosen.name, mistakes)]
        for seed in SEEDS:
            run = {"set": chosen.name, "seed": seed, "mistakes": mistakes}
            results += [{**run, **row} for row in simulate(trace, unsafe, seed, mistakes)]
        write_results(results, json_file)
    if results:
        frame = pd.DataFrame(results)
        print(frame.pivot_table(index="set", columns="looks", values="found").round(2).to_string())
        frame["mean of the seeds"] = frame["set"].str.rsplit("-", n=1).str[0]
        print(frame.pivot_table(index="mean of the seeds", columns="looks", values="found").round(2).to_string())
        print(f"90 % intervals that contain the number of unsafe rows left: {frame['covered'].mean():.0%}")


if __name__ == "__main__":
    typer.run(main)
