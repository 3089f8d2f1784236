"""Rows that were drawn at random and skipped, as JSON lines on disk.

Difficult rows are skipped. If a review ended without them, the rows drawn at random would be too easy, and the estimates
wrong. So these rows come back in the next review.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from ..errors import DecisionError
from .verdicts import Verdict, append_json_lines, is_whole


SKIPPED_FILE = "skipped.jsonl"


def append_skipped_draws(draws: Mapping[int, int], after: str | None, ids: pa.StringArray, file: Path) -> None:
    """Append rows to a file. They are on disk when the function returns.

    Args:
        draws (`Mapping[int, int]`):
            Row number to the number of rows without a verdict that the row was drawn from.
        after (`str`, *optional*):
            Time of the latest verdict. `None` if there is none.
        ids (`pa.StringArray` of length `samples`):
            Sample ids of the trace.
        file (`Path`):
            The file.
    """
    append_json_lines(
        (
            {"row": row, "id": ids[row].as_py(), "drawn_from": size, "rows": len(ids), "after": after}
            for row, size in draws.items()
        ),
        file,
    )


def read_skipped_draws(file: Path, ids: pa.StringArray, verdicts: Sequence[Verdict]) -> dict[int, int]:
    """Read the rows that were drawn at random and skipped, and the number of rows that each was drawn from.

    Lines that a crash has cut short, and those of another set or of a review that was deleted, are left out: their rows can
    be drawn again.

    Args:
        file (`Path`):
            The file. No row was skipped if it does not exist.
        ids (`pa.StringArray` of length `samples`):
            Sample ids of the trace.
        verdicts (`Sequence[Verdict]`):
            The verdicts of the review.

    Raises:
        DecisionError: if the file cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DecisionError(f"The skipped rows in {file} cannot be read: {error}.") from error
    times = {None, *(verdict.time for verdict in verdicts)}
    # Rows without a verdict only become fewer, so a draw from fewer rows than now is not of this review.
    without_verdict = len(ids) - len({verdict.row for verdict in verdicts})
    draws: dict[int, int] = {}
    for line in lines:
        try:
            draw = json.loads(line)
            row, drawn_from, id_, rows, after = (draw[name] for name in ("row", "drawn_from", "id", "rows", "after"))
            is_of_review = after in times
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        is_of_review &= is_whole(drawn_from) and without_verdict <= drawn_from <= len(ids) == rows
        if is_of_review and is_whole(row) and 0 <= row < len(ids) and ids[row].as_py() == id_:
            draws[row] = drawn_from
    return draws
