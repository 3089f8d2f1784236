"""Verdicts of reviewers, as JSON lines on disk."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from ..data.encoded_rows import content_hash
from ..data.identical_rows import worst_labels
from ..errors import DecisionError
from ..trace.trace import Trace
from ..trace.trace_folder import find_trace_folder
from ..utils.counted import counted


logger = logging.getLogger(__name__)

VerdictLabel = Literal["unsafe", "safe"]
VERDICTS_FILE = "verdicts.jsonl"
REVIEW_FOLDER = "review"  # in the trace's folder


@dataclass(frozen=True)
class Verdict:
    """What a reviewer said about one row.

    Attributes:
        row (`int`):
            Row number in the noisy set, from 0.
        id (`str`):
            Sample id of the row.
        verdict (`"unsafe"` or `"safe"`):
            The verdict.
        time (`str`):
            When it was given (ISO 8601, UTC).
        reviewer (`str`, *optional*):
            Who gave it.
        drawn_from (`int`, *optional*):
            The number of rows that had no verdict when the row was drawn from them at random. `None` if the row was not
            drawn at random.
        identical_to (`int`, *optional*):
            The number of a reviewed row with the same tokens. This row was drawn at random, but not shown: it has the
            verdict of that row.
        rows (`int`, *optional*):
            Rows of the set. `None` in files of older versions.
    """

    row: int
    id: str
    verdict: VerdictLabel
    time: str
    reviewer: str | None = None
    drawn_from: int | None = None
    identical_to: int | None = None
    rows: int | None = None


def known_labels(verdicts: Iterable[Verdict], contents: np.ndarray) -> dict[int, VerdictLabel]:
    """The valid verdict of each reviewed row, and those of the rows that are trained on the same tokens as one.

    Args:
        verdicts (`Iterable[Verdict]`):
            All verdicts in the order in which they were given.
        contents (`np.ndarray` of shape `(samples,)`, integer):
            The [`content_numbers`] of the trace.

    Returns:
        `dict[int, str]`: row number to `"unsafe"` or `"safe"`. A row without a verdict is unsafe if an identical one is.
    """
    labels = {verdict.row: verdict.verdict for verdict in verdicts}
    of_content = worst_labels(((int(contents[row]), label) for row, label in labels.items()), worst="unsafe")
    identical = np.flatnonzero(np.isin(contents, list(of_content))).tolist()
    return {row: labels.get(row, of_content[int(contents[row])]) for row in identical}


def append_verdicts(verdicts: Iterable[Verdict], file: Path) -> int:
    """Append verdicts to a file (see [`append_json_lines`]). Returns the number of bytes that were written."""
    return append_json_lines(map(asdict, verdicts), file)


def append_json_lines(contents: Iterable[Mapping[str, Any]], file: Path) -> int:
    """Append JSON objects to a file, one per line. They are on disk when the function returns.

    Returns:
        `int`: the number of bytes that were written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(content, ensure_ascii=False) + "\n" for content in contents)
    with file.open("a+b") as stream:
        stream.seek(0, os.SEEK_END)
        if stream.tell() > 0:
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":  # a crash cut the last line short; it stays in the file
                text = "\n" + text
        written = text.encode()
        stream.write(written)
        stream.flush()
        os.fsync(stream.fileno())
    return len(written)


def review_folder(trace: Trace, folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the verdicts. Defaults to the folder `review` in the trace's folder.

    Raises:
        DecisionError: if `folder` is a file, the folder of a trace, or the output folder of a run.
    """
    if folder is None:
        return trace.folder / REVIEW_FOLDER
    if Path(folder).is_file():
        raise DecisionError(f"{folder} is a file. Pass the folder of the verdicts, {Path(folder).parent}.")
    trace_folder = find_trace_folder(folder)
    if Trace.exists(trace_folder):
        raise DecisionError(
            f"{folder} contains a trace. Pass the folder of its verdicts, {trace_folder / REVIEW_FOLDER}."
        )
    return Path(folder)


def trace_verdicts(trace: Trace, folder: str | os.PathLike[str] | None = None) -> list[Verdict]:
    """Read the verdicts in the [`review_folder`]. See [`read_verdicts`].

    Without `folder`, verdicts that cannot be read are left out with a warning: nobody has asked for them.
    """
    try:
        return read_verdicts(review_folder(trace, folder) / VERDICTS_FILE, trace.rows.ids)
    except DecisionError as error:
        if folder is not None:
            raise
        _warn_once(f"The verdicts of the trace are left out. {error}")
        return []


def read_verdicts(file: Path, ids: pa.StringArray) -> list[Verdict]:
    """Read all verdicts in the order in which they were given. A line that is cut short is skipped with a warning, and lines
    that are not in the order of their times cause one.

    Args:
        file (`Path`):
            The file. There are no verdicts if it does not exist.
        ids (`pa.StringArray` of length `samples`):
            Sample ids of the trace.

    Raises:
        DecisionError: if the file cannot be read, if a verdict is about another trace, if a line holds no verdict, or if its
            `drawn_from` or `identical_to` is impossible.
    """
    try:
        content = file.read_text(encoding="utf-8-sig", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:  # such as a folder of this name
        raise DecisionError(f"The verdicts in {file} cannot be read: {error}.") from error
    verdicts: dict[int, Verdict] = {}  # by line number
    damaged = 0
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            _warn_once(f"{file}, line {number} is damaged and was skipped. Review that row again.")
            damaged += 1
            continue
        verdict = _as_verdict(fields, f"{file}, line {number}")
        if not 0 <= verdict.row < len(ids) or ids[verdict.row].as_py() != verdict.id:
            raise DecisionError(
                f"{file}, line {number}: the verdict is about another set (row {verdict.row} has another id here). Pass "
                "the trace that was reviewed, or another review folder."
            )
        of = verdict.identical_to
        if of is not None:
            is_row = is_whole(of) and 0 <= of < len(ids)
            if not is_row or content_hash(ids[of].as_py()) != content_hash(verdict.id):
                raise DecisionError(
                    f"{file}, line {number}: identical_to={of!r} must be null or the number of a row that is identical to "
                    f"row {verdict.row}."
                )
        if verdict.rows is not None and verdict.rows != len(ids):
            _warn_once(
                f"The verdicts in {file} were given on a set of {counted(verdict.rows, 'row')}, but this one has "
                f"{len(ids):,}. The verdicts stay valid, but their rows count as not drawn at random."
            )
            verdict = replace(verdict, drawn_from=None)
        verdicts[number] = verdict
    # Rows without a verdict only become fewer, so each draw was from at least as many as there are now. A damaged line may
    # have held one more verdict.
    least = len(ids) - len({verdict.row for verdict in verdicts.values()}) - damaged
    for number, verdict in verdicts.items():
        drawn_from = verdict.drawn_from
        if drawn_from is not None and not (is_whole(drawn_from) and max(least, 1) <= drawn_from <= len(ids)):
            raise DecisionError(
                f"{file}, line {number}: drawn_from={drawn_from!r} cannot be the number of rows that had no verdict when "
                f"row {verdict.row} was drawn at random: it must be from {max(least, 1)} to {len(ids)}. Restore the file "
                "from a backup, or set the value to null. The estimates then treat the row as not drawn at random."
            )
    for (_, earlier), (number, verdict) in pairwise(verdicts.items()):
        if verdict.time < earlier.time:
            _warn_once(
                f"{file}, line {number}: this verdict is older than the one in the line before. The estimates, and which of "
                "two verdicts on a row is valid, depend on the order of the lines. If they were sorted or merged, restore "
                "the order in which the verdicts were given."
            )
            break
    return [*verdicts.values()]


@cache
def _warn_once(message: str) -> None:
    """One command reads the verdicts several times."""
    logger.warning(message)


def _as_verdict(fields: Any, place: str) -> Verdict:
    """The verdict in a line of the file. `place` is the name of the line.

    Raises:
        DecisionError: if it is none.
    """
    if not isinstance(fields, dict) or not {"row", "id", "verdict", "time"} <= fields.keys():
        raise DecisionError(f"{place} holds no verdict. Pass the folder of a review.")
    unknown = sorted(fields.keys() - {each.name for each in dataclass_fields(Verdict)})
    if unknown:
        raise DecisionError(f"{place}: a verdict has no {', '.join(unknown)}. Remove it, or update this library.")
    verdict = Verdict(**fields)
    if verdict.verdict not in get_args(VerdictLabel):
        raise DecisionError(f"{place}: the verdict is {verdict.verdict!r}. It must be 'unsafe' or 'safe'.")
    if not is_whole(verdict.row) or not isinstance(verdict.time, str):
        raise DecisionError(f"{place}: `row` must be a whole number and `time` a string.")
    if verdict.rows is not None and not (is_whole(verdict.rows) and verdict.rows > 0):
        raise DecisionError(f"{place}: `rows` must be a positive whole number or null.")
    return verdict


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)
