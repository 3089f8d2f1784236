"""TODO"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
)

from ..data.text_rows import encode_rows
from ..data.tokenizers import load_tokenizer
from ..errors import DataError
from .trace import Trace


def source_path(trace: Trace) -> str:
    """Where the rows lie that a trace was made of."""
    if "source" not in trace.manifest:
        raise DataError(f"The trace in {trace.folder} does not say where its rows lie. Name them: `--noisy`.")
    source: str = trace.manifest["source"]
    if (
        Path(source).is_absolute() and not Path(source).exists()
    ):  # a file or folder, as `absolute_path_or_hub_id` notes them
        raise DataError(f"The rows of the trace lay in {source}, where nothing is now. Say where they lie: `--noisy`.")
    return source


def audit_labels(trace: Trace, rows: Dataset, tokenizer: PreTrainedTokenizerBase, column: str) -> np.ndarray:
    """Whether each sample of the trace is unsafe by a column of its rows; rows are found by what is trained on.

    Raises:
        DataError: if there is no such column, or samples of the trace are not among the rows.
    """
    if column not in rows.column_names:
        raise DataError(f"The rows have no column {column!r}, but {', '.join(rows.column_names)}.")
    labels = np.asarray(rows[column])
    if labels.dtype.kind not in "biuf":  # the text "False" would be true
        raise DataError(
            f"The column {column!r} holds neither true/false nor numbers, but for example {str(labels[0])!r}."
        )
    manifest = trace.manifest
    encoded = encode_rows(rows, tokenizer, manifest["max_length"], disable_tqdm=True, **manifest["encoding"])
    places = pc.index_in(trace.rows.ids, value_set=encoded.ids)
    if places.null_count:
        raise DataError(
            f"{places.null_count} samples of the trace are not among these rows. Name the rows it was made of."
        )
    return labels.astype(bool)[places.to_numpy()]


def load_trace_tokenizer(trace: Trace) -> PreTrainedTokenizerBase:
    """The tokenizer that a trace's rows were encoded with."""
    name = trace.manifest["tokenizer"]
    if name is None:
        raise DataError(f"The trace in {trace.folder} does not say its tokenizer. Name it: `--tokenizer`.")
    return load_tokenizer(name)
