"""Load rows from files, folders and the Hub, and encode them."""

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
from ..utils.counted import counted_of
from .blank_completions import describe_blank_completions
from .encode_text import encode_rows
from .encoded_rows import EncodedRows
from .json_rows import TEXT_EXTENSIONS, JsonRows, read_text_file
from .source_paths import FILE_EXTENSIONS, check_source


logger = logging.getLogger(__name__)


def load_rows(source: str | os.PathLike[str]) -> Dataset | JsonRows:
    """Load rows from a file, a folder or the Hub.

    Values keep the type that they have in the file: text that looks like a date or a number remains text, and all values
    of a CSV file are text.

    Args:
        source (`str` or `Path`):
            A file (JSON Lines, JSON, CSV or Parquet), a folder written by `Dataset.save_to_disk`, or the Hub id of a
            dataset. `owner/name` loads the `train` split. `owner/name:split` loads another split.

    Raises:
        DataError: if the file or dataset does not exist, has another format, cannot be read, or has no rows.
    """
    path = Path(source)
    extension = path.suffix.lower()
    check_source(str(source))
    try:
        if path.is_dir():
            rows = load_from_disk(str(path))
            if isinstance(rows, DatasetDict):
                raise DataError(f"{source} contains several splits ({', '.join(rows)}). Pass the folder of one split.")
        elif extension in TEXT_EXTENSIONS:
            rows = read_text_file(path)
        elif extension == ".parquet":
            rows = load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
        else:
            name, _, split = str(source).partition(":")
            rows = load_dataset(name, split=split or "train")
        if isinstance(rows, Dataset):
            rows.data.table.validate(full=True)  # finds invalid UTF-8 now, not when a row is read
    except (
        DatasetNotFoundError, DatasetGenerationError, OSError, ValueError, KeyError, TypeError, pa.ArrowException
    ) as error:  # fmt: skip
        if isinstance(error, DataError):
            raise
        cause = error.__cause__ if error.__cause__ is not None else error
        advice = ""
        if not path.is_file():
            advice = (
                f" It must be a file ({', '.join(FILE_EXTENSIONS)}), a folder written by `Dataset.save_to_disk`, or the "
                "Hub id of a dataset."
            )
        raise DataError(f"{source} cannot be read: {str(cause).rstrip('.')}.{advice}") from error
    if not len(rows):
        raise DataError(f"{source} has no rows.")
    return rows


def encode_source(
    source: str, rows: Dataset | JsonRows, tokenizer: PreTrainedTokenizerBase, max_length: int | None, **encoding: Any
) -> EncodedRows:
    """Encode rows with [`encode_rows`]. Errors name `source`, and a warning says how many rows were truncated.

    Args:
        source (`str`):
            Where `rows` were loaded from. It is used in messages only.
        rows (`Dataset` or `JsonRows`):
            The rows to encode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        max_length (`int`, *optional*):
            Rows with more tokens are truncated.
        **encoding:
            Further arguments of [`encode_rows`].

    Raises:
        EncodingError: if [`encode_rows`] raises it.
    """
    try:
        encoded = encode_rows(rows, tokenizer, max_length, disable_tqdm=True, **encoding)
    except EncodingError as error:
        raise EncodingError(f"{source}: {error}") from error
    if encoded.truncated:
        side = "left" if encoding.get("keep_end", False) else "right"
        logger.warning(
            f"{source}: {counted_of(encoded.truncated, len(encoded), 'row', 'were')} truncated on the {side}, to "
            f"{max_length} tokens. The truncated tokens are neither trained on nor scored."
        )
    return encoded


def warn_about_rows(source: str, rows: EncodedRows, tokenizer: PreTrainedTokenizerBase) -> None:
    """Log how many completions are empty and how many loss tokens are padding. [`ForgetTracker`] does so for its rows."""
    for description in (describe_blank_completions(rows, tokenizer), rows.describe_padding()):
        if description is not None:
            logger.warning(f"{source}: {description}")
