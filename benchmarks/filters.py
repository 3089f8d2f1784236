"""Compare signals by how well they find unsafe rows: `python benchmarks/filters.py --data-dir ../shared/data`.

Sessions are cached in `--cache` and shared with `defences.py`. Each result replaces an earlier one of the same signal
and settings in the JSON file. Prints a Markdown table at the end.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score
from transformers.utils import logging

from forgetfilter_callback import encode_rows
from forgetfilter_callback.cli.demo_model import computing_dtype
from forgetfilter_callback.filtering.config import FilterConfig
from forgetfilter_callback.filtering.filter_by_values import filter_by_values
from scenarios import Row, Scenario, Sizes, alpaca_rows, load_scenario
from sessions import (
    SIZES,
    SMOKE_SETTINGS,
    SMOKE_SIZES,
    Cache,
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
from signals import OTHERS, Signal, forgetting_signals, loss_signals, steps_of


RESULTS = Path(__file__).parent / "results" / "filters.json"
# The keys that identify a run, in addition to the seed.
RUN_KEYS = ("model", "scenario", "control", "unsafe_share", "rows", "epochs", "safety_epochs", "safety_learning_rate")
DUPLICATES = 5  # copies of each row in the control "near-duplicates"
TOPIC = re.compile(r"\b(food|cook|recipe|dish|meal|eat|ingredient|fruit|vegetable)", re.IGNORECASE)


def judged(signal: Signal, groups: np.ndarray, ids: Any) -> dict[str, Any]:
    """Measures how well a signal finds the unsafe rows. Undefined figures are `None`."""
    unsafe = groups == "unsafe"
    finite = np.isfinite(signal.values)
    values, labels = signal.values[finite], unsafe[finite]
    has_both_classes = bool(labels.any() and not labels.all())
    result: dict[str, Any] = {"auroc": None, "auprc": None, "f1_best": None, "f1_auto": None, "removed_auto": None}
    if has_both_classes:
        precision, recall, _ = precision_recall_curve(labels, values)
        denominator = np.maximum(precision + recall, 1e-12)
        result |= {
            "auroc": float(roc_auc_score(labels, values)),
            "auprc": float(average_precision_score(labels, values)),
            "f1_best": float((2 * precision * recall / denominator).max()),
        }
    if signal.measure is not None:
        filtered = filter_by_values(
            ids, signal.values, FilterConfig(measure=signal.measure), nats_per_unit=signal.nats_per_unit
        )
        result |= {
            "removed_auto": filtered.counts["removed"],
            "removed_benign": int((filtered.removed & ~unsafe).sum()),
            "removed_by_group": {
                str(group): int(filtered.removed[groups == group].sum()) for group in np.unique(groups)
            },
            "threshold": filtered.threshold,
            "nats": signal.nats_per_unit,
            "reason": filtered.reason,
        }
        if has_both_classes:
            result["f1_auto"] = float(f1_score(unsafe, filtered.removed, zero_division=0.0))
    return {**result, "tokens": signal.tokens, "seconds": signal.seconds}


def controlled(name: str, scenario: Scenario, data_dir: Path | None, seed: int, sizes: Sizes) -> Scenario:
    """Changes one thing in a scenario.

    Raises:
        ValueError: if a data set has too few rows for the control.
        typer.BadParameter: if there is no control with this name.
    """
    if name == "other safety":
        other = "toxicity_dev" if scenario.name.startswith(("bias", "harmfulness")) else "bias_dev"
        safety = load_scenario(other, data_dir, seed, sizes).safety
        return dataclasses.replace(scenario, safety=safety)
    if name == "unsafe review":
        unsafe = [row for row in scenario.labelled if row["group"] == "unsafe"]
        return dataclasses.replace(scenario, safety=unsafe[: len(scenario.safety)])
    if name == "near-duplicates":
        # A fifth of the rows, five times each, with a different last word in the prompt.
        rng = random.Random(f"{scenario.name} {seed}")
        chosen = rng.sample(scenario.noisy, len(scenario.noisy) // DUPLICATES)
        copies = [_near_duplicate(row, copy) for row in chosen for copy in range(DUPLICATES)]
        rng.shuffle(copies)
        return dataclasses.replace(scenario, noisy=copies)
    if name == "long completions":
        # Two benign sentences follow each unsafe completion.
        filler = " ".join(
            ["This is what can be said about it, and it is a longer answer than it would have to be."] * 2
        )
        noisy = [_lengthen(row, filler) if row["group"] == "unsafe" else row for row in scenario.noisy]
        return dataclasses.replace(scenario, noisy=noisy)
    if name == "one topic":
        # All Alpaca rows are about food, so that benign words recur in the noisy set and not in the safety set.
        rng = random.Random(f"{scenario.name} {seed}")
        topic_rows = [row for row in alpaca_rows(data_dir, rng) if _on_topic(row) and row not in scenario.held_out_task]
        count = sum(row["group"] == "alpaca" for row in scenario.noisy)
        if count > len(topic_rows):
            raise ValueError(
                f"There are {len(topic_rows)} Alpaca rows about food, but {count} are needed. Reduce the sizes."
            )
        new_rows = iter(topic_rows)
        return dataclasses.replace(
            scenario,
            noisy=[next(new_rows) if row["group"] == "alpaca" else row for row in scenario.noisy],
            safety=[row for row in scenario.safety if not _on_topic(row)],
        )
    raise typer.BadParameter(f"There is no control {name!r}. Choose one of {', '.join(CONTROLS)}.")


CONTROLS = ("other safety", "unsafe review", "near-duplicates", "long completions", "one topic")


def _near_duplicate(row: Row, copy: int) -> Row:
    text = f"{row['prompt'][0]['content']} {['', '(a)', '(b)', '(c)', '(d)'][copy]}".strip()
    return {**row, "prompt": [{"role": "user", "content": text}]}


def _on_topic(row: Row) -> bool:
    return TOPIC.search(f"{row['prompt'][0]['content']} {row['completion'][0]['content']}") is not None


def _lengthen(row: Row, filler: str) -> Row:
    text = f"{row['completion'][0]['content']} {filler}"
    return {**row, "completion": [{"role": "assistant", "content": text}]}


def compute_signals(
    sessions: Sessions, experiment: str, only: list[str] | None
) -> Iterator[tuple[dict[str, Any], Signal]]:
    """Computes the signals, also at the intermediate records of safety finetuning. Yields result keys and signal."""

    def is_selected(name: str) -> bool:
        return only is None or name in only

    for name, signal in (forgetting_signals(sessions) | loss_signals(sessions)).items():
        if is_selected(name):
            yield {"experiment": experiment, "signal": name}, signal
    if experiment == "main" or only is not None:
        for name, compute in OTHERS.items():
            if is_selected(name):
                yield {"experiment": experiment, "signal": name}, compute(sessions)
    if experiment != "control":
        for step in steps_of(sessions.tracked()):
            for name, signal in forgetting_signals(sessions, step).items():
                if is_selected(name):
                    yield {"experiment": "sweep", "signal": name, "step": step}, signal


def table(results: list[dict[str, Any]]) -> str:
    """Formats a table with one line per signal at the end of safety finetuning: means over seeds."""
    frame = pd.DataFrame([row for row in results if row.get("step") is None])
    if frame.empty:
        return "No results."
    lines = [
        "| scenario | signal | seeds | AUROC | AUPRC | F1 best | F1 auto | removed | tokens |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    frame["control"] = frame["control"].fillna("")
    frame = frame.drop_duplicates([*RUN_KEYS, "signal", "seed"])  # a run with `--doubling` has the same last record
    for (model, scenario, control, unsafe_fraction, rows, epochs, safety_epochs, rate, signal), runs in frame.groupby(
        [*RUN_KEYS, "signal"]
    ):
        means = runs[["auroc", "auprc", "f1_best", "f1_auto", "removed_auto", "tokens"]].astype(float).mean()
        scores = [
            "–" if np.isnan(means[key]) else f"{means[key]:.3f}" for key in ("auroc", "auprc", "f1_best", "f1_auto")
        ]
        counts = ["–" if np.isnan(means[key]) else f"{means[key]:.0f}" for key in ("removed_auto", "tokens")]
        name = f"{scenario}, {unsafe_fraction:.0%}" + (f", {control}" if control else "")
        defaults, sizes = (SMOKE_SETTINGS, SMOKE_SIZES) if runs["smoke"].all() else (Settings(), SIZES)
        name += f", {model}" * (model != "SmolLM2-135M-Instruct")
        name += f", {rows} rows" * (rows != sizes.noisy)
        name += f", S1 {epochs} epochs" * (epochs != defaults.epochs)
        name += f", S1+ {safety_epochs} epochs" * (safety_epochs != defaults.safety_epochs)
        name += f", S1+ at {rate:g}" * (rate != defaults.safety_learning_rate)
        lines.append(f"| {name} | {signal} | {len(runs)} | {' | '.join([*scores, *counts])} |")
    return "\n".join(lines)


def main(
    data_dir: DataDir = None,
    scenario: Scenarios = None,
    seed: Seeds = None,
    unsafe_share: Annotated[
        list[float] | None, typer.Option(help="Fraction of the noisy set that is unsafe; can be given several times.")
    ] = None,
    signal: Annotated[
        list[str] | None, typer.Option(help="Compute only this signal; can be given several times.")
    ] = None,
    noisy_rows: NoisyRows = SIZES.noisy,
    control: Annotated[
        str | None, typer.Option(help=f"Change one thing in the scenario: {', '.join(CONTROLS)}.")
    ] = None,
    anchors: Annotated[int, typer.Option(help="Number of safety rows that are replaced by task rows.")] = 0,
    epochs: Annotated[
        int, typer.Option(help="Epochs of noisy finetuning. Other values than 3 are stored as a sweep.")
    ] = Settings().epochs,
    safety_epochs: Annotated[
        int, typer.Option(help="Epochs of safety finetuning. Other values than 2 are stored as a sweep.")
    ] = Settings().safety_epochs,
    safety_learning_rate: Annotated[
        float, typer.Option(help="Learning rate of safety finetuning. Other values than 0.0003 are stored as a sweep.")
    ] = Settings().safety_learning_rate,
    doubling: Annotated[
        bool, typer.Option("--doubling", help="Record after 1, 2, 4, 8, … steps of safety finetuning (a sweep).")
    ] = False,
    model: Model = None,
    smoke: Smoke = False,
    cache: Cache = Path("benchmarks-cache"),
    json_file: Json = RESULTS,
) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = earlier_results(json_file)
    defaults = SMOKE_SETTINGS if smoke else Settings()
    settings = dataclasses.replace(
        defaults,
        epochs=defaults.epochs if smoke else epochs,
        safety_epochs=defaults.safety_epochs if smoke else safety_epochs,
        safety_learning_rate=safety_learning_rate,
        records=None if doubling else defaults.records,
    )
    names = scenario if scenario is not None else ["bias", "toxicity", "harmfulness"]
    for run_seed in seed if seed is not None else [0, 1, 2]:
        for name in names:
            for fraction in unsafe_share if unsafe_share is not None else [0.5]:
                sizes = SMOKE_SIZES if smoke else dataclasses.replace(SIZES, noisy=noisy_rows)
                sizes = dataclasses.replace(sizes, unsafe_share=fraction, anchors=anchors)
                rows = load_scenario(name, data_dir, run_seed, sizes)
                label = f"{control or ''}{f' {anchors} anchors' if anchors else ''}".strip()
                if control is not None:
                    rows = controlled(control, rows, data_dir, run_seed, sizes)
                suffixes = [label.replace(" ", "-")] * (label != "") + ["smoke"] * smoke
                suffixes += [f"{settings.epochs}-epochs"] * (settings.epochs != defaults.epochs) + [
                    "doubling"
                ] * doubling
                suffixes += [f"{noisy_rows}-rows"] * (noisy_rows != SIZES.noisy and not smoke)
                suffixes += [f"{safety_epochs}-safety-epochs"] * (settings.safety_epochs != defaults.safety_epochs)
                suffixes += [f"{safety_learning_rate:g}"] * (safety_learning_rate != defaults.safety_learning_rate)
                folder = cache / "-".join([f"{name}-{fraction:g}-{run_seed}", *suffixes])
                sessions = Sessions(folder, rows, model, run_seed, settings, sizes)
                settings_of_run = {
                    "scenario": name,
                    "unsafe_share": fraction,
                    "rows": sizes.noisy,
                    "seed": run_seed,
                    "control": label or None,
                    "epochs": settings.epochs,
                    "safety_epochs": settings.safety_epochs,
                    "safety_learning_rate": safety_learning_rate,
                    "model": model or "SmolLM2-135M-Instruct",
                    "smoke": smoke,
                    "dtype": str(computing_dtype()),
                    "cores": torch.get_num_threads(),
                }
                groups = np.array([row["group"] for row in rows.noisy])
                ids = encode_rows(rows.noisy, sessions.tokenizer, disable_tqdm=True).ids
                experiment = "sweep" if settings != defaults else "control" if label else "main"
                for keys, found in compute_signals(sessions, experiment, signal):
                    result = {**settings_of_run, **keys, **judged(found, groups, ids)}
                    results = [row for row in results if not _same(row, result)] + [result]
                    write_results(results, json_file)
    print(table([row for row in results if row["smoke"] == smoke]))


def _same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Returns whether two results have the same signal, run and record."""
    keys = (*RUN_KEYS, "experiment", "seed", "smoke", "signal")
    return all(row[key] == other[key] for key in keys) and row.get("step") == other.get("step")


if __name__ == "__main__":
    typer.run(main)
