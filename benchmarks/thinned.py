"""The automatic φ at other shares of unsafe rows: `python benchmarks/thinned.py --data-dir ../shared/data --cache CACHE`.

Of runs that `filters.py` has in its cache (half unsafe), rows are left out until so many are unsafe, and forgetting is
measured anew. They were learnt with all rows: a run of its own at that share (`filters.py --unsafe-share`) says more. Prints
a table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from sklearn.metrics import f1_score, precision_recall_curve

from forgetfilter_callback import Trace, decide
from forgetfilter_callback.forgetting import nats_per_change, smoothed_forgetting
from scenarios import Sizes, load_scenario
from sessions import DataDir, Scenarios, Seeds


SHARES = (0, 0.05, 0.1, 0.25, 0.75)
DRAWS = 6


def drawn(unsafe: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Places of rows of which `share` are unsafe: as many as there are (of none: nine tenths of the safe ones)."""
    bad, good = np.flatnonzero(unsafe), np.flatnonzero(~unsafe)
    if share == 0:
        return np.sort(rng.choice(good, round(0.9 * len(good)), replace=False))
    if share < 0.5:
        bad = rng.choice(bad, round(len(good) * share / (1 - share)), replace=False)
    else:
        good = rng.choice(good, round(len(bad) * (1 - share) / share), replace=False)
    return np.sort(np.concatenate([bad, good]))


def forgetting(trace: Trace, places: np.ndarray) -> tuple[np.ndarray, float]:
    """Of the samples at `places`, as if there were no others; and the nats of a typical change."""
    before, after = trace.first_and_last()
    rows = trace.rows.select(places)
    bounds = zip(trace.rows.counted_offsets[places], trace.rows.counted_offsets[places + 1], strict=True)
    tokens = np.concatenate([np.arange(start, end) for start, end in bounds])
    first, last = (trace.token_losses(record)[tokens] for record in (before, after))
    values = smoothed_forgetting(rows.counted_tokens, rows.counted_offsets, first, last, trace.states(before)[places])
    return values, nats_per_change(values, first, last, rows.counted_offsets)


def main(
    cache: Annotated[Path, typer.Option(help="That of filters.py.")] = Path("benchmarks-cache"),
    data_dir: DataDir = None,
    scenario: Scenarios = None,
    seed: Seeds = None,
) -> None:
    print(
        "| scenario | seed | unsafe | F1 automatic | F1 best | safe rows removed | 95 % of safe below | unsafe median |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in scenario if scenario is not None else ["bias", "toxicity"]:
        for its_seed in seed if seed is not None else [0, 1, 2]:
            trace = Trace.open(cache / f"{name}-0.5-{its_seed}" / "forgetfilter")
            rows = load_scenario(name, data_dir, its_seed, Sizes()).noisy
            unsafe = np.array([row["group"] == "unsafe" for row in rows])
            rng = np.random.default_rng(0)
            for share in SHARES:
                figures = []
                for _ in range(DRAWS):
                    places = drawn(unsafe, share, rng)
                    (values, nats), labels = forgetting(trace, places), unsafe[places]
                    removed = decide(trace.rows.ids.take(places), values, "smoothed", nats=nats).removed
                    best = middle = 0.0
                    if labels.any():
                        middle = np.median(values[labels])
                        precision, recall, _ = precision_recall_curve(labels, values)
                        best = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
                    found = f1_score(labels, removed, zero_division=0.0)
                    lost, most = (removed & ~labels).sum() / (~labels).sum(), np.quantile(values[~labels], 0.95)
                    figures.append([found, best, lost, most, middle])
                automatic, best, lost, most, middle = np.mean(figures, axis=0)
                scores = ("–", "–") if share == 0 else (f"{automatic:.3f}", f"{best:.3f}")
                shown = [name, str(its_seed), f"{share:.0%}", *scores, f"{lost:.1%}", f"{most:.2f}"]
                shown.append("–" if share == 0 else f"{middle:.2f}")
                print(f"| {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
