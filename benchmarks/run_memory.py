"""Measure how the memory of `forgetfilter run` grows with the tokens of the noisy set: `python benchmarks/run_memory.py`.

A tiny model, rows of 500 tokens (2.3 kB of text), a few training steps, the records and the filter; with `--refit` also the
last finetuning. Each number of rows runs in its own process. Memory is the peak of anonymous memory, with a sample every
millisecond. It includes the text of a JSONL file. A Parquet file is memory-mapped and not included.

A small set stands for a million rows. Therefore rows are processed in windows of 2**18 tokens instead of 2**22, so
that all sets have several windows, and glibc returns arrays of more than 1 MB at once, as it does with arrays of more than
32 MB by default.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import datasets
import numpy as np
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from forgetfilter_callback import FilterConfig, RunConfig, run
from forgetfilter_callback.data import encoded_rows
from scale import PeakMemory


LENGTH = 500
WORDS = [f"{first}{second}{end}" for first in "bdgkmprt" for second in ("a", "ei", "o") for end in ("n", "st", "l")]


def save_model(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["<eos>", *WORDS])}, unk_token="<eos>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>").save_pretrained(folder)


def texts(count: int, seed: int, loss: str) -> Iterator[dict[str, str]]:
    """Rows whose tokens all contribute to the loss (`loss="all"`), or the second half of them (`loss="half"`)."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        words = [WORDS[index] for index in rng.integers(0, len(WORDS), LENGTH - 1)]
        if loss == "all":
            yield {"text": " ".join(words)}
        else:
            half = LENGTH // 2
            yield {"prompt": " ".join(words[:half]) + " ", "completion": " ".join(words[half:]) + " <eos>"}


def write_rows(rows: Iterator[dict[str, str]], file: Path) -> None:
    with file.open("w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def write_inputs(folder: Path, count: int, source: str, loss: str) -> None:
    """Writes the model, the noisy set and the safety set."""
    save_model(folder / "model")
    write_rows(texts(count, 0, loss), folder / "noisy.jsonl")
    write_rows(texts(20, 1, loss), folder / "safety.jsonl")
    if source == "parquet":
        file = str(folder / "noisy.jsonl")
        rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(folder / "cache"))
        rows.to_parquet(folder / "noisy.parquet")


def measure(folder: Path, source: str, refit: bool) -> int:
    """Runs on the rows in `folder`. Returns the peak of anonymous memory in bytes, above that after imports."""
    memory = PeakMemory(0.001)
    memory.start()
    config = RunConfig(
        model=str(folder / "model"),
        noisy=str(folder / source),
        safety=str(folder / "safety.jsonl"),
        output=str(folder / "out"),
        refit=refit,
        training={"max_steps": 4, "disable_tqdm": True},
        safety_training={"max_steps": 4},
        filter=FilterConfig(fraction=0.1),
    )
    run(config)
    memory.stopped.set()
    return memory.peak - memory.start_bytes


def main(
    counts: Annotated[list[int], typer.Option("--rows", help="Number of rows; repeatable.")] = [  # noqa: B006
        8_000,
        16_000,
    ],
    source: Annotated[str, typer.Option(help="The kind of file: jsonl or parquet.")] = "jsonl",
    loss: Annotated[str, typer.Option(help="Which tokens contribute to the loss: half or all.")] = "half",
    refit: Annotated[bool, typer.Option(help="Also finetune on the kept rows.")] = False,
    folder_in: Annotated[Path | None, typer.Option(hidden=True, help="For the child process.")] = None,
) -> None:
    datasets.disable_progress_bars()
    if folder_in is not None:
        encoded_rows.WINDOW_TOKENS = 2**18
        print(measure(folder_in, f"noisy.{source}", refit))
        return
    before: tuple[int, int] | None = None
    print("| rows | peak MB | bytes a token beyond the token ids, from the row above |\n|---:|---:|---:|")
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            write_inputs(Path(name), count, source, loss)
            child = [sys.executable, __file__, "--source", source, "--folder-in", name, *(["--refit"] if refit else [])]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
            output = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        peak = int(output.splitlines()[-1])
        growth = "–" if before is None else f"{(peak - before[1]) / ((count - before[0]) * LENGTH) - 4:.1f}"
        print(f"| {count:,} | {peak / 1e6:.0f} | {growth} |", flush=True)
        before = count, peak


if __name__ == "__main__":
    typer.run(main)
