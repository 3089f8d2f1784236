"""Columns of records that are read in parts, and the memory of what reads them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import sample_ids
from trace_helpers import rouge1_of

from forgetfilter_callback import Trace
from forgetfilter_callback.data import encoded_rows
from forgetfilter_callback.data.encoded_rows import EncodedRows
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.measures.common import windows
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


FIRST, LAST = Record("safety", 0), Record("safety", 4)
# Prints the bytes that are held after a trace was opened, the peak while it is opened, and the peak of each call.
PEAKS = """
import sys, tracemalloc
import pyarrow as pa
from forgetfilter_callback import Trace
from forgetfilter_callback.data import encoded_rows
from forgetfilter_callback.measures import common
encoded_rows.WINDOW_TOKENS, common.WINDOW_TOKENS = 20_000, 5_000

def call(expression):
    return eval(expression, {"trace": trace})

trace, pool = Trace.open(sys.argv[1]), pa.default_memory_pool()
list(map(call, sys.argv[2:]))  # imports what it needs
del trace
tracemalloc.start()
trace = Trace.open(sys.argv[1])
print(*tracemalloc.get_traced_memory())
for expression in sys.argv[2:]:
    tracemalloc.reset_peak()
    call(expression)
    print(tracemalloc.get_traced_memory()[1])
print(pool.max_memory())
"""


@pytest.fixture
def long_trace(tmp_path, monkeypatch):
    """800 rows of 500 tokens, all but the first of each with a loss, in row groups of 40 rows."""
    rng, samples, length = np.random.default_rng(0), 800, 500
    tokens = rng.integers(0, 5_000, samples * length, dtype=np.int32)
    is_first = np.arange(len(tokens)) % length == 0
    offsets = np.arange(0, len(tokens) + 1, length)
    rows = EncodedRows(sample_ids(samples), tokens, ~is_first, np.ones(len(tokens), bool), offsets)
    monkeypatch.setattr(encoded_rows, "WINDOW_TOKENS", 20_000)
    trace = Trace.create(tmp_path, rows, "model", None, None)
    for record in (Record("noisy", 0), FIRST, LAST):
        scores = [
            Scores(
                rng.gamma(2, size=window.loss_offsets[-1]).astype(np.float32),
                rng.normal(size=(len(window), 4)).astype(np.float16),
            )
            for window in rows.windows()
        ]
        trace.append(record, scores)
    return trace


def test_memory_does_not_grow_with_the_losses_of_a_trace(long_trace):
    """Opening holds the token ids and the loss mask. No measure holds a float32 value of each loss token."""
    tokens = len(long_trace.rows.tokens)
    measures = ("loss", "relative", "pooled", "smoothed", "combined")
    calls = [f"trace.forgetting({measure!r})" for measure in measures] + ["trace.identity()", "trace.losses()"]
    command = [sys.executable, "-c", PEAKS, str(long_trace.folder), *calls]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    held, opening, *peaks, arrow = map(int, output.split())
    assert held < 5.5 * tokens
    assert opening < 6.5 * tokens
    assert [peak < held + 4 * tokens for peak in peaks] == [True] * len(calls)
    assert arrow < 3 * tokens
    np.testing.assert_array_equal(Trace.open(long_trace.folder).rows.tokens, long_trace.rows.tokens)


def test_slices_are_those_of_the_column_in_the_file(trace, rows, monkeypatch):
    """Some rows have no loss token, and slices begin and end inside of rows and of row groups."""
    monkeypatch.setattr(encoded_rows, "WINDOW", 2)
    record, rng = Record("noisy", 2), np.random.default_rng(3)
    losses = rng.gamma(2, size=rows.loss_offsets[-1]).astype(np.float32)
    states = rng.normal(size=(len(rows), 3)).astype(np.float16)
    scores, start = [], 0
    for window in rows.windows():
        of_losses = slice(*rows.loss_offsets[[start, start + len(window)]])
        scores.append(Scores(losses[of_losses], states[start : start + len(window)]))
        start += len(window)
    trace.append(record, scores, ["text"] * len(rows), rouge1_of(rows, record))
    assert pq.ParquetFile(trace.folder / "records" / record.file_name).num_row_groups == 4
    stored = trace.stored_losses(record)
    for start in range(len(losses) + 1):
        for stop in range(start, len(losses) + 1):
            np.testing.assert_array_equal(stored[start:stop], losses[start:stop], strict=True)
    np.testing.assert_array_equal(stored[:], losses, strict=True)
    np.testing.assert_array_equal(trace.states(record), states, strict=True)
    np.testing.assert_array_equal(trace.rouge1(record), rouge1_of(rows, record), strict=True)


def test_consecutive_slices_read_each_part_of_the_file_once(long_trace, monkeypatch):
    read, read_row_group = [], pq.ParquetFile.read_row_group

    def count(parquet: pq.ParquetFile, index: int, *args: object) -> object:
        read.append(index)
        return read_row_group(parquet, index, *args)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", count)
    losses, offsets = long_trace.stored_losses(FIRST), long_trace.rows.loss_offsets
    monkeypatch.setattr("forgetfilter_callback.measures.common.WINDOW_TOKENS", 7_000)
    parts = [losses[span] for _, span in windows(offsets)]
    assert len(parts) == 58 and read == list(range(20))
    np.testing.assert_array_equal(np.concatenate(parts), long_trace.token_losses(FIRST))


def test_a_record_that_is_replaced_between_two_slices_is_an_error(long_trace):
    stored = long_trace.stored_losses(LAST)
    assert stored[:3].shape == (3,)
    file = long_trace.folder / "records" / LAST.file_name
    replacement = file.with_suffix(".new")
    replacement.write_bytes(file.read_bytes())
    replacement.replace(file)
    with pytest.raises(TraceError, match="was replaced while it was read"):
        stored[-3:]
