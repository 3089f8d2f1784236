"""Measure how long a round of a review takes: `python benchmarks/review_speed.py`.

The rows have 16 random tokens, random losses, and random hidden states of size 576 (that of SmolLM2-135M). One row in twenty
is unsafe and more forgotten. A round is ten verdicts, after which all rows are ranked again. Needs an idle machine.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import typer

from few import verdicts_on
from forgetfilter_callback import ReviewQueue, Trace
from forgetfilter_callback.data.encode_collated import encode_collated
from forgetfilter_callback.data.encoded_rows import EncodedRows
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.utils.atomic_files import write_json
from scale import as_dataset, collate, tiny_model


RESULTS = Path(__file__).parent / "results" / "review_speed.json"
TOKENS, STATE_SIZE, ROUND, ROUNDS = 16, 576, 10, 20


def random_scores(rows: EncodedRows, unsafe: np.ndarray, is_after: bool) -> Iterator[Scores]:
    """Scores of a record before or after safety finetuning, one item per window of rows."""
    rng, start = np.random.default_rng(int(is_after)), 0
    for window in rows.windows():
        counts = np.diff(window.loss_offsets)
        rises = np.repeat(unsafe[start : start + len(window)] * float(is_after), counts)
        losses = (rng.gamma(2, size=counts.sum()) + rises).astype(np.float32)
        yield Scores(losses, rng.normal(size=(len(window), STATE_SIZE)).astype(np.float16))
        start += len(window)


def measure(count: int) -> dict[str, Any]:
    """Reviews `ROUNDS` rounds of `count` rows. Returns the seconds of opening the review and of a round (median)."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 512, (count, TOKENS), dtype=np.int32)
    unsafe = rng.random(count) < 0.05
    with tempfile.TemporaryDirectory() as folder:
        rows = encode_collated(as_dataset(tokens, tokens), collate, tiny_model(), disable_tqdm=True)
        trace = Trace.create(folder, rows, "tiny", None, None)
        for step, is_after in enumerate((False, True)):
            trace.append(Record("safety", step), random_scores(rows, unsafe, is_after))
        started = time.perf_counter()
        queue = ReviewQueue(trace)
        shown = queue.next(ROUND)
        opened = time.perf_counter() - started
        first, others = 0.0, []
        for _ in range(ROUNDS):
            is_first = not unsafe[queue.is_seen].any() and unsafe[shown].any()
            started = time.perf_counter()
            queue.add(verdicts_on(shown, unsafe))
            shown = queue.next(ROUND)
            seconds = time.perf_counter() - started
            if is_first:
                first = seconds
            else:
                others.append(seconds)
        return {
            "rows": count,
            "state_size": STATE_SIZE,
            "found": int((queue.is_seen & unsafe).sum()),
            "seconds_to_open": opened,
            "first_round_with_an_unsafe_row": first,  # it computes the features of all rows
            "median_of_other_rounds": statistics.median(others),
            "slowest_other_round": max(others),
        }


def main(
    json_file: Annotated[Path, typer.Option("--json", help="The file for the results.")] = RESULTS,
    counts: Annotated[list[int], typer.Option("--rows", help="Number of rows; repeatable.")] = [  # noqa: B006
        10_000,
        100_000,
    ],
) -> None:
    datasets.disable_progress_bars()
    results = []
    for count in counts:
        results.append(measure(count))
        print(results[-1], flush=True)
        write_json(results, json_file)


if __name__ == "__main__":
    typer.run(main)
