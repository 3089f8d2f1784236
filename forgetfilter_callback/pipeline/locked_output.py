"""[`locked_output`]: the output folder of a command, locked, and restored if the command fails before its first record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from ..trace.trace import Trace
from ..utils.distributed import run_on_main


# The files of a trace that a command writes before its first record.
_TRACE_FILES = ("manifest.json", "rows.parquet", ".lock")


@contextmanager
def locked_output(
    output: Path, trace_folder: Path, files: tuple[str, ...] = (), folders: tuple[str, ...] = ()
) -> Iterator[None]:
    """Lock a trace folder while a command records into it. If the command fails before its first record, remove the files
    that it has created, and restore those that it has replaced.

    Otherwise a later run could take an empty trace, or settings that never ran, for those of an earlier run. All other files
    in `output` are kept. Under `torchrun`, the main process does this.

    Args:
        output (`Path`):
            The output folder. It is removed too if it is new and empty.
        trace_folder (`Path`):
            The folder of the trace: `output`, or a folder in it.
        files (`tuple[str, ...]`, defaults to `()`):
            Names of the small files in `output` that the command writes before its first record.
        folders (`tuple[str, ...]`, defaults to `()`):
            Names of the folders in `output` that the command creates before its first record, inner folders first. They
            are removed if they are empty.

    Raises:
        TraceError: if another process holds the lock.
    """
    replaced = {file: file.read_bytes() if file.is_file() else None for file in (output / name for name in files)}
    new_files = [file for file in (trace_folder / name for name in _TRACE_FILES) if not file.exists()]
    made = [trace_folder / "records", trace_folder, *(output / name for name in folders), output]
    new_folders = [folder for folder in made if not folder.exists()]
    records = record_versions(trace_folder)
    is_main, locks = False, list[FileLock]()

    def lock() -> None:
        nonlocal is_main
        acquired = Trace.lock(trace_folder)
        is_main = True
        if acquired is not None:
            locks.append(acquired)

    run_on_main(lock)
    try:
        yield
    except BaseException:
        if is_main and record_versions(trace_folder) == records:
            with suppress(
                OSError
            ):  # Windows does not remove the open lock file. The error of the command matters more.
                _restore(replaced, new_files, new_folders)
        raise
    finally:
        for acquired in locks:
            acquired.release(force=True)  # also for the tracker of a run that failed


def record_versions(trace_folder: Path) -> dict[Path, int]:
    """The files of the records, and when they were written."""
    return {file: file.stat().st_mtime_ns for file in (trace_folder / "records").glob("*.parquet")}


def _restore(replaced: dict[Path, bytes | None], new_files: list[Path], new_folders: list[Path]) -> None:
    for file, content in replaced.items():
        if content is None:
            file.unlink(missing_ok=True)
        elif file.read_bytes() != content:
            file.write_bytes(content)
    for file in new_files:
        file.unlink(missing_ok=True)
    for folder in new_folders:
        with suppress(OSError):  # it does not exist, or somebody has put a file into it
            folder.rmdir()
