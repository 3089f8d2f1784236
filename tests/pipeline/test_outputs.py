"""The files of the kept and removed rows."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from helpers import call, tiny_llama
from trl import SFTTrainer

from forgetfilter_callback import FilterConfig, ForgetTracker, Trace, find_forgotten, to_dataset
from forgetfilter_callback.errors import DataError, UnsupportedDatasetError
from forgetfilter_callback.filtering.result import FilterResult
from forgetfilter_callback.pipeline.outputs import filter_rows, write_filter_outputs, write_kept_and_removed


def test_rows_that_sfttrainer_drops_are_kept(tmp_path, sft_config, chat_tokenizer):
    """Their prompt alone fills `max_length`, so they have no loss token and are not in the trace."""
    rows = [{"prompt": f"{'the cat ' * (20 if row == 4 else 1)}", "completion": " ran" * (1 + row)} for row in range(8)]
    file = tmp_path / "noisy.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    model, tracker = tiny_llama(), ForgetTracker()
    for name in ("noisy", "safety"):
        given = Dataset.from_list(rows if name == "noisy" else rows[:2])
        args = sft_config(output_dir=str(tmp_path / name), max_length=12, max_steps=2)
        SFTTrainer(model, args, train_dataset=given, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    assert len(tracker.trace.rows) == 7
    config = FilterConfig("loss", fraction=0.3)
    result = filter_rows(tracker.trace, tmp_path / "out", config, str(file), chat_tokenizer)
    assert result.counts == {"samples": 8, "removed": 2, "kept": 6, "unknown": 1} and not result.removed[4]
    kept = [json.loads(line) for line in (tmp_path / "out" / "kept.jsonl").read_text().splitlines()]
    assert rows[4] in kept and len(kept) == 6
    table = to_dataset(tracker.trace, rows, config, chat_tokenizer)
    assert [row for row, loss in enumerate(table["forgetfilter_loss_safety"]) if loss is None] == [4]
    assert table["forgetfilter_removed"] == result.removed.tolist()
    with pytest.raises(UnsupportedDatasetError, match="`rows` is a stream"):
        to_dataset(tracker.trace, Dataset.from_list(rows).to_iterable_dataset(), config, chat_tokenizer)
    strange = [{**row, "completion": " mat" + row["completion"]} for row in rows]
    with pytest.raises(DataError, match="7 of 7 rows have no forgetting value"):
        to_dataset(tracker.trace, strange, config, chat_tokenizer)


def test_lines_are_not_held_in_memory(tmp_path):
    lines, removed = (f"{index:>50000}" for index in range(200)), [index % 3 == 0 for index in range(200)]
    tracemalloc.start()
    write_kept_and_removed(tmp_path / "kept.jsonl", tmp_path / "removed.jsonl", lines, np.array(removed))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    kept, removed = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("kept", "removed"))
    assert [int(line) for line in kept] == [index for index in range(200) if index % 3]
    assert [int(line) for line in removed] == [*range(0, 200, 3)]
    assert peak < 10 * 50_000


@pytest.fixture
def earlier(finished_run, tmp_path) -> Path:
    """The output folder of an earlier filter."""
    assert call("filter", finished_run, "--threshold", 99, "--output", tmp_path / "out").exit_code == 0
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_error_leaves_the_old_files(earlier, finished_run, monkeypatch):
    trace = Trace.open(finished_run / "_forgetfilter")
    result, before = find_forgotten(trace), contents(earlier)

    def lines():
        yield "new"
        raise ValueError("this row cannot be read")

    with pytest.raises(ValueError, match="cannot be read"):
        write_filter_outputs(earlier, lines(), result, trace)
    assert contents(earlier) == before

    def full(*arguments) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(FilterResult, "save", full)
    with pytest.raises(OSError, match="no space left"):
        write_filter_outputs(earlier, ["new"] * 12, result, trace)
    assert contents(earlier) == before


def test_each_output_is_flushed_once_and_before_any_is_replaced(earlier, finished_run, monkeypatch):
    events: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor: int) -> None:
        events.append(("flush", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        if target.name in ("kept.jsonl", "removed.jsonl", "card.md", "filter_result.json", "values.parquet"):
            events.append(("rename", source.stat().st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    assert call("filter", finished_run, "--fraction", 0.25, "--output", earlier).exit_code == 0
    outputs = {number for kind, number in events if kind == "rename"}
    of_outputs = [event for event in events if event[1] in outputs]
    assert len(outputs) == 5 and sorted(kind for kind, _ in of_outputs) == ["flush"] * 5 + ["rename"] * 5
    assert [kind for kind, _ in of_outputs[:5]] == ["flush"] * 5
