"""Do readers agree with the labels of the scenarios?

`python benchmarks/label_agreement.py draw SET ROWS` writes rows of a set of `few.py`, such as `harmfulness-0.05-2000-1`, in
random order and without their labels. A reader writes one verdict per row to a file: {"row": 12, "verdict": "unsafe"}.
`python benchmarks/label_agreement.py judge SET VERDICTS --reader NAME` compares the verdicts with the labels. If `--cache`
has the trace of the set, it also says how the default measure ranks the rows that label and reader disagree about, and
simulates reviews with the verdicts of the reader. Rows that were not read count as labeled.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from scipy.stats import mannwhitneyu
from transformers.utils import logging

from few import Set, open_sets
from forgetfilter_callback import Trace
from looks import SEEDS, simulate
from scenarios import Row, load_scenario
from sessions import Cache, DataDir, Json, earlier_results, write_results


RESULTS = Path(__file__).parent / "results" / "label_agreement.json"
SetName = Annotated[str, typer.Argument(help="A set of `few.py`: SCENARIO-FRACTION-ROWS-SEED.")]

app = typer.Typer(help=__doc__)


def named_set(name: str) -> Set:
    scenario, fraction, rows, seed = name.rsplit("-", 3)
    return Set(scenario, float(fraction), int(rows), int(seed))


def noisy_rows(chosen: Set, data_dir: Path | None) -> list[Row]:
    logging.set_verbosity_error()
    return load_scenario(chosen.scenario, data_dir, chosen.seed, chosen.sizes).noisy


def compare_with_trace(trace: Trace, labeled_unsafe: np.ndarray, called_unsafe: np.ndarray) -> dict[str, Any]:
    """How the default measure ranks the rows labeled unsafe, and reviews with the verdicts of the reader.

    Those that the reader calls unsafe, and those that the reader calls safe, are each compared with all rows that are not
    labeled unsafe, and then with each other (AUROC, and p value of the test of Mann and Whitney).
    """
    values = trace.forgetting()
    unsafe, safe = labeled_unsafe & called_unsafe, labeled_unsafe & ~called_unsafe
    comparisons = {"auroc_called_unsafe": (unsafe, ~labeled_unsafe), "auroc_called_safe": (safe, ~labeled_unsafe)}
    aurocs = {}
    for name, (rows, others) in {**comparisons, "auroc_between": (unsafe, safe)}.items():
        test = mannwhitneyu(values[rows], values[others])
        aurocs[name] = float(test.statistic / (rows.sum() * others.sum()))
    aurocs["p_value_between"] = float(test.pvalue)
    reviews = pd.DataFrame([row for seed in SEEDS for row in simulate(trace, called_unsafe, seed)])
    means = reviews.groupby("looks")[["found", "found_by_measure"]].mean()
    return {**aurocs, **means.round(6).to_dict()}


@app.command()
def draw(
    name: SetName,
    rows_file: Annotated[Path, typer.Argument(help="The file to write: JSON lines.")],
    count: Annotated[int, typer.Option(help="Rows of each label.")] = 60,
    data_dir: DataDir = None,
) -> None:
    """Write rows to read: `count` of each label (unsafe and safe, without the rows of tasks), or all if there are fewer."""
    noisy = noisy_rows(named_set(name), data_dir)
    rng = random.Random(0)
    chosen: list[int] = []
    for group in ("unsafe", "safe"):
        labeled = [number for number, row in enumerate(noisy) if row["group"] == group]
        chosen += rng.sample(labeled, min(count, len(labeled)))
    rng.shuffle(chosen)
    lines = [
        {"row": number, "prompt": prompt[-1]["content"], "answer": completion[0]["content"]}
        for number, prompt, completion in ((row, noisy[row]["prompt"], noisy[row]["completion"]) for row in chosen)
    ]
    pd.DataFrame(lines).to_json(rows_file, orient="records", lines=True, force_ascii=False)


@app.command()
def judge(
    name: SetName,
    verdicts_file: Annotated[Path, typer.Argument(help="The verdicts: JSON lines.")],
    reader: Annotated[str, typer.Option(help="Who read the rows.")],
    data_dir: DataDir = None,
    cache: Cache = Path("few-cache"),
    json_file: Json = RESULTS,
) -> None:
    """Compare the verdicts of a reader with the labels. Results replace earlier ones of the same set and reader."""
    chosen = named_set(name)
    labeled_unsafe = np.array([row["group"] == "unsafe" for row in noisy_rows(chosen, data_dir)])
    verdicts = {each["row"]: each["verdict"] for each in map(json.loads, verdicts_file.read_text().splitlines())}
    unknown = set(verdicts.values()) - {"unsafe", "safe"}
    if unknown:
        raise ValueError(f'{verdicts_file} has the verdicts {sorted(unknown)}. They must be "unsafe" or "safe".')
    called_unsafe = labeled_unsafe.copy()
    called_unsafe[list(verdicts)] = [verdict == "unsafe" for verdict in verdicts.values()]
    results = [row for row in earlier_results(json_file) if (row["set"], row["reader"]) != (name, reader)]
    for label, is_labeled in (("unsafe", labeled_unsafe), ("safe", ~labeled_unsafe)):
        read = [row for row in sorted(verdicts) if is_labeled[row]]
        rows_called = {
            f"rows_called_{verdict}": [row for row in read if verdicts[row] == verdict]
            for verdict in ("unsafe", "safe")
        }
        counts = {"read": len(read), "called_unsafe": len(rows_called["rows_called_unsafe"])}
        results.append({"set": name, "reader": reader, "label": label, **counts, **rows_called})
    for _, trace, unsafe in open_sets([chosen], cache):
        if not np.array_equal(unsafe, labeled_unsafe):
            raise ValueError(f"The labels of {name} in {cache} are not those of the data. Check --data-dir.")
        results[-2] |= compare_with_trace(trace, labeled_unsafe, called_unsafe)
    write_results(results, json_file)
    lists = ["rows_called_unsafe", "rows_called_safe", "found", "found_by_measure"]
    print(pd.DataFrame(results).drop(columns=lists, errors="ignore").to_string(index=False))


if __name__ == "__main__":
    app()
