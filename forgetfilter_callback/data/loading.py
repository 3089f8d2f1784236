"""Rows from files, folders and the Hub, as people have them; and writing rows back."""

from __future__ import annotations

import glob
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

from ..errors import DataError, EncodingError
from .encoded_rows import EncodedRows
from .text_rows import encode_rows


logger = logging.getLogger(__name__)

# File endings and the loader of `datasets` that reads them.
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(source: str | os.PathLike[str]) -> Dataset:
    """Reads rows.

    Args:
        source (`str` or `Path`):
            A file (JSON lines, JSON, CSV, Parquet), a folder that `Dataset.save_to_disk` wrote, or a Hub id
            (`owner/name`, its `train` split; another with `owner/name:split`).

    Raises:
        DataError: if there is no such file or dataset, if it cannot be read, or if it has no rows.
    """
    path = Path(source)
    kind = path.suffix.lower()
    try:
        if path.is_dir():
            rows = load_from_disk(str(path))
            if isinstance(rows, DatasetDict):
                raise DataError(f"{source} holds several splits ({', '.join(rows)}). Name the folder of one of them.")
        elif kind in LOADERS:
            if not path.is_file():
                raise DataError(f"There is no file {source}.")
            if path.stat().st_size == 0:
                raise DataError(f"{source} is empty.")
            rows = load_dataset(LOADERS[kind], data_files=glob.escape(str(path)), split="train")
        else:
            name, _, split = str(source).partition(":")
            rows = load_dataset(name, split=split or "train")
        rows.data.table.validate(full=True)  # texts that are not UTF-8, which would be found out when they are read
    except (
        DatasetNotFoundError, DatasetGenerationError, OSError, ValueError, KeyError, TypeError, pa.ArrowException
    ) as error:  # fmt: skip
        if isinstance(error, DataError):
            raise
        cause = error.__cause__ if error.__cause__ is not None else error
        raise DataError(
            f"{source} cannot be read: {cause}. It must be a file ({', '.join(LOADERS)}), a folder of "
            "`Dataset.save_to_disk`, or the id of a dataset on the Hub."
        ) from error
    if not len(rows):
        raise DataError(f"{source} has no rows.")
    return rows


def encode_source(
    source: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, **encoding: Any
) -> EncodedRows:
    """Encodes rows; an error names where they came from, and a warning says how many were cut."""
    try:
        encoded = encode_rows(rows, tokenizer, max_length, disable_tqdm=True, **encoding)
    except EncodingError as error:
        raise EncodingError(f"{source}: {error}") from error
    if encoded.truncated:
        logger.warning(
            f"{source}: {encoded.truncated} of {len(encoded)} rows were longer than {max_length} tokens and were cut at the "
            "right. What was cut is neither trained on nor scored."
        )
    return encoded
