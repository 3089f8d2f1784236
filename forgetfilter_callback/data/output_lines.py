"""Write rows as JSON Lines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .json_rows import TEXT_EXTENSIONS, JsonRows


if TYPE_CHECKING:
    from datasets import Dataset


def to_json_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Serialize rows as JSON, one line per row. Values that JSON does not support, such as dates, become strings."""
    return (json.dumps(dict(row), ensure_ascii=False, default=str) for row in rows)


def file_digest(source: str) -> str | None:
    """Hash a JSON or CSV file. Return `None` if `source` is anything else."""
    path = Path(source)
    if path.suffix.lower() not in TEXT_EXTENSIONS or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def source_lines(rows: Dataset | JsonRows) -> Iterable[str]:
    """Return loaded rows as JSON lines. Rows of a JSON file keep their text: parsing and serializing could change it."""
    return rows.lines if isinstance(rows, JsonRows) else to_json_lines(rows)
