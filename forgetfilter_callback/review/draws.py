"""Rows that a review has drawn at random, as JSON lines on disk.

A row that was drawn needs a verdict, also if it was skipped before the review was closed: if difficult rows were left out,
the estimates would be wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from .verdicts import append_json_lines


DRAWS_FILE = "draws.jsonl"


def append_draws(draws: Mapping[int, int], ids: pa.StringArray, file: Path) -> None:
    """Append draws to a file, one JSON object per line. They are on disk when the function returns.

    Args:
        draws (`Mapping[int, int]`):
            Row number to the number of rows without a verdict that the row was drawn from.
        ids (`pa.StringArray` of length `samples`):
            Sample ids of the trace.
        file (`Path`):
            The file.
    """
    lines = [{"row": row, "id": ids[row].as_py(), "drawn_from": size, "rows": len(ids)} for row, size in draws.items()]
    append_json_lines(lines, file)


def read_draws(file: Path, ids: pa.StringArray, without_verdict: int) -> dict[int, int]:
    """Read draws in their order: row number to the number of rows that it was drawn from.

    Lines that a crash has cut short, and draws of another set or of a review that was deleted, are left out: their rows can
    be drawn again.

    Args:
        file (`Path`):
            The file. There are no draws if it does not exist.
        ids (`pa.StringArray` of length `samples`):
            Sample ids of the trace.
        without_verdict (`int`):
            The number of rows that have no verdict now. Rows without a verdict only become fewer, so a draw from fewer rows
            is not of this review.
    """
    if not file.is_file():
        return {}
    draws: dict[int, int] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            draw = json.loads(line)
            row, drawn_from = draw["row"], draw["drawn_from"]
            is_of_set = draw["rows"] == len(ids) and row >= 0 and ids[row].as_py() == draw["id"]
            if is_of_set and without_verdict <= drawn_from <= len(ids):
                draws[row] = drawn_from
        except (ValueError, TypeError, LookupError):
            continue
    return draws
