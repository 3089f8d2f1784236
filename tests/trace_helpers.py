"""Records with random contents for the tests of the trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from forgetfilter_callback.data.encoded_rows import EncodedRows
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


STEPS = [Record("noisy", 0), Record("noisy", 6), Record("safety", 0), Record("safety", 3), Record("safety", 8)]


def scores_of(rows: EncodedRows, record: Record) -> Scores:
    rng = np.random.default_rng([len(record.session), record.step])
    losses = rng.gamma(2, 1, rows.loss_offsets[-1]).astype(np.float32)
    return Scores(losses, rng.normal(size=(len(rows), 4)).astype(np.float16))


def rouge1_of(rows: EncodedRows, record: Record) -> np.ndarray:
    return np.random.default_rng([7, record.step]).random(len(rows))


def record_files(folder: Path) -> dict[str, bytes]:
    """The bytes of all Parquet files in a folder, by relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.parquet"))}
