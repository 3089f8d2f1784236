"""[`locked_output`]: the output folder of a command, locked, and cleared if the command fails before its first record."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from ..trace.trace import Trace
from ..utils.distributed import run_on_main


@contextmanager
def locked_output(output: Path, trace_folder: Path) -> Iterator[None]:
    """Lock a trace folder while a command records into it, and remove what is new in `output` if it fails before the first
    record.

    Otherwise a later run could take an empty trace, or settings that never ran, for those of an earlier run. A trace that
    was there before, and all other files that were there before, are kept. Under `torchrun`, the main process does this.

    Args:
        output (`Path`):
            The output folder. It is removed too if it is new.
        trace_folder (`Path`):
            The folder of the trace: `output`, or a folder in it.

    Raises:
        TraceError: if another process holds the lock.
    """
    is_new, had_trace = not output.exists(), Trace.exists(trace_folder)
    before = set() if is_new else {*output.iterdir()}
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
        if is_main and not had_trace and not (Trace.exists(trace_folder) and Trace.open(trace_folder).records()):
            _remove_new(output, before, is_new)
        raise
    finally:
        for acquired in locks:
            acquired.release(force=True)  # also for the tracker of a run that failed


def _remove_new(output: Path, before: set[Path], is_new: bool) -> None:
    with suppress(OSError):  # Windows does not remove the open lock file. The error of the command matters more.
        for path in {*output.iterdir()} - before:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if is_new:
            output.rmdir()
