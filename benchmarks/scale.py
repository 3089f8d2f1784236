"""Measure how time and memory grow with the number of rows: `python benchmarks/scale.py`.

The rows have 16 tokens (`--length 500` for long ones). Half of them contribute to the loss, and the model is tiny. Each
number of rows runs in its own process, in three stages:

- record: the rows are encoded, scored and written into a trace.
- decide: the trace is opened, the default measure is computed, and the kept and removed rows are written.
- export: the rows are written to a Parquet file with all columns.

Memory is the peak of anonymous memory in a stage, above the memory before the first one. It excludes the dataset, which is
memory-mapped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import typer
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from forgetfilter_callback import FilterConfig, Trace, to_dataset
from forgetfilter_callback.data.encode_collated import encode_collated
from forgetfilter_callback.data.encoded_rows import EncodedRows
from forgetfilter_callback.data.output_lines import source_lines
from forgetfilter_callback.filtering.find_forgotten import find_forgotten
from forgetfilter_callback.pipeline.outputs import write_filter_outputs
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.scoring.token_losses import token_losses, window_scores
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.trace.stored_column import StoredColumn
from forgetfilter_callback.utils.atomic_files import write_json


VOCABULARY = 512
STAGES = ("record", "decide", "export")


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


class PeakMemory(threading.Thread):
    """Tracks the peak of anonymous memory in bytes, with a sample every `interval` seconds."""

    def __init__(self, interval: float = 0.01) -> None:
        super().__init__(daemon=True)
        self.interval = interval
        self.peak = self.start_bytes = anonymous_bytes()
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(self.interval):
            self.peak = max(self.peak, anonymous_bytes())


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def make_rows(count: int, length: int, folder: str) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (count, length), dtype=np.int32)
    labels = np.where(np.arange(length) < length // 2, np.int32(-100), tokens)
    as_dataset(tokens, labels).save_to_disk(folder)


def as_dataset(tokens: np.ndarray, labels: np.ndarray) -> Dataset:
    """Builds a trainer's dataset from token ids and labels of shape `(rows, length)`."""
    columns = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        for name, values in (("input_ids", tokens), ("labels", labels))
    }
    return Dataset(pa.table(columns))


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def shifted_scores(rows: EncodedRows, losses: StoredColumn) -> Iterator[Scores]:
    """Scores of a later record: one row in ten is forgotten."""
    rng, start = np.random.default_rng(1), 0
    for window in rows.windows():
        counts = np.diff(window.loss_offsets)
        stop = start + int(counts.sum())
        rises = np.repeat(np.where(rng.random(len(window)) < 0.1, 1, 0).astype(np.float32), counts)
        noise = rng.normal(scale=0.1, size=stop - start).astype(np.float32)
        yield Scores(losses[start:stop] + rises + noise)
        start = stop


def measure(folder: str) -> dict[str, dict[str, float]]:
    """Runs the three stages on the rows in `folder`. Returns the seconds and the bytes of memory of each."""
    model, rows = tiny_model(), Dataset.load_from_disk(folder)
    token_losses(model, encode_collated(rows.select(range(8)), collate, model, disable_tqdm=True), disable_tqdm=True)
    memory, results = PeakMemory(), {}
    memory.start()

    def run_stage(name: str, stage: Callable[[], None]) -> None:
        memory.peak, started = memory.start_bytes, time.perf_counter()
        stage()
        results[name] = {"seconds": time.perf_counter() - started, "peak_bytes": memory.peak - memory.start_bytes}

    with tempfile.TemporaryDirectory() as output:
        trace_folder = Path(output) / "trace"

        def record() -> None:
            encoded = encode_collated(rows, collate, model, disable_tqdm=True)
            trace = Trace.create(trace_folder, encoded, "tiny", None, None)
            trace.append(Record("safety", 0), window_scores(model, encoded, disable_tqdm=True, with_states=True))

        def decide() -> None:
            trace = Trace.open(trace_folder)
            result = find_forgotten(trace, FilterConfig())
            write_filter_outputs(Path(output) / "filter", source_lines(rows), result, trace)

        def export() -> None:
            to_dataset(Trace.open(trace_folder), rows).to_parquet(Path(output) / "rows.parquet")

        run_stage("record", record)
        trace = Trace.open(trace_folder)
        trace.append(Record("safety", 1), shifted_scores(trace.rows, trace.stored_losses(Record("safety", 0))))
        del trace
        run_stage("decide", decide)
        run_stage("export", export)
    memory.stopped.set()
    return results


def main(
    json_file: Annotated[Path, typer.Option("--json", help="The file for the results.")] = Path(__file__).parent
    / "results"
    / "scale.json",
    counts: Annotated[list[int], typer.Option("--rows", help="Number of rows; repeatable.")] = [  # noqa: B006
        1_000,
        10_000,
        100_000,
        1_000_000,
    ],
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 16,
    rows_in: Annotated[str | None, typer.Option(hidden=True, help="For the child process.")] = None,
) -> None:
    datasets.disable_progress_bars()
    if rows_in is not None:
        print(json.dumps(measure(rows_in)))
        return
    results: list[dict[str, Any]] = []
    print("| rows | stage | seconds | microseconds a row | peak MiB | bytes a row beyond the token ids, from before |")
    print("|---:|---|---:|---:|---:|---:|")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            make_rows(count, length, folder)
            child = [sys.executable, __file__, "--rows-in", folder]
            output = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
        stages = json.loads(output.splitlines()[-1])
        for name in STAGES:
            seconds, peak, growth = stages[name]["seconds"], stages[name]["peak_bytes"], None
            if results:
                before = results[-1]
                growth = (peak - before["stages"][name]["peak_bytes"]) / (count - before["rows"]) - 4 * length
            stages[name]["bytes_a_row_beyond_token_ids"] = growth
            shown_growth = "" if growth is None else f"{growth:.0f}"
            print(
                f"| {count:,} | {name} | {seconds:.1f} | {1e6 * seconds / count:.0f} | {peak / 2**20:.0f} "
                f"| {shown_growth} |",
                flush=True,
            )
        results.append({"rows": count, "length": length, **stages["record"], "stages": stages})
        write_json(results, json_file)


if __name__ == "__main__":
    typer.run(main)
