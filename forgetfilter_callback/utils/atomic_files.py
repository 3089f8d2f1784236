"""Atomic file writes (temporary file, fsync, rename)."""

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
    """Yield a temporary path next to `file`, and rename it to `file` when the block succeeds.

    If the block raises, `file` is unchanged and the temporary file is deleted.

    Args:
        file (`Path`):
            The file to write or replace.
        before_commit (`Callable`, *optional*):
            Called after the temporary file is on disk and before the rename. If it raises, `file` is unchanged.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        if before_commit is not None:
            before_commit()
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(file: Path) -> None:
    """Wait until the contents of a file are on disk.

    Raises:
        OSError: if they cannot be written, for example because the disk is full.
    """
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())


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
    write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", file)


def write_text(text: str, file: Path) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_lines(lines: Iterable[str], file: Path) -> None:
    """Write lines to a UTF-8 text file atomically. Each line ends with `\\n` on every platform."""
    with atomic_write(file) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(f"{line}\n" for line in lines)
