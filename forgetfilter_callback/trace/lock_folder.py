"""Lock the folder of a trace."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import TraceError


logger = logging.getLogger(__name__)

# Errors of file systems without locks (NFS without its lock daemon, some FUSE file systems).
_LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


# `is_locked` holds the lock for a moment. A process that begins to record must not take it for another recording process,
# and neither must `is_locked` in a third process.
_LOCK_SECONDS, _PROBE_SECONDS = 1.0, 0.2


def lock_folder(folder: str | os.PathLike[str]) -> FileLock | None:
    """See [`Trace.lock`]."""
    if Path(folder).is_file():
        raise TraceError(f"{folder} is a file. Choose a folder for the trace.")
    lock = FileLock(Path(folder) / ".lock", timeout=_LOCK_SECONDS, thread_local=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise TraceError(
            f"Another process is recording into {folder}. Choose another folder for this run, or stop the other process "
            "first."
        ) from None
    except OSError as error:
        if error.errno not in _LOCKS_UNSUPPORTED:
            raise
        logger.warning(f"The file system of {folder} has no locks ({error}). No other run may record into it.")
        return None
    return lock


def is_locked(folder: str | os.PathLike[str]) -> bool:
    """Whether a process records into `folder`. `False` where this cannot be found out, such as in a read-only folder."""
    file = Path(folder) / ".lock"
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=_PROBE_SECONDS, thread_local=False):
            return False
    except Timeout:
        return True
    except OSError:
        return False
