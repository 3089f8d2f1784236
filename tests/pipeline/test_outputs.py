"""The files of the kept and removed rows."""

from __future__ import annotations

import tracemalloc
from contextlib import ExitStack

import numpy as np
import pytest

from forgetfilter_callback.pipeline.outputs import write_kept_and_removed


def write(folder, lines, removed) -> None:
    with ExitStack() as files:
        write_kept_and_removed(folder, lines, np.array(removed), files)


def test_lines_are_not_held_in_memory(tmp_path):
    lines, removed = (f"{index:>50000}" for index in range(200)), [index % 3 == 0 for index in range(200)]
    tracemalloc.start()
    write(tmp_path, lines, removed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    kept, removed = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("kept", "removed"))
    assert [int(line) for line in kept] == [index for index in range(200) if index % 3]
    assert [int(line) for line in removed] == [*range(0, 200, 3)]
    assert peak < 10 * 50_000


def test_an_error_in_the_lines_leaves_the_old_files(tmp_path):
    write(tmp_path, ["old", "bad"], [False, True])

    def lines():
        yield "new"
        raise ValueError("this row cannot be read")

    with pytest.raises(ValueError, match="cannot be read"):
        write(tmp_path, lines(), [False, True])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        "kept.jsonl": b"old\n", "removed.jsonl": b"bad\n",
    }  # fmt: skip
