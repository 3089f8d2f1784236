"""When should a review end? `python benchmarks/stopping.py --data-dir ../shared/data --cache CACHE`.

Simulates reviews of small sets, and of the final sets of `few.py` in the cache, all with few unsafe rows. They end as
`forgetfilter review` advises (`advice`), or after a fixed number of safe rows in succession that the ranking chose. The true
groups give the verdicts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import typer
from transformers.utils import logging

from few import Set, cached_sets, open_sets, train_set, verdicts_on
from forgetfilter_callback import ReviewQueue, Trace
from forgetfilter_callback.review.stop_advice import stop_advice
from sessions import Cache, DataDir, Json, earlier_results, write_results


RESULTS = Path(__file__).parent / "results" / "stopping.json"
# Small sets of the development scenarios, because those of `few.py` take hours to train.
SETS = (
    Set("bias_dev", 0.1, 100, 0),
    Set("toxicity_dev", 0.1, 100, 0),
    Set("harmfulness", 0.1, 100, 0),
    Set("toxicity_dev", 0.05, 200, 0),
    Set("harmfulness", 0.05, 200, 0),
    Set("mixed", 0.1, 200, 0),
)
FIXED = (15, 20, 30)
ROUND = 10  # rows per round
SEEDS = range(10)


def simulate(trace: Trace, unsafe: np.ndarray, seed: int) -> dict[str, tuple[int, float]]:
    """Reviews rows until each rule has ended. Returns the rows reviewed and the fraction of unsafe rows found for each."""
    ends: dict[str, tuple[int, float]] = {}
    safe_in_succession = 0
    with tempfile.TemporaryDirectory() as folder:
        queue = ReviewQueue(trace, folder, seed=seed)
        while len(ends) <= len(FIXED):
            for row in queue.next(ROUND):
                queue.add(verdicts_on([row], unsafe))
                if row not in {verdict.row for verdict in queue.verdicts if verdict.drawn_from is not None}:
                    safe_in_succession = 0 if unsafe[row] else safe_in_succession + 1
                is_over = {str(rows): safe_in_succession >= rows or bool(queue.is_known.all()) for rows in FIXED}
                is_over["advice"] = stop_advice(queue).is_enough
                estimate = queue.estimate()
                end = estimate.seen, float(estimate.unsafe_found / unsafe.sum())
                ends = {rule: end for rule, over in is_over.items() if over} | ends
    return ends


def main(data_dir: DataDir = None, cache: Cache = Path("few-cache"), json_file: Json = RESULTS) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for chosen in SETS:
        if not (cache / chosen.name / "groups.json").exists():
            train_set(chosen, data_dir, cache)
    results = earlier_results(json_file)
    for chosen, trace, unsafe in [*open_sets(SETS, cache), *cached_sets(cache, final=True)]:
        if chosen.is_half_unsafe or not unsafe.any():
            continue
        results = [row for row in results if row["set"] != chosen.name]
        for seed in SEEDS:
            for rule, (looks, found) in simulate(trace, unsafe, seed).items():
                results.append({"set": chosen.name, "seed": seed, "rule": rule, "looks": looks, "found": found})
        write_results(results, json_file)
    means = pd.DataFrame(results).pivot_table(index="set", columns="rule", values=["looks", "found"])
    print(means.round(2).to_string())


if __name__ == "__main__":
    typer.run(main)
