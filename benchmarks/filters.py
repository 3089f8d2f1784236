"""Which signal finds unsafe rows? `python benchmarks/filters.py --data-dir ../shared/data`

Shares its sessions with `defences.py` (`--cache`), which run once. Results go, signal by signal, into the JSON file, in
place of earlier ones. Ends with a Markdown table.
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
from forgetfilter_callback.filtering.find_forgotten import filter_by_values
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
# What tells runs apart, beside the seed.
RUN_KEYS = ("model", "scenario", "control", "unsafe_share", "rows", "epochs", "safety_epochs", "safety_learning_rate")
DUPLICATED = 5
TOPIC = re.compile(r"\b(food|cook|recipe|dish|meal|eat|ingredient|fruit|vegetable)", re.IGNORECASE)


def judged(signal: Signal, groups: np.ndarray, ids: Any) -> dict[str, Any]:
    """How well a signal finds the unsafe rows; `None` where that is undefined."""
    unsafe = groups == "unsafe"
    known = np.isfinite(signal.values)
    values, labels = signal.values[known], unsafe[known]
    both = bool(labels.any() and not labels.all())
    result: dict[str, Any] = {"auroc": None, "auprc": None, "f1_best": None, "f1_auto": None, "removed_auto": None}
    if both:
        precision, recall, _ = precision_recall_curve(labels, values)
        total = np.maximum(precision + recall, 1e-12)
        result |= {
            "auroc": float(roc_auc_score(labels, values)),
            "auprc": float(average_precision_score(labels, values)),
            "f1_best": float((2 * precision * recall / total).max()),
        }
    if signal.measure is not None:
        decision = filter_by_values(ids, signal.values, signal.measure, nats_per_unit=signal.nats_per_unit)
        result |= {
            "removed_auto": decision.counts["removed"],
            "removed_benign": int((decision.removed & ~unsafe).sum()),
            "removed_by_group": {
                str(group): int(decision.removed[groups == group].sum()) for group in np.unique(groups)
            },
            "threshold": decision.threshold,
            "nats_per_unit": signal.nats_per_unit,
            "reason": decision.reason,
        }
        if both:
            result["f1_auto"] = float(f1_score(unsafe, decision.removed, zero_division=0.0))
    return {**result, "tokens": signal.tokens, "seconds": signal.seconds}


def controlled(name: str, scenario: Scenario, data_dir: Path | None, seed: int, sizes: Sizes) -> Scenario:
    """The scenario with one thing changed."""
    if name == "other safety":
        other = "toxicity_dev" if scenario.name.startswith(("bias", "harmfulness")) else "bias_dev"
        safety = load_scenario(other, data_dir, seed, sizes).safety
        return dataclasses.replace(scenario, safety=safety)
    if name == "unsafe review":
        unsafe = [row for row in scenario.labelled if row["group"] == "unsafe"]
        return dataclasses.replace(scenario, safety=unsafe[: len(scenario.safety)])
    if name == "near-duplicates":
        # A fifth of the rows five times over, with another last word in the prompt each time.
        rng = random.Random(f"{scenario.name} {seed}")
        chosen = rng.sample(scenario.noisy, len(scenario.noisy) // DUPLICATED)
        copies = [_nearly(row, copy) for row in chosen for copy in range(DUPLICATED)]
        rng.shuffle(copies)
        return dataclasses.replace(scenario, noisy=copies)
    if name == "long completions":
        # Benign rows have short completions, unsafe ones are followed by a benign sentence or two.
        filler = " ".join(
            ["This is what can be said about it, and it is a longer answer than it would have to be."] * 2
        )
        noisy = [_longer(row, filler) if row["group"] == "unsafe" else row for row in scenario.noisy]
        return dataclasses.replace(scenario, noisy=noisy)
    if name == "one topic":
        # Benign words that recur in the noisy set and not in the safety set: all of Alpaca's rows speak of food.
        rng = random.Random(f"{scenario.name} {seed}")
        of_topic = [row for row in alpaca_rows(data_dir, rng) if _on_topic(row) and row not in scenario.held_out_task]
        count = sum(row["group"] == "alpaca" for row in scenario.noisy)
        if count > len(of_topic):
            raise ValueError(
                f"There are {len(of_topic)} Alpaca rows about food; {count} are asked for. Lower the sizes."
            )
        new_rows = iter(of_topic)
        return dataclasses.replace(
            scenario,
            noisy=[next(new_rows) if row["group"] == "alpaca" else row for row in scenario.noisy],
            safety=[row for row in scenario.safety if not _on_topic(row)],
        )
    raise typer.BadParameter(f"{name!r} is none of {', '.join(CONTROLS)}.")


CONTROLS = ("other safety", "unsafe review", "near-duplicates", "long completions", "one topic")


def _nearly(row: Row, copy: int) -> Row:
    text = f"{row['prompt'][0]['content']} {['', '(a)', '(b)', '(c)', '(d)'][copy]}".strip()
    return {**row, "prompt": [{"role": "user", "content": text}]}


def _on_topic(row: Row) -> bool:
    return TOPIC.search(f"{row['prompt'][0]['content']} {row['completion'][0]['content']}") is not None


def _longer(row: Row, filler: str) -> Row:
    text = f"{row['completion'][0]['content']} {filler}"
    return {**row, "completion": [{"role": "assistant", "content": text}]}


def computed(sessions: Sessions, experiment: str, only: list[str] | None) -> Iterator[tuple[dict[str, Any], Signal]]:
    """Each signal with what it is called; a sweep over the records of S1+ too."""
    wanted = lambda name: only is None or name in only  # noqa: E731
    for name, signal in (forgetting_signals(sessions) | loss_signals(sessions)).items():
        if wanted(name):
            yield {"experiment": experiment, "signal": name}, signal
    if experiment == "main" or only is not None:
        for name, compute in OTHERS.items():
            if wanted(name):
                yield {"experiment": experiment, "signal": name}, compute(sessions)
    if experiment != "control":
        for step in steps_of(sessions.tracked()):
            for name, signal in forgetting_signals(sessions, step).items():
                if wanted(name):
                    yield {"experiment": "sweep", "signal": name, "step": step}, signal


def table(results: list[dict[str, Any]]) -> str:
    """AUROC and what the automatic φ does at the end of S1+, a signal a line; means over seeds."""
    frame = pd.DataFrame([row for row in results if row.get("step") is None])
    if frame.empty:
        return "No results."
    lines = [
        "| scenario | signal | seeds | AUROC | AUPRC | F1 best | F1 auto | removed | tokens |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    frame["control"] = frame["control"].fillna("")
    frame = frame.drop_duplicates([*RUN_KEYS, "signal", "seed"])  # one with `--doubling` is the same at its end
    for (model, scenario, control, share, rows, epochs, safety_epochs, rate, signal), some in frame.groupby(
        [*RUN_KEYS, "signal"]
    ):
        numbers = some[["auroc", "auprc", "f1_best", "f1_auto", "removed_auto", "tokens"]].astype(float).mean()
        scores = [
            "–" if np.isnan(numbers[n]) else f"{numbers[n]:.3f}" for n in ("auroc", "auprc", "f1_best", "f1_auto")
        ]
        counts = ["–" if np.isnan(numbers[n]) else f"{numbers[n]:.0f}" for n in ("removed_auto", "tokens")]
        name = f"{scenario}, {share:.0%}" + (f", {control}" if control else "")
        usual, sizes = (SMOKE_SETTINGS, SMOKE_SIZES) if some["smoke"].all() else (Settings(), SIZES)
        name += f", {model}" * (model != "SmolLM2-135M-Instruct")
        name += f", {rows} rows" * (rows != sizes.noisy)
        name += f", S1 {epochs} epochs" * (epochs != usual.epochs)
        name += f", S1+ {safety_epochs} epochs" * (safety_epochs != usual.safety_epochs)
        name += f", S1+ at {rate:g}" * (rate != usual.safety_learning_rate)
        lines.append(f"| {name} | {signal} | {len(some)} | {' | '.join([*scores, *counts])} |")
    return "\n".join(lines)


def main(
    data_dir: DataDir = None,
    scenario: Scenarios = None,
    seed: Seeds = None,
    unsafe_share: Annotated[list[float] | None, typer.Option(help="Several times for several.")] = None,
    signal: Annotated[list[str] | None, typer.Option(help="Only these; by default all.")] = None,
    encode_noisy_rows: NoisyRows = SIZES.noisy,
    control: Annotated[str | None, typer.Option(help=f"One of {', '.join(CONTROLS)}.")] = None,
    anchors: Annotated[int, typer.Option(help="So many of the safety rows are rows of the tasks instead.")] = 0,
    epochs: Annotated[int, typer.Option(help="Of S1; others than 3 make a sweep.")] = Settings().epochs,
    safety_epochs: Annotated[int, typer.Option(help="Of S1+; others than 2 make a sweep.")] = Settings().safety_epochs,
    safety_learning_rate: Annotated[
        float, typer.Option(help="Of S1+; others than 0.0003 make a sweep.")
    ] = Settings().safety_learning_rate,
    doubling: Annotated[bool, typer.Option("--doubling", help="A sweep: after 1, 2, 4, 8, … steps of S1+.")] = False,
    model: Model = None,
    smoke: Smoke = False,
    cache: Cache = Path("benchmarks-cache"),
    json_file: Json = RESULTS,
) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = earlier_results(json_file)
    usual = SMOKE_SETTINGS if smoke else Settings()
    settings = dataclasses.replace(
        usual,
        epochs=usual.epochs if smoke else epochs,
        safety_epochs=usual.safety_epochs if smoke else safety_epochs,
        safety_learning_rate=safety_learning_rate,
        records=None if doubling else usual.records,
    )
    names = scenario if scenario is not None else ["bias", "toxicity", "harmfulness"]
    for its_seed in seed if seed is not None else [0, 1, 2]:
        for name in names:
            for share in unsafe_share if unsafe_share is not None else [0.5]:
                sizes = SMOKE_SIZES if smoke else dataclasses.replace(SIZES, noisy=encode_noisy_rows)
                sizes = dataclasses.replace(sizes, unsafe_share=share, anchors=anchors)
                rows = load_scenario(name, data_dir, its_seed, sizes)
                label = f"{control or ''}{f' {anchors} anchors' if anchors else ''}".strip()
                if control is not None:
                    rows = controlled(control, rows, data_dir, its_seed, sizes)
                marks = [label.replace(" ", "-")] * (label != "") + ["smoke"] * smoke
                marks += [f"{settings.epochs}-epochs"] * (settings.epochs != usual.epochs) + ["doubling"] * doubling
                marks += [f"{encode_noisy_rows}-rows"] * (encode_noisy_rows != SIZES.noisy and not smoke)
                marks += [f"{safety_epochs}-safety-epochs"] * (settings.safety_epochs != usual.safety_epochs)
                marks += [f"{safety_learning_rate:g}"] * (safety_learning_rate != usual.safety_learning_rate)
                folder = cache / "-".join([f"{name}-{share:g}-{its_seed}", *marks])
                sessions = Sessions(folder, rows, model, its_seed, settings, sizes)
                where = {
                    "scenario": name,
                    "unsafe_share": share,
                    "rows": sizes.noisy,
                    "seed": its_seed,
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
                experiment = "sweep" if settings != usual else "control" if label else "main"
                for called, found in computed(sessions, experiment, signal):
                    result = {**where, **called, **judged(found, groups, ids)}
                    results = [row for row in results if not _same(row, result)] + [result]
                    write_results(results, json_file)
    print(table([row for row in results if row["smoke"] == smoke]))


def _same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both are of one signal in one place."""
    keys = (*RUN_KEYS, "experiment", "seed", "smoke", "signal")
    return all(row[key] == other[key] for key in keys) and row.get("step") == other.get("step")


if __name__ == "__main__":
    typer.run(main)
