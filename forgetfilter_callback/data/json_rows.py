"""Rows of JSON and CSV files, with the text they have in the file."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from ..utils.counted import counted


TEXT_EXTENSIONS = (".jsonl", ".json", ".csv")

_WHITE_SPACE = re.compile(r"[ \t\r\n]*")
# A string in JSON contains no line break, so a line break in a row is outside of strings.
_LINE_BREAK = re.compile(r"[ \t]*[\r\n][ \t\r\n]*")


class JsonRows(Sequence[dict[str, Any]]):
    """Rows that are parsed one at a time, each by itself: a text never becomes a date, and a row has only its own keys.

    Args:
        lines (`Iterable[str]`):
            One JSON object per row, without line breaks.
    """

    def __init__(self, lines: Iterable[str]):
        # As UTF-8, because a string takes two or four bytes per character if one of its characters is not Latin.
        self._lines = [line.encode() for line in lines]

    @property
    def lines(self) -> Iterator[str]:
        """The lines of all rows in order."""
        return (line.decode() for line in self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> JsonRows: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | JsonRows:
        if isinstance(index, slice):
            return JsonRows(line.decode() for line in self._lines[index])
        row: dict[str, Any] = json.loads(self._lines[index])
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
    if not _is_list(path):
        return JsonRows(_lines_of_objects(path))
    text = path.read_text(encoding="utf-8-sig")
    return JsonRows(_LINE_BREAK.sub(" ", item) for item in _items_of_list(text))


def _is_list(path: Path) -> bool:
    """Whether the first character that is not white space opens a list."""
    with path.open(encoding="utf-8-sig") as file:
        while character := file.read(1):
            if not character.isspace():
                return character == "["
    return False


def _lines_of_objects(path: Path) -> Iterator[str]:
    """The lines of a JSON Lines file. The file is read line by line: its whole text would take as much memory again."""
    with path.open(encoding="utf-8-sig") as file:  # splits at line breaks only, not at separators within a text
        for number, line in enumerate(file, start=1):
            if line.strip():
                line = line.removesuffix("\n")
                try:
                    _check_is_object(json.loads(line))
                except ValueError as error:
                    raise ValueError(
                        f"line {number}: {error}. The file must have one JSON object per line, or one list of them"
                    ) from None
                yield line


def _read_csv(path: Path) -> JsonRows:
    limit = csv.field_size_limit(2**31 - 1)  # 128 KiB by default; it applies to the whole process
    try:
        return JsonRows(_lines_of_csv(path))
    finally:
        csv.field_size_limit(limit)


def _lines_of_csv(path: Path) -> Iterator[str]:
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
                yield json.dumps(dict(zip(header, values, strict=True)), ensure_ascii=False)
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None


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
