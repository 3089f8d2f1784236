"""Noisy sets with few unsafe rows: `python benchmarks/few.py train` makes traces, `python benchmarks/few.py judge` judges.

`train` runs noisy and safety finetuning on each set and keeps the trace in `--cache`. It is resumable: a set that is in
the cache is skipped. `judge` computes every signal from the traces, which takes seconds.

A signal is judged by how many unsafe rows a reviewer sees who reads the rows from the top.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from sklearn.metrics import average_precision_score, roc_auc_score
from transformers.utils import logging

from forgetfilter_callback import Trace, find_forgotten
from forgetfilter_callback.review.verdicts import VerdictLabel
from forgetfilter_callback.utils.atomic_files import write_json
from rankings import rankings
from scenarios import Sizes, load_scenario
from sessions import Cache, DataDir, Json, Sessions, Settings, earlier_results, write_results


RESULTS = Path(__file__).parent / "results" / "few.json"
FEW_SETTINGS = Settings(safety_epochs=3, safety_learning_rate=1e-3, records=0.5)
FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1)
LOOKS = (0.025, 0.05, 0.1, 0.2)  # fractions of the noisy set that a reviewer reads
# The sets that measures and settings were chosen on. The others were judged once, at the end.
DEVELOPMENT = {"bias_dev": (0,), "toxicity_dev": (0,), "harmfulness": (0,), "mixed": (0,)}
FINAL = {"bias": (0, 1, 2), "toxicity": (0, 1, 2), "harmfulness": (1, 2), "mixed": (1, 2)}
# Seeds of sets with 5 % unsafe rows, for a test of the second version of the review. No setting was chosen on them.
LATER_SEEDS = (3, 4, 5)


@dataclass(frozen=True)
class Set:
    """A noisy set: `fraction` of its `rows` rows are unsafe."""

    scenario: str
    fraction: float
    rows: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.scenario}-{self.fraction:g}-{self.rows}-{self.seed}"

    @property
    def is_half_unsafe(self) -> bool:
        """Whether this is a set of `filters.py`, which has the settings and the rows from there."""
        return self.fraction == 0.5

    @property
    def sizes(self) -> Sizes:
        if self.is_half_unsafe:
            return Sizes()
        # The 110 safety rows are limited by the number of clean texts. Refusals need anchors (see the scenarios).
        safety = 110 if self.rows <= 600 else 300
        anchors = round(0.4 * safety) if self.scenario == "harmfulness" else 0
        return Sizes(self.rows, self.fraction, safety, anchors, held_out=0, held_out_task=0, labelled=0)

    @property
    def settings(self) -> Settings:
        return Settings() if self.is_half_unsafe else FEW_SETTINGS


def sets(final: bool) -> list[Set]:
    """Lists the development sets or the final sets: 600 rows, 2,000 rows, and 200 rows (5 % and half of them unsafe)."""
    seeds = FINAL if final else DEVELOPMENT
    large = ("bias", "harmfulness") if final else ("bias_dev", "toxicity_dev")
    return [
        *(Set(name, fraction, 600, seed) for name in seeds for fraction in FRACTIONS for seed in seeds[name]),
        *(Set(name, 0.05, 600, seed) for name in seeds for seed in LATER_SEEDS if final),
        *(Set(name, fraction, 2000, seeds[name][0]) for name in large for fraction in (0.01, 0.05)),
        *(Set(name, 0.05, 200, seeds[name][0]) for name in seeds),
        *(Set(name, 0.5, 200, seed) for name in seeds if name != "mixed" for seed in seeds[name]),
    ]


def train_set(chosen: Set, data_dir: Path | None, cache: Path) -> Sessions:
    """Runs both sessions of a set, and keeps the trace and the groups of its rows in the cache."""
    scenario = load_scenario(chosen.scenario, data_dir, chosen.seed, chosen.sizes)
    sessions = Sessions(cache / chosen.name, scenario, None, chosen.seed, chosen.settings, chosen.sizes)
    sessions.tracked()
    write_json([row["group"] for row in scenario.noisy], cache / chosen.name / "groups.json")
    return sessions


def cached_sets(cache: Path, final: bool) -> Iterator[tuple[Set, Trace, np.ndarray]]:
    """Opens the development sets or the final sets that are in the cache (see [`open_sets`])."""
    return open_sets(sets(final), cache)


def open_sets(chosen_sets: Iterable[Set], cache: Path) -> Iterator[tuple[Set, Trace, np.ndarray]]:
    """Opens those sets that are in the cache: the set, its trace, and which of its rows are unsafe."""
    for chosen in chosen_sets:
        groups_file = cache / chosen.name / "groups.json"
        if groups_file.exists():
            unsafe = np.array(json.loads(groups_file.read_text())) == "unsafe"
            yield chosen, Trace.open(cache / chosen.name / "forgetfilter"), unsafe


def verdicts_on(rows: Sequence[int], unsafe: np.ndarray) -> dict[int, VerdictLabel]:
    """The verdicts of a reviewer who makes no mistakes."""
    return {row: "unsafe" if unsafe[row] else "safe" for row in rows}


def judged(values: np.ndarray, unsafe: np.ndarray) -> dict[str, Any]:
    """Measures how early the unsafe rows come in a ranking. All figures are `None` in a clean set."""
    count = int(unsafe.sum())
    looks = {f"recall_at_{share:g}": None for share in LOOKS}
    if count == 0:
        return {"unsafe": 0, "auroc": None, "auprc": None, "precision_at_n": None, **looks}
    ranked = unsafe[np.argsort(-values, kind="stable")]
    return {
        "unsafe": count,
        "auroc": float(roc_auc_score(unsafe, values)),
        "auprc": float(average_precision_score(unsafe, values)),
        "precision_at_n": float(ranked[:count].mean()),
        **{f"recall_at_{share:g}": float(ranked[: round(share * len(ranked))].sum() / count) for share in LOOKS},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Formats AUROC / AUPRC, one line per signal and one column per scenario and fraction: means over seeds."""
    frame = pd.DataFrame(results).dropna(subset=["auprc"])
    if frame.empty:
        return "No set has an unsafe row."
    frame["set"] = frame["scenario"] + " " + frame["fraction"].map("{:g}".format) + " of " + frame["rows"].astype(str)
    means = frame.groupby(["signal", "set"], sort=False)[["auroc", "auprc"]].mean()
    cells = means["auroc"].map("{:.3f}".format) + " / " + means["auprc"].map("{:.2f}".format)
    return cells.unstack("set").to_string()


app = typer.Typer(help=__doc__)
Final = Annotated[bool, typer.Option("--final", help="Use the final sets instead of the development sets.")]


@app.command()
def train(data_dir: DataDir = None, cache: Cache = Path("few-cache"), final: Final = False) -> None:
    """Run the sessions of all sets that are not in the cache."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for chosen in sets(final):
        if not (cache / chosen.name / "groups.json").exists():
            print(chosen.name, flush=True)
            train_set(chosen, data_dir, cache)


@app.command()
def judge(cache: Cache = Path("few-cache"), final: Final = False, json_file: Json = RESULTS) -> None:
    """Judge all signals and the automatic φ on the sets in the cache. Results replace earlier ones of the same sets."""
    results = earlier_results(json_file)
    names = set()
    for chosen, trace, unsafe in cached_sets(cache, final):
        names.add(chosen.name)
        results = [row for row in results if row["set"] != chosen.name]
        settings = {"set": chosen.name, "scenario": chosen.scenario, "fraction": chosen.fraction, "rows": chosen.rows}
        for signal, values in rankings(trace).items():
            results.append({**settings, "seed": chosen.seed, "signal": signal, **judged(values, unsafe)})
        removed = find_forgotten(trace).removed
        counts = {"removed": int(removed.sum()), "unsafe_removed": int((removed & unsafe).sum())}
        results.append({**settings, "seed": chosen.seed, "signal": "automatic φ", **counts})
    write_results(results, json_file)
    print(table([row for row in results if row["set"] in names]))


if __name__ == "__main__":
    app()
