"""The files of the kept and removed rows."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import call

from forgetfilter_callback import Trace, find_forgotten
from forgetfilter_callback.filtering.result import FilterResult
from forgetfilter_callback.pipeline.outputs import write_filter_outputs, write_kept_and_removed


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
