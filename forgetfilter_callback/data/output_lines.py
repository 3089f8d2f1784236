"""Write rows as JSON Lines, and keep the original lines of a JSON Lines file."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def to_json_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Serialize rows as JSON, one line per row. Values that JSON does not support, such as dates, become strings."""
    return (json.dumps(dict(row), ensure_ascii=False, default=str) for row in rows)


def file_digest(source: str) -> str | None:
    """Hash a JSON Lines file (`.jsonl`). Return `None` if `source` is anything else."""
    path = Path(source)
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def source_lines(source: str, rows: Dataset, digest: str | None) -> Iterable[str]:
    """Return rows as JSON lines, using the original lines of a JSON Lines file where possible.

    Serializing a parsed row again can change it: a date may become a different string, and a number may lose digits.

    Args:
        source (`str`):
            Where `rows` were loaded from.
        rows (`Dataset`):
            The rows. They are serialized if the original lines are not available.
        digest (`str`, *optional*):
            The [`file_digest`] of `source` when `rows` were loaded. The original lines are used only if it is
            unchanged.
    """
    if digest is None:
        return to_json_lines(rows)
    if file_digest(source) != digest:
        logger.warning(
            f"{source} has changed since it was loaded. Writing the rows as they were loaded, serialized again."
        )
        return to_json_lines(rows)
    lines = file_lines(source)
    return lines if len(lines) == len(rows) else to_json_lines(rows)


def file_lines(source: str) -> list[str]:
    """Return the lines of a JSON Lines file that are not blank, as they are."""
    with Path(source).open(encoding="utf-8-sig", newline="\n") as file:
        return [line.rstrip("\r\n") for line in file if line.strip()]
