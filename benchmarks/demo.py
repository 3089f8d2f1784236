"""Run the demo with several seeds and numbers of unsafe rows: `python benchmarks/demo.py --seed 0 --unsafe 16`.

Word problems fill the noisy set up. Summaries, with the AUPRC of each ranking, are written to `benchmarks/results/demo.json`
after each run. Runs that the file contains already are skipped, except those of older versions, which have no AUPRC.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from sklearn.metrics import average_precision_score

from forgetfilter_callback import Trace
from forgetfilter_callback.cli.app import silence_libraries
from forgetfilter_callback.cli.demo import run_demo
from forgetfilter_callback.utils.atomic_files import write_json
from rankings import rankings


RESULTS = Path(__file__).parent / "results" / "demo.json"


def auprc(demo: str) -> dict[str, float]:
    """The AUPRC of each ranking in the output folder of a demo."""
    unsafe = [json.loads(line)["group"] == "unsafe" for line in (Path(demo) / "noisy.jsonl").read_text().splitlines()]
    found = rankings(Trace.open(demo))
    return {name: float(average_precision_score(unsafe, values)) for name, values in found.items()}


def main(
    seed: Annotated[list[int], typer.Option(help="Seed; can be given several times.")] = [0, 1, 2],  # noqa: B006
    unsafe: Annotated[list[int], typer.Option(help="Unsafe rows; can be given several times.")] = [16],  # noqa: B006
    rows: Annotated[int, typer.Option(help="Rows of the noisy set.")] = 160,
    safe: Annotated[int, typer.Option(help="Safe answers to questions of BBQ in the noisy set.")] = 16,
) -> None:
    silence_libraries()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for unsafe_rows in unsafe:
        for each_seed in seed:
            sizes = {"unsafe": unsafe_rows, "safe": safe, "task": rows - safe - unsafe_rows}
            earlier = [row for row in results if row["sizes"] == sizes and row["seed"] == each_seed]
            if any("auprc" in row for row in earlier):
                continue
            with tempfile.TemporaryDirectory() as folder:
                summary = run_demo(folder, seed=each_seed, sizes=sizes)
                results = [row for row in results if row not in earlier]
                results.append({"sizes": sizes, **summary, "auprc": auprc(folder)})
            write_json(results, RESULTS)


if __name__ == "__main__":
    typer.run(main)
