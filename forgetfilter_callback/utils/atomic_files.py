"""Files that are written all or nothing: under another name first, which a crash leaves behind, and then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa


@contextmanager
def atomic_write(file: Path, before_commit: Callable[[], object] | None = None) -> Iterator[Path]:
    """Gives a name beside `file` to write to, then puts what was written in its place, all or nothing.

    `before_commit` is called once all of it is on disk, right before it gets its name.
    """
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        with unfinished.open("rb+") as handle:
            os.fsync(handle.fileno())
        if before_commit is not None:
            before_commit()
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_parquet(tables: Iterable[pa.Table], file: Path, before_commit: Callable[[], object] | None = None) -> None:
    """Writes a Parquet file atomically, of a row group a table; there is at least one. Pages have checksums."""
    from pyarrow import parquet  # not where settings are read only

    rest = iter(tables)
    first = next(rest)
    with (
        atomic_write(file, before_commit) as unfinished,
        parquet.ParquetWriter(unfinished, first.schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        writer.write_table(first)
        for table in rest:
            writer.write_table(table)


def write_json(content: Any, file: Path) -> None:
    """Writes a JSON file atomically."""
    write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", file)


def write_text(text: str, file: Path) -> None:
    """Writes a text file atomically."""
    with atomic_write(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_lines(lines: Iterable[str], file: Path) -> None:
    """Writes lines, atomically."""
    with atomic_write(file) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(f"{line}\n" for line in lines)
