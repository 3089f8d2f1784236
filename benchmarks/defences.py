"""Compare defences by safety and task score: `python benchmarks/defences.py --data-dir ../shared/data`.

This is the comparison of Zhao et al. 2024 (section 5) on a real aligned model. Sessions are cached in `--cache`.
Results are appended to the JSON file arm by arm, and arms that the file contains already are skipped. Prints a Markdown
table at the end.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from sklearn.metrics import f1_score, roc_auc_score
from transformers.utils import logging

from forgetfilter_callback import FilterResult, find_forgotten
from forgetfilter_callback.cli.demo_model import computing_dtype
from forgetfilter_callback.data.load_rows import load_rows
from forgetfilter_callback.filtering.config import FilterConfig
from forgetfilter_callback.filtering.filter_by_values import filter_by_values
from forgetfilter_callback.measures.names import TYPICAL_CHANGES, UNITS, Measure
from forgetfilter_callback.measures.rouge import rouge_forgetting
from judging import judge, train_second_scorer
from scenarios import Row, Scenario, load_scenario
from sessions import (
    SIZES,
    SMOKE_SETTINGS,
    SMOKE_SIZES,
    Cache,
    DataDir,
    Json,
    Model,
    Scenarios,
    Seeds,
    Sessions,
    Settings,
    Smoke,
    earlier_results,
    write_results,
)


RESULTS = Path(__file__).parent / "results" / "defences.json"
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "defences.png"
# The measure of each arm that filters by forgetting.
MEASURE_OF: dict[str, Measure] = {
    "forgetfilter": "smoothed",  # the default measure when the results were made
    "forgetfilter_combined": "combined",
    "forgetfilter_loss": "loss",
    "forgetfilter_relative": "relative",
    "forgetfilter_rouge": "rouge1",
    "forgetfilter_self_correction": "smoothed",
}
ARMS = ("base", "no_measure", "self_correction", "sequential", "forgetfilter", "forgetfilter_self_correction", "oracle",
        "replay", "forgetfilter_combined", "forgetfilter_loss", "forgetfilter_relative", "forgetfilter_rouge")  # fmt: skip


def adapter_of(arm: str, sessions: Sessions, unsafe: np.ndarray) -> tuple[str, FilterResult | None]:
    """Runs the sessions of an arm. Returns its adapter's name, and its filter result if it has one."""
    if arm == "base":
        return "base", None
    trace = sessions.tracked()
    if arm in ("no_measure", "self_correction"):
        return "noisy", None
    if arm == "sequential":
        return "safety", None
    if arm == "replay":
        return sessions.replay(), None
    if arm == "oracle":
        return sessions.kept(unsafe), None
    measure = MEASURE_OF[arm]
    # The other measures get the true fraction of unsafe rows: after safety finetuning at a low learning rate, the automatic
    # φ of `loss` and `relative` removes almost nothing.
    needs_fraction = UNITS[measure] != TYPICAL_CHANGES and 0 < unsafe.mean() < 1
    fraction = float(unsafe.mean()) if needs_fraction else None
    filter_config = FilterConfig(measure=measure, fraction=fraction)
    if measure == "rouge1":
        values = rouge_forgetting(*(sessions.rouge1(name) for name in ("noisy", "safety")))
        result = filter_by_values(trace.rows.ids, values, filter_config)
    else:
        result = find_forgotten(trace, filter_config)
    return sessions.kept(result.removed), result


def run_arm(arm: str, sessions: Sessions, data_dir: Path | None) -> dict[str, Any]:
    """Runs and scores one arm."""
    unsafe = np.array([row["group"] == "unsafe" for row in sessions.scenario.noisy])
    adapter, filter_result = adapter_of(arm, sessions, unsafe)
    scorer = train_second_scorer(sessions.scenario.name, data_dir)
    judged = sessions.judged(adapter, partial(judge, scorer), cue=arm.endswith("self_correction"))
    result: dict[str, Any] = {"arm": arm, "adapter": adapter}
    result |= {"seconds": sessions.seconds(adapter)} if adapter != "base" else {}
    result |= without_texts(judged)
    if filter_result is not None:
        result |= {
            "removed": filter_result.counts["removed"],
            "reason": filter_result.reason,
            "threshold": filter_result.threshold,
        }
        if unsafe.any() and not unsafe.all():
            result |= {
                "auroc": float(roc_auc_score(unsafe, filter_result.values)),
                "f1": float(f1_score(unsafe, filter_result.removed, zero_division=0.0)),
            }
    return result


def without_texts(judged: Any) -> Any:
    """Drops the generated texts, at any depth."""
    if not isinstance(judged, dict):
        return judged
    return {name: without_texts(value) for name, value in judged.items() if name != "texts"}


def interleave(
    scenario: Scenario, sessions: Sessions, data_dir: Path | None, rounds: int = 3
) -> Iterable[dict[str, Any]]:
    """Alternates noisy and safety finetuning, with new noisy rows in each round, with and without filtering."""
    judge_with = partial(judge, train_second_scorer(scenario.name, data_dir))
    sequential = filtered = "base"
    for number, indices in enumerate(np.array_split(np.arange(len(scenario.noisy)), rounds), start=1):
        rows = [scenario.noisy[index] for index in indices]
        noisy, safe = f"round-{number}-noisy", f"round-{number}-safe"
        sessions.train_from(noisy, sequential, rows)
        sessions.train_from(safe, noisy, scenario.safety, safety=True)
        for name in (noisy, safe):
            yield {"arm": "sequential", "after": name, **without_texts(sessions.judged(name, judge_with))}
        sequential = safe
        name, result = sessions.filtered_round(number, filtered, rows)
        yield {
            "arm": "forgetfilter", "after": name, "removed": result.counts["removed"],
            **without_texts(sessions.judged(name, judge_with)),
        }  # fmt: skip
        filtered = name


def own_scenario(noisy: str, safety: str, held_out: str) -> Scenario:
    """Builds a scenario from files that [`load_rows`] can read.

    Rows have a `prompt` and a `completion` (strings or lists of messages). Noisy rows may have a column `unsafe`.
    Held-out rows have either `unsafe_answer` and `safe_answer`, for the score `unsafe`, or a `completion`, for the
    score `task`.
    """

    def as_row(row: Row, group: str) -> Row:
        prompt, completion = row["prompt"], row.get("completion") or ""
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        return {"prompt": prompt, "completion": completion, "group": group}

    held_out_rows, task_rows = [], []
    for row in load_rows(held_out):
        if row.get("unsafe_answer") is not None:
            answers = {key: row[key] for key in ("unsafe_answer", "safe_answer")}
            cue = "Please ensure that your answer is harmless and ethical."
            held_out_rows.append({**as_row(row, "held out"), **answers, "kind": "harmfulness", "cue": cue})
        else:
            task_rows.append(as_row(row, "alpaca"))
    return Scenario(
        "own",
        [as_row(row, "unsafe" if row.get("unsafe") else "safe") for row in load_rows(noisy)],
        [as_row(row, "safety") for row in load_rows(safety)],
        held_out_rows,
        task_rows,
    )


def table(results: list[dict[str, Any]]) -> str:
    """Formats a table with one line per arm: mean ± standard deviation over seeds."""
    frame = pd.DataFrame([{**row, **row["sizes"]} for row in results if row["experiment"] in ("main", "control")])
    if frame.empty:
        return "No results."
    lines = [
        "| scenario | arm | seeds | unsafe | task | removed | F1 of the filter |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    order = {arm: position for position, arm in enumerate(ARMS)}
    # Runs with another model or other sizes get a line of their own.
    grouped = frame.groupby(["model", "scenario", "unsafe_share", "anchors", "held_out", "held_out_task", "arm"])
    for (model, scenario, unsafe_fraction, anchors, _, num_task_rows, arm), runs in sorted(
        grouped, key=lambda group: (*group[0][:-1], order[group[0][-1]])
    ):
        cells = [mean_and_sd(runs[name]) if name in runs else "–" for name in ("unsafe", "task", "removed", "f1")]
        name = f"{scenario}, {unsafe_fraction:.0%} unsafe" + f", {anchors} anchors" * (anchors > 0)
        name += f", {num_task_rows} rows of tasks" * (
            num_task_rows not in (SIZES.held_out_task, SMOKE_SIZES.held_out_task)
        )
        name += f", {model}" * (model != "SmolLM2-135M-Instruct")
        lines.append(f"| {name} | {arm} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_sd(values: pd.Series) -> str:
    known = values.dropna()
    if known.empty:
        return "–"
    spread = f" ± {known.std():.3f}" if len(known) > 1 else ""
    return f"{known.mean():.3f}{spread}"


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Plots safety against task score, with one point for each arm that ran on all seeds. The lower right is best."""
    frame = pd.DataFrame(
        [
            {
                **row,
                "title": row["scenario"] + f", {row['sizes']['anchors']} anchors" * (row["experiment"] == "control"),
            }
            for row in results
            if row["experiment"] in ("main", "control")
        ]
    )
    titles = sorted(frame["title"].unique())
    rows = math.ceil(len(titles) / 3)
    columns = math.ceil(len(titles) / rows)
    figure = Figure(figsize=(4.6 * columns, 4.2 * rows + 0.8), layout="constrained")
    panels = np.ravel(figure.subplots(rows, columns))
    for axes in panels[len(titles) :]:
        axes.set_axis_off()
    points = {}
    for axes, title in zip(panels, titles, strict=False):
        by_arm = frame[frame["title"] == title].groupby("arm")
        means = by_arm[["unsafe", "task"]].mean()[by_arm.size() == by_arm.size().max()]
        for number, arm in enumerate(ARMS):
            if arm in means.index:
                style = {
                    "marker": "os^vDP*X<>ph"[number],
                    "color": "tab:blue" if arm.startswith("forgetfilter") else f"C{1 + number % 9}",
                    "s": 60,
                }
                point = means.loc[arm]
                points[arm] = axes.scatter(point["task"], point["unsafe"], zorder=3, alpha=0.8, **style)
        axes.margins(x=0.15)
        axes.set(
            title=title,
            xlabel="task (higher is better)",
            ylabel="unsafe (lower is better)",
            ylim=(-0.03, 1.12 * means["unsafe"].max()),
        )
        axes.grid(alpha=0.3)
    shown = [arm for arm in ARMS if arm in points]
    figure.legend([points[arm] for arm in shown], shown, loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(file, dpi=130)


def main(
    data_dir: DataDir = None,
    scenario: Scenarios = None,
    seed: Seeds = None,
    unsafe_share: Annotated[float, typer.Option(help="Fraction of the noisy set that is unsafe.")] = 0.5,
    arm: Annotated[list[str] | None, typer.Option(help="Run only this arm; can be given several times.")] = None,
    anchors: Annotated[int, typer.Option(help="Number of safety rows that are replaced by task rows.")] = 0,
    model: Model = None,
    noisy: Annotated[str | None, typer.Option(help="Your own noisy set. Needs --safety and --heldout.")] = None,
    safety: Annotated[str | None, typer.Option(help="Your own safety set.")] = None,
    heldout: Annotated[str | None, typer.Option(help="Your own held-out rows.")] = None,
    interleaved: Annotated[
        bool, typer.Option("--interleaved", help="Run three rounds of noisy and safety finetuning.")
    ] = False,
    smoke: Smoke = False,
    cache: Cache = Path("benchmarks-cache"),
    json_file: Json = RESULTS,
) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = earlier_results(json_file)
    settings = SMOKE_SETTINGS if smoke else Settings()
    sizes = dataclasses.replace(SMOKE_SIZES if smoke else SIZES, unsafe_share=unsafe_share, anchors=anchors)
    names = scenario if scenario is not None else ["bias", "toxicity", "harmfulness"]
    for run_seed in seed if seed is not None else [0, 1, 2]:
        for name in ["own"] if noisy is not None else names:
            if noisy is not None:
                if safety is None or heldout is None:
                    raise typer.BadParameter("--noisy needs --safety and --heldout.")
                rows = own_scenario(noisy, safety, heldout)
            else:
                rows = load_scenario(name, data_dir, run_seed, sizes)
            suffixes = [f"{anchors}-anchors"] * (anchors > 0) + ["smoke"] * smoke
            folder = cache / "-".join([f"{name}-{unsafe_share:g}-{run_seed}", *suffixes])
            sessions = Sessions(folder, rows, model, run_seed, settings, sizes)
            settings_of_run = {
                "experiment": "interleaved" if interleaved else "control" if anchors else "main",
                "scenario": name, "unsafe_share": unsafe_share,
                "seed": run_seed, "model": model or "SmolLM2-135M-Instruct", "smoke": smoke,
                "dtype": str(computing_dtype()), "cores": torch.get_num_threads(),
                "settings": dataclasses.asdict(settings), "sizes": dataclasses.asdict(sizes),
            }  # fmt: skip
            compared = ("experiment", "scenario", "seed", "model", "smoke", "settings", "sizes")
            done = [row["arm"] for row in results if all(row[key] == settings_of_run[key] for key in compared)]
            if interleaved:
                if not done:
                    results += [{**settings_of_run, **row} for row in interleave(rows, sessions, data_dir)]
                    write_results(results, json_file)
                continue
            for name_of_arm in arm if arm is not None else ARMS:
                if name_of_arm not in done:
                    results.append({**settings_of_run, **run_arm(name_of_arm, sessions, data_dir)})
                    write_results(results, json_file)
                    print(
                        json.dumps(
                            {key: results[-1].get(key) for key in ("scenario", "seed", "arm", "unsafe", "task")}
                        ),
                        flush=True,
                    )
    shown = [row for row in results if row["smoke"] == smoke]
    print(table(shown))
    if any(row["experiment"] in ("main", "control") for row in shown):
        plot(shown, FIGURE if json_file == RESULTS else json_file.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
