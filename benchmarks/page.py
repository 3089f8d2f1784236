"""Measure the size of the review page and the time to open it: `python benchmarks/page.py`.

The traces are synthetic: samples of 60 tokens (30 loss tokens), with five records of safety
finetuning. A quarter of the samples is forgotten. The page is opened from disk in headless Chromium; the time is the
median of three openings, until the graphs and the table are visible.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import typer
from playwright.sync_api import sync_playwright
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from forgetfilter_callback import Trace, encode_rows
from forgetfilter_callback.reports.review_page import write_review_page
from forgetfilter_callback.scoring.scores import STATE_SIZE, Scores
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.utils.atomic_files import write_json
from scale import as_dataset


LENGTH, LOSS_TOKENS = 60, 30
STEPS = (0, 10, 20, 30, 40)


def synthetic_trace(folder: str, count: int) -> tuple[Trace, np.ndarray]:
    """Returns a trace, and a mask of shape `(samples,)` of the forgotten samples."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, len(WORDS), (count, LENGTH), dtype=np.int32)
    labels = np.where(np.arange(LENGTH) < LENGTH - LOSS_TOKENS, -100, tokens).astype(np.int32)
    rows = encode_rows(as_dataset(tokens, labels), disable_tqdm=True)
    trace = Trace.create(folder, rows, "synthetic", None, None)
    unsafe = rng.random(count) < 0.25
    learnt = rng.gamma(2, 0.3, (count, LOSS_TOKENS)).astype(np.float32)
    states = rng.normal(size=(count, STATE_SIZE)).astype(np.float16)
    states[:, 0] += 20 * unsafe
    for step in STEPS:
        rise = np.where(unsafe, 1.5, 0.1)[:, None] * rng.gamma(2, 0.5, (count, LOSS_TOKENS)) * (step / STEPS[-1]) ** 0.5
        losses = (learnt + rise).astype(np.float32)
        ends = np.cumsum([0, *(len(window) for window in rows.windows())])
        windows = [slice(start, end) for start, end in itertools.pairwise(ends)]
        trace.append(
            Record("safety", step),
            (Scores(losses[window].ravel(), states[window] if step == 0 else None) for window in windows),
        )
    return trace, unsafe


WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "dogs", "ran", "around", "town", "and", "people", "watched"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def seconds_to_open(file: Path) -> float:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page()
        started = time.perf_counter()
        page.goto(file.as_uri())
        page.wait_for_selector("#rows tr")
        page.wait_for_selector(".plotly .main-svg")
        seconds = time.perf_counter() - started
        browser.close()
    return seconds


def main(
    json_file: Annotated[Path, typer.Option("--json", help="The file for the results.")] = Path(__file__).parent
    / "results"
    / "page.json",
    counts: Annotated[list[int], typer.Option("--rows", help="Number of samples; repeatable.")] = [  # noqa: B006
        1_000,
        100_000,
        1_000_000,
    ],
) -> None:
    datasets.disable_progress_bars()
    results: list[dict[str, Any]] = []
    print("| samples | seconds to write | MB | seconds to open |\n|---:|---:|---:|---:|")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            trace, unsafe = synthetic_trace(f"{folder}/trace", count)
            file = Path(folder, "review.html")
            started = time.perf_counter()
            write_review_page(trace, file, tokenizer(), unsafe=unsafe)
            write_seconds = time.perf_counter() - started
            open_seconds = statistics.median(seconds_to_open(file) for _ in range(3))
            size = file.stat().st_size
        results.append(
            {"samples": count, "seconds_to_write": write_seconds, "bytes": size, "seconds_to_open": open_seconds}
        )
        print(f"| {count:,} | {write_seconds:.1f} | {size / 1e6:.1f} | {open_seconds:.1f} |", flush=True)
        write_json(results, json_file)


if __name__ == "__main__":
    typer.run(main)
