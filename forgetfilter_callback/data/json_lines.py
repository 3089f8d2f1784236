"""TODO"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset


logger = logging.getLogger(__name__)


def to_json_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Rows as JSON, one a line. What JSON has no form for, such as a time, is written as text."""
    return (json.dumps(dict(row), ensure_ascii=False, default=str) for row in rows)


def file_digest(source: str) -> str | None:
    """A hash of a file of JSON lines; `None` of all else."""
    path = Path(source)
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def source_lines(source: str, rows: Dataset, digest: str | None) -> Iterable[str]:
    """Rows as JSON lines: of a file of JSON lines its very lines, if its [`file_digest`] is still that of when `rows` were
    read; otherwise made anew.

    (Read and written again, a date would be another text, and a number might have fewer digits.)
    """
    if digest is None:
        return to_json_lines(rows)
    if file_digest(source) != digest:
        logger.warning(f"{source} has changed since it was read. Rows are written as they were then, made anew.")
        return to_json_lines(rows)
    with Path(source).open(encoding="utf-8-sig", newline="\n") as file:
        lines = [line.rstrip("\r\n") for line in file if line.strip()]
    return lines if len(lines) == len(rows) else to_json_lines(rows)
