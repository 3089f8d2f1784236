"""Rows from files, folders and the Hub, as people have them; and writing rows back."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from .files import as_json_lines


logger = logging.getLogger(__name__)


# File endings and the loader of `datasets` that reads them.
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class DataError(ValueError):
    """Rows that cannot be read. The message names the place and the way out."""


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


def digest_of(source: str) -> str | None:
    """A hash of a file of JSON lines; `None` of all else."""
    path = Path(source)
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def lines_of(source: str, rows: Dataset, digest: str | None) -> Iterable[str]:
    """Rows as JSON lines: of a file of JSON lines its very lines, if its [`digest_of`] is still that of when `rows` were
    read; otherwise made anew.

    (Read and written again, a date would be another text, and a number might have fewer digits.)
    """
    if digest is None:
        return as_json_lines(rows)
    if digest_of(source) != digest:
        logger.warning(f"{source} has changed since it was read. Rows are written as they were then, made anew.")
        return as_json_lines(rows)
    with Path(source).open(encoding="utf-8-sig", newline="\n") as file:
        lines = [line.rstrip("\r\n") for line in file if line.strip()]
    return lines if len(lines) == len(rows) else as_json_lines(rows)
