"""Find a trace, and the rows, labels and tokenizer it was created from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from ..data.json_rows import JsonRows
from ..data.output_lines import file_digest
from ..data.source_paths import is_path
from ..errors import DataError
from ..utils.counted import counted
from .trace import Trace


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def find_source(trace: Trace) -> str:
    """The file, folder or Hub id of the rows a trace was created from.

    Raises:
        DataError: if the trace does not name it, or if the file is no longer there.
    """
    if "source" not in trace.manifest:
        raise DataError(
            f"The trace in {trace.folder} does not name the file of its rows. Pass the noisy set (--noisy)."
        )
    source: str = trace.manifest["source"]
    # Files and folders are stored as absolute paths, Hub ids are not.
    if Path(source).is_absolute() and not Path(source).exists():
        raise DataError(
            f"The rows of the trace were in {source}, which does not exist. Pass the noisy set from where it is now "
            "(--noisy)."
        )
    return source


def is_unchanged(trace: Trace, source: str) -> bool:
    """Whether `source` is the file that a trace was created from, so that its rows are those of the trace in their order.

    Returns `False` where it is not known: for folders and Hub ids, and for traces that do not hold the hash of their file.
    """
    digest = trace.manifest.get("source_digest")
    return digest is not None and file_digest(source) == digest


def match_rows(trace: Trace, rows: Dataset | JsonRows, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Find the row of each sample of a trace, by the tokens it is trained on.

    Returns:
        `np.ndarray` of shape `(samples,)`, integer: numbers in `rows`.

    Raises:
        DataError: if a sample of the trace is not among the rows.
    """
    from ..data.encode_text import encode_rows  # imports torch

    manifest = trace.manifest
    encoded = encode_rows(rows, tokenizer, manifest["max_length"], disable_tqdm=True, **manifest["encoding"])
    indices = pc.index_in(trace.rows.ids, value_set=encoded.ids)
    if indices.null_count:
        raise DataError(
            f"These rows do not contain {counted(indices.null_count, 'row')} of the trace. Pass the rows that it was "
            "created from."
        )
    order: np.ndarray = indices.to_numpy()
    return order


def find_tokenizer(trace: Trace) -> str:
    """The folder or Hub id of the tokenizer that the rows of a trace were encoded with.

    Raises:
        DataError: if the trace does not name it, or if the folder is no longer there.
    """
    name: str | None = trace.manifest["tokenizer"]
    if name is None:
        raise DataError(f"The trace in {trace.folder} does not name its tokenizer. Pass the tokenizer (--tokenizer).")
    if is_path(name) and not Path(name).exists():
        raise DataError(
            f"The tokenizer of the trace was in {name}, which does not exist. Pass it from where it is now (--tokenizer)."
        )
    return name


def load_trace_tokenizer(trace: Trace) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the rows of a trace were encoded with.

    Raises:
        DataError: if the trace does not name it, or if it cannot be loaded.
    """
    from ..data.tokenizers import load_tokenizer  # imports transformers

    return load_tokenizer(find_tokenizer(trace))
