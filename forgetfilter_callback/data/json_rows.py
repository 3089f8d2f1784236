"""Rows of JSON and CSV files, with the text they have in the file."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from ..utils.counted import counted


TEXT_EXTENSIONS = (".jsonl", ".json", ".csv")

_WHITE_SPACE = re.compile(r"[ \t\r\n]*")
# A string in JSON contains no line break, so a line break in a row is outside of strings.
_LINE_BREAK = re.compile(r"[ \t]*[\r\n][ \t\r\n]*")


class JsonRows(Sequence[dict[str, Any]]):
    """Rows that are parsed one at a time, each by itself: a text never becomes a date, and a row has only its own keys.

    Attributes:
        lines (`list[str]`):
            One JSON object per row, without line breaks.
    """

    def __init__(self, lines: list[str]):
        self.lines = lines

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> JsonRows: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | JsonRows:
        if isinstance(index, slice):
            return JsonRows(self.lines[index])
        row: dict[str, Any] = json.loads(self.lines[index])
        return row


def read_text_file(path: Path) -> JsonRows:
    """Read a file with one of the `TEXT_EXTENSIONS`.

    Raises:
        ValueError: if the file is not UTF-8, if it is neither JSON Lines nor one list of JSON objects, or if a line of a CSV
            file does not have as many values as its header or has a wrong quote or separator.
    """
    try:
        return _read_csv(path) if path.suffix.lower() == ".csv" else _read_json(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"its text is not UTF-8 ({error.reason}). Save the file as UTF-8") from None


def _read_json(path: Path) -> JsonRows:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return JsonRows([_LINE_BREAK.sub(" ", item) for item in _items_of_list(text)])
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):  # `splitlines` also splits at separators within a text
        if line.strip():
            try:
                _check_is_object(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            lines.append(line)
    return JsonRows(lines)


def _read_csv(path: Path) -> JsonRows:
    limit = csv.field_size_limit(2**31 - 1)  # 128 KiB by default; it applies to the whole process
    try:
        return _read_csv_values(path)
    finally:
        csv.field_size_limit(limit)


def _read_csv_values(path: Path) -> JsonRows:
    lines = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        # Otherwise a quote that is not closed would turn all following rows into one value.
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(header) == 1 and (separators := set(header[0]) & {";", "\t", "|"}):
                found = " or ".join(map(repr, sorted(separators)))
                raise csv.Error(f"the values must be separated by commas, but the header {header[0]!r:.60} has {found}")
            if len(set(header)) < len(header):
                raise csv.Error(f"two columns have the same name ({', '.join(header)})")
            for values in filter(None, reader):  # a blank line has no values
                if len(values) != len(header):
                    raise csv.Error(f"{counted(len(values), 'value')}, but the header has {len(header)}")
                lines.append(json.dumps(dict(zip(header, values, strict=True)), ensure_ascii=False))
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None
    return JsonRows(lines)


def _items_of_list(text: str) -> Iterator[str]:
    """The text of each item of a JSON list."""
    decoder = json.JSONDecoder()
    position = _skip_white_space(text, text.index("[") + 1)
    while not text.startswith("]", position):
        row, end = decoder.raw_decode(text, position)
        _check_is_object(row)
        yield text[position:end]
        position = _skip_white_space(text, end)
        if text.startswith(",", position):
            position = _skip_white_space(text, position + 1)
        elif not text.startswith("]", position):
            raise ValueError(f"the list must go on with a comma or end, but it has {text[position : position + 20]!r}")
    if text[position + 1 :].strip():
        raise ValueError("there is more text after the end of the list")


def _skip_white_space(text: str, position: int) -> int:
    match = _WHITE_SPACE.match(text, position)
    assert match is not None  # it matches the empty text
    return match.end()


def _check_is_object(row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, but this one is {row!r:.60}")
