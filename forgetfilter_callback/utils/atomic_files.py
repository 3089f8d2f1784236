"""Atomic file writes (temporary file, fsync, rename)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa


@contextmanager
def atomic_write(file: Path, before_commit: Callable[[], object] | None = None) -> Iterator[Path]:
    """Yield a temporary path next to `file`, and rename it to `file` when the block succeeds. See [`atomic_writes`]."""
    with atomic_writes([file], before_commit) as (temporary,):
        yield temporary


@contextmanager
def atomic_writes(files: Sequence[Path], before_commit: Callable[[], object] | None = None) -> Iterator[list[Path]]:
    """Yield a temporary path next to each file, and rename them all when the block succeeds.

    If the block raises, the files are unchanged and the temporary files are deleted.

    Args:
        files (`Sequence[Path]`):
            The files to write or replace. They are renamed in this order, once all of them are on disk.
        before_commit (`Callable`, *optional*):
            Called after the temporary files are on disk and before they are renamed. If it raises, the files are unchanged.
    """
    temporaries = [file.with_name(f".{file.name}.{os.getpid()}.tmp") for file in files]
    try:
        yield temporaries
        for temporary in temporaries:
            with temporary.open("rb+") as handle:
                os.fsync(handle.fileno())  # raises if the disk is full
        if before_commit is not None:
            before_commit()
        for temporary, file in zip(temporaries, files, strict=True):
            os.replace(temporary, file)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def file_version(file: Path) -> tuple[int, int] | None:
    """Two numbers that change whenever a file is written atomically. `None` if there is no file."""
    try:
        status = file.stat()
    except OSError:  # such as a folder that is a file
        return None
    return status.st_ino, status.st_mtime_ns


def write_parquet(tables: Iterable[pa.Table], file: Path, before_commit: Callable[[], object] | None = None) -> None:
    """Write a Parquet file atomically, with one row group per table and a checksum per page.

    Args:
        tables (`Iterable[pa.Table]`):
            The tables, which share one schema. There must be at least one.
        file (`Path`):
            The file to write or replace.
        before_commit (`Callable`, *optional*):
            See [`atomic_write`].
    """
    from pyarrow import parquet  # imported here because the JSON and text writers do not need it

    remaining = iter(tables)
    first = next(remaining)
    with (
        atomic_write(file, before_commit) as temporary,
        # Without dictionaries: losses and states hardly repeat, and decoding a dictionary of float16 is ten times slower.
        parquet.ParquetWriter(
            temporary, first.schema, use_dictionary=False, compression="zstd", write_page_checksum=True
        ) as writer,
    ):
        writer.write_table(first)
        for table in remaining:
            writer.write_table(table)


def write_json(content: Any, file: Path) -> None:
    """Write a JSON file atomically."""
    with atomic_write(file) as temporary:
        fill_with_json(content, temporary)


def write_text(text: str, file: Path) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_lines(lines: Iterable[str], file: Path) -> None:
    """Write lines to a UTF-8 text file atomically. Each line ends with `\\n` on every platform."""
    with atomic_write(file) as temporary:
        fill_with_lines(lines, temporary)


def fill_with_json(content: Any, temporary: Path) -> None:
    """Write JSON to a temporary path from [`atomic_writes`]."""
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fill_with_lines(lines: Iterable[str], temporary: Path) -> None:
    """Write lines to a temporary path from [`atomic_writes`]."""
    with temporary.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(f"{line}\n" for line in lines)
