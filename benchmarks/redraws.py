"""Check the promises of a review: `python benchmarks/redraws.py --cache few-cache`.

Rows of a stored trace are drawn at random and reviewed, again and again; once after a usual review. The true groups give the
verdicts. Then:

- Which fraction of the rows that `threshold="fdr"` removes is benign, and which fraction of the unsafe rows does it remove?
  The comparison is the best threshold in hindsight: the lowest one on the same scores at which at most a fraction `LEVEL` of
  the removed rows is benign.
- How often do the 90 % intervals of a usual review contain the number of unsafe rows left? And how often do they contain the
  number of unsafe rows that a filter keeps, and of benign rows that it removes, if it removes a fraction `FRACTION`?
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import typer

from few import Final, cached_sets, verdicts_on
from forgetfilter_callback import FilterConfig, ReviewQueue, Trace, find_forgotten
from forgetfilter_callback.review.estimates import estimate_filter_errors
from forgetfilter_callback.review.false_discoveries import removable_rows
from sessions import Cache, Json, earlier_results, write_results


RESULTS = Path(__file__).parent / "results" / "redraws.json"
LEVEL = 0.1
REDRAWS = 100
LOOKS = 60  # rows of a usual review, some of them drawn at random
ROUND = 10
# Rows of a usual review, and rows reviewed at random after it.
REVIEWS = ((0, 100), (0, 200), (0, 300), (LOOKS, 240))
FRACTION = 0.05


def best_recall(scores: np.ndarray, unsafe: np.ndarray) -> float:
    """The largest recall of a threshold at which at most a fraction `LEVEL` of the removed rows is benign."""
    found = np.cumsum(unsafe[np.argsort(-scores, kind="stable")])
    allowed = found >= (1 - LEVEL) * np.arange(1, len(scores) + 1)
    return float(found[allowed].max(initial=0) / max(unsafe.sum(), 1))


def false_discoveries(trace: Trace, unsafe: np.ndarray, drawn: int, seed: int, looks: int = 0) -> dict[str, Any]:
    """Reviews `looks` rows as a person does, then `drawn` random rows, and removes rows among the others.

    Figures count the rows without a verdict.
    """
    with tempfile.TemporaryDirectory() as folder:
        usual = ReviewQueue(trace, folder, seed=seed)
        for _ in range(looks // ROUND):
            usual.add(verdicts_on(usual.next(ROUND), unsafe))
        queue = ReviewQueue(trace, folder, seed=seed, random_fraction=1)
        queue.add(verdicts_on(queue.next(drawn), unsafe))
        removed = removable_rows(queue, LEVEL).removed
        others = ~queue.is_seen
        return {
            "removed": int(removed.sum()),
            "false_discovery_rate": float((removed & ~unsafe).sum() / max(removed.sum(), 1)),
            "recall": float((removed & unsafe).sum() / max((others & unsafe).sum(), 1)),
            "best_recall": best_recall(queue.scores[others], unsafe[others]),
        }


def intervals(trace: Trace, unsafe: np.ndarray, removed: np.ndarray, seed: int) -> dict[str, Any]:
    """Reviews `LOOKS` rows as a person does, and compares the intervals with the truth. A filter removes `removed`."""
    with tempfile.TemporaryDirectory() as folder:
        queue = ReviewQueue(trace, folder, seed=seed)
        for _ in range(LOOKS // ROUND):
            queue.add(verdicts_on(queue.next(ROUND), unsafe))
        low, high = queue.estimate().unsafe_left
        left = int((unsafe & ~queue.is_known).sum())
        errors = estimate_filter_errors(queue.verdicts, queue.known_labels, removed, [~removed, removed])
        counts = ("kept", errors.unsafe_left, unsafe & ~removed), ("removed", errors.benign_removed, ~unsafe & removed)
        of_filter = {
            f"{name}_covered": interval[0] <= int(wrong.sum()) <= interval[1] for name, interval, wrong in counts
        }
        return {"left": left, "low": low, "high": high, "below": left < low, "above": left > high, **of_filter}


def main(cache: Cache = Path("few-cache"), final: Final = False, json_file: Json = RESULTS) -> None:
    results = earlier_results(json_file)
    for chosen, trace, unsafe in cached_sets(cache, final):
        results = [row for row in results if row["set"] != chosen.name]
        for looks, drawn in REVIEWS:
            if looks + drawn >= chosen.rows:
                continue
            redraws = [false_discoveries(trace, unsafe, drawn, seed, looks) for seed in range(REDRAWS)]
            means = pd.DataFrame(redraws).mean().to_dict()
            something = float(np.mean([redraw["removed"] > 0 for redraw in redraws]))
            kind = "fdr after a review" if looks else "fdr"
            results.append({"set": chosen.name, "kind": kind, "drawn": drawn, "removed_something": something, **means})
        removed = find_forgotten(trace, FilterConfig(fraction=FRACTION)).removed
        means = pd.DataFrame([intervals(trace, unsafe, removed, seed) for seed in range(REDRAWS)]).mean().to_dict()
        results.append({"set": chosen.name, "kind": "interval", "looks": LOOKS, **means})
        write_results(results, json_file)
    print(pd.DataFrame(results).round(3).to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
