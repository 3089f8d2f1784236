"""Measure how the time and memory of a record grow with the number of rows: `python benchmarks/scale.py`.

The rows are short (16 tokens, 8 loss tokens) and the model is tiny. Each number of rows runs in its
own process. Memory is the peak of anonymous memory while the rows are encoded, scored and written into a trace. It
excludes the dataset, which is memory-mapped.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import typer
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from forgetfilter_callback import Trace
from forgetfilter_callback.data.encode_collated import encode_collated
from forgetfilter_callback.scoring.token_losses import token_losses, window_scores
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.utils.atomic_files import write_json


LENGTH, LOSS_TOKENS, VOCABULARY = 16, 8, 512


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


class PeakMemory(threading.Thread):
    """Tracks the peak of anonymous memory in bytes, with a sample every 10 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.start_bytes = anonymous_bytes()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.01)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def make_rows(count: int, folder: str) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (count, LENGTH))
    labels = np.where(np.arange(LENGTH) < LENGTH - LOSS_TOKENS, -100, tokens)
    as_dataset(tokens, labels).save_to_disk(folder)


def as_dataset(tokens: np.ndarray, labels: np.ndarray) -> Dataset:
    """Builds a trainer's dataset from token ids and labels of shape `(rows, length)`."""
    columns = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        for name, values in (("input_ids", tokens), ("labels", labels))
    }
    return Dataset(pa.table(columns))


def record(folder: str) -> tuple[float, int]:
    """Takes one record of the rows in `folder`. Returns its seconds and its bytes of memory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    rows = Dataset.load_from_disk(folder)
    token_losses(model, encode_collated(rows.select(range(8)), collate, model, disable_tqdm=True), disable_tqdm=True)
    memory = PeakMemory()
    memory.start()
    started = time.perf_counter()
    encoded = encode_collated(rows, collate, model, disable_tqdm=True)
    with tempfile.TemporaryDirectory() as trace_folder:
        trace = Trace.create(trace_folder, encoded, "tiny", None, None)
        trace.append(Record("safety", 0), window_scores(model, encoded, disable_tqdm=True, with_states=True))
    return time.perf_counter() - started, memory.peak - memory.start_bytes


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
    rows_in: Annotated[str | None, typer.Option(hidden=True, help="For the child process.")] = None,
) -> None:
    datasets.disable_progress_bars()
    if rows_in is not None:
        print(*record(rows_in))
        return
    results: list[dict[str, Any]] = []
    print("| rows | seconds | microseconds a row | peak MiB | bytes a row beyond the token ids, from the row above |")
    print("|---:|---:|---:|---:|---:|")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            make_rows(count, folder)
            child = [sys.executable, __file__, "--rows-in", folder]
            output = subprocess.run(child, check=True, capture_output=True, text=True).stdout.split()
        seconds, peak = float(output[-2]), int(output[-1])
        growth = None
        if results:
            before = results[-1]
            growth = (peak - before["peak_bytes"]) / (count - before["rows"]) - 4 * LENGTH
        results.append({"rows": count, "seconds": seconds, "peak_bytes": peak, "bytes_a_row_beyond_token_ids": growth})
        shown_growth = "" if growth is None else f"{growth:.0f}"
        print(
            f"| {count:,} | {seconds:.1f} | {1e6 * seconds / count:.0f} | {peak / 2**20:.0f} | {shown_growth} |",
            flush=True,
        )
        write_json(results, json_file)


if __name__ == "__main__":
    typer.run(main)
