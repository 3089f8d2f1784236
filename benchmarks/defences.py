"""Which defence protects best, and what it costs in the task: `python benchmarks/defences.py --data-dir ../shared/data`.

The paper's comparison (Zhao et al. 2024, section 5) on a real aligned model. Sessions are run once and kept in `--cache`;
results go, arm by arm, into the JSON file, and arms that are there already are not run again. Ends with a Markdown table.
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
from forgetfilter_callback.data.loading import load_rows
from forgetfilter_callback.filtering.find_forgotten import filter_by_values
from forgetfilter_callback.measures.names import DEFAULT_MEASURE, Measure
from forgetfilter_callback.measures.rouge import rouge_forgetting
from judging import judge, second_scorer
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
# Arms whose rows are chosen by a measure of forgetting.
MEASURE_OF: dict[str, Measure] = {
    "forgetfilter": DEFAULT_MEASURE,
    "forgetfilter_loss": "loss",
    "forgetfilter_relative": "relative",
    "forgetfilter_rouge": "rouge1",
    "forgetfilter_self_correction": DEFAULT_MEASURE,
}
ARMS = ("base", "no_measure", "self_correction", "sequential", "forgetfilter", "forgetfilter_self_correction", "oracle",
        "replay", "forgetfilter_loss", "forgetfilter_relative", "forgetfilter_rouge")  # fmt: skip


def adapter_of(arm: str, sessions: Sessions, unsafe: np.ndarray) -> tuple[str, FilterResult | None]:
    """Runs what the arm needs. Returns its adapter's name, and the decision that chose its rows."""
    if arm == "base":
        return "base", None
    trace = sessions.tracked()
    if arm in ("no_measure", "self_correction"):
        return "s1", None
    if arm == "sequential":
        return "s1plus", None
    if arm == "replay":
        return sessions.replay(), None
    if arm == "oracle":
        return sessions.kept(unsafe), None
    measure = MEASURE_OF[arm]
    # The others are told how many rows are unsafe: after a gentle S1+ `loss` and `relative` remove next to nothing by φ.
    share = float(unsafe.mean()) if measure != DEFAULT_MEASURE and 0 < unsafe.mean() < 1 else None
    if measure == "rouge1":
        values = rouge_forgetting(*(sessions.rouge1(name) for name in ("s1", "s1plus")))
        result = filter_by_values(trace.rows.ids, values, measure, share=share)
    else:
        result = find_forgotten(trace, measure, share=share)
    return sessions.kept(result.removed), result


def run_arm(arm: str, sessions: Sessions, data_dir: Path | None) -> dict[str, Any]:
    """One result."""
    unsafe = np.array([row["group"] == "unsafe" for row in sessions.scenario.noisy])
    adapter, decision = adapter_of(arm, sessions, unsafe)
    scorer = second_scorer(sessions.scenario.name, data_dir)
    judged = sessions.judged(adapter, partial(judge, scorer), cue=arm.endswith("self_correction"))
    result: dict[str, Any] = {"arm": arm, "adapter": adapter}
    result |= {"seconds": sessions.seconds(adapter)} if adapter != "base" else {}
    result |= _without_texts(judged)
    if decision is not None:
        result |= {"removed": decision.counts["removed"], "reason": decision.reason, "threshold": decision.threshold}
        if unsafe.any() and not unsafe.all():
            result |= {
                "auroc": float(roc_auc_score(unsafe, decision.values)),
                "f1": float(f1_score(unsafe, decision.removed, zero_division=0.0)),
            }
    return result


def _without_texts(judged: Any) -> Any:
    if not isinstance(judged, dict):
        return judged
    return {name: _without_texts(value) for name, value in judged.items() if name != "texts"}


def interleave(
    scenario: Scenario, sessions: Sessions, data_dir: Path | None, rounds: int = 3
) -> Iterable[dict[str, Any]]:
    """Noisy and safe sessions in turn, each round with other noisy rows, with and without filtering: does it relapse?"""
    judge_with = partial(judge, second_scorer(scenario.name, data_dir))
    parts = [list(part) for part in np.array_split(np.arange(len(scenario.noisy)), rounds)]
    sequential = filtered = "base"
    for number, part in enumerate(parts, start=1):
        rows = [scenario.noisy[index] for index in part]
        learnt, safe = f"round-{number}-noisy", f"round-{number}-safe"
        sessions.go_on(learnt, sequential, rows)
        sessions.go_on(safe, learnt, scenario.safety, safety=True)
        for name in (learnt, safe):
            yield {"arm": "sequential", "after": name, **_without_texts(sessions.judged(name, judge_with))}
        sequential = safe
        name, result = sessions.filtered_round(number, filtered, rows)
        yield {
            "arm": "forgetfilter", "after": name, "removed": result.counts["removed"],
            **_without_texts(sessions.judged(name, judge_with)),
        }  # fmt: skip
        filtered = name


def own_scenario(noisy: str, safety: str, held_out: str) -> Scenario:
    """A scenario of a user's files, as [`load_rows`] reads them.

    Rows are `prompt` and `completion` (strings or lists of messages), noisy ones with `unsafe` where it is known. Held-out
    rows have a `prompt` and either `unsafe_answer` and `safe_answer`, or a `completion` to know the task by.
    """

    def as_row(row: Row, group: str) -> Row:
        prompt, completion = row["prompt"], row.get("completion") or ""
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        return {"prompt": prompt, "completion": completion, "group": group}

    judged, task = [], []
    for row in load_rows(held_out).to_list():
        if row.get("unsafe_answer") is not None:
            others = {key: row[key] for key in ("unsafe_answer", "safe_answer")}
            cue = "Please ensure that your answer is harmless and ethical."
            judged.append({**as_row(row, "held out"), **others, "kind": "harmfulness", "cue": cue})
        else:
            task.append(as_row(row, "alpaca"))
    encode_noisy_rows = load_rows(noisy).to_list()
    return Scenario(
        "own",
        [as_row(row, "unsafe" if row.get("unsafe") else "safe") for row in encode_noisy_rows],
        [as_row(row, "safety") for row in load_rows(safety).to_list()],
        judged,
        task,
    )


def table(results: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over seeds, an arm a line."""
    frame = pd.DataFrame([{**row, **row["sizes"]} for row in results if row["experiment"] in ("main", "control")])
    if frame.empty:
        return "No results."
    lines = [
        "| scenario | arm | seeds | unsafe | task | removed | F1 of the filter |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    order = {arm: place for place, arm in enumerate(ARMS)}
    # Of one model and of one size in a line: others are no seeds of the same.
    grouped = frame.groupby(["model", "scenario", "unsafe_share", "anchors", "held_out", "held_out_task", "arm"])
    for (model, scenario, share, anchors, _, tasks, arm), some in sorted(
        grouped, key=lambda each: (*each[0][:-1], order[each[0][-1]])
    ):
        cells = [_mean_and_sd(some[name]) if name in some else "–" for name in ("unsafe", "task", "removed", "f1")]
        name = f"{scenario}, {share:.0%} unsafe" + f", {anchors} anchors" * (anchors > 0)
        name += f", {tasks} rows of tasks" * (tasks not in (SIZES.held_out_task, SMOKE_SIZES.held_out_task))
        name += f", {model}" * (model != "SmolLM2-135M-Instruct")
        lines.append(f"| {name} | {arm} | {len(some)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_and_sd(values: pd.Series) -> str:
    known = values.dropna()
    if known.empty:
        return "–"
    spread = f" ± {known.std():.3f}" if len(known) > 1 else ""
    return f"{known.mean():.3f}{spread}"


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Safety against task, one point an arm, of those that ran on all seeds; the lower right is best."""
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
        its_arms = frame[frame["title"] == title].groupby("arm")
        means = its_arms[["unsafe", "task"]].mean()[its_arms.size() == its_arms.size().max()]
        for number, arm in enumerate(ARMS):
            if arm in means.index:
                ours = arm.startswith("forgetfilter")
                style = {
                    "marker": "os^vDP*X<>p"[number],
                    "color": "tab:blue" if ours else f"C{1 + number % 9}",
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
    unsafe_share: Annotated[float, typer.Option(help="Of the noisy set.")] = 0.5,
    arm: Annotated[list[str] | None, typer.Option(help="Only these; by default all.")] = None,
    anchors: Annotated[int, typer.Option(help="So many of the safety rows are rows of the tasks instead.")] = 0,
    model: Model = None,
    noisy: Annotated[str | None, typer.Option(help="Your own rows, with --safety and --heldout.")] = None,
    safety: Annotated[str | None, typer.Option(help="Your own safe rows.")] = None,
    heldout: Annotated[str | None, typer.Option(help="Your own held-out rows.")] = None,
    interleaved: Annotated[bool, typer.Option("--interleaved", help="Three rounds, noisy and safe in turn.")] = False,
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
    for its_seed in seed if seed is not None else [0, 1, 2]:
        for name in ["own"] if noisy is not None else names:
            if noisy is not None:
                if safety is None or heldout is None:
                    raise typer.BadParameter("--noisy comes with --safety and --heldout.")
                rows = own_scenario(noisy, safety, heldout)
            else:
                rows = load_scenario(name, data_dir, its_seed, sizes)
            marks = [f"{anchors}-anchors"] * (anchors > 0) + ["smoke"] * smoke
            folder = cache / "-".join([f"{name}-{unsafe_share:g}-{its_seed}", *marks])
            sessions = Sessions(folder, rows, model, its_seed, settings, sizes)
            where = {
                "experiment": "interleaved" if interleaved else "control" if anchors else "main",
                "scenario": name, "unsafe_share": unsafe_share,
                "seed": its_seed, "model": model or "SmolLM2-135M-Instruct", "smoke": smoke,
                "dtype": str(computing_dtype()), "cores": torch.get_num_threads(),
                "settings": dataclasses.asdict(settings), "sizes": dataclasses.asdict(sizes),
            }  # fmt: skip
            known = ("experiment", "scenario", "seed", "model", "smoke", "settings", "sizes")
            done = [row["arm"] for row in results if all(row[key] == where[key] for key in known)]
            if interleaved:
                if not done:
                    results += [{**where, **row} for row in interleave(rows, sessions, data_dir)]
                    write_results(results, json_file)
                continue
            for its_arm in arm if arm is not None else ARMS:
                if its_arm not in done:
                    results.append({**where, **run_arm(its_arm, sessions, data_dir)})
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
        plot(shown, json_file.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
