"""[`TrackerLock`]: the lock that a tracker holds on the folder of its trace during a session."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar
from weakref import WeakValueDictionary

from filelock import FileLock

from ..trace.trace import Trace


class TrackerLock:
    """Locks the folder of a trace for one tracker.

    A notebook keeps the tracker of an interrupted cell alive, and that tracker its lock. The next tracker that records into
    the folder in this process releases the lock, so that the folder is free when its own session ends.
    """

    _last_of_folder: ClassVar[WeakValueDictionary[str, TrackerLock]] = WeakValueDictionary()

    def __init__(self) -> None:
        self._lock: FileLock | None = None

    def acquire(self, folder: Path) -> None:
        """Lock `folder`. Nothing happens if this tracker still holds the lock after an interrupted session.

        Raises:
            TraceError: if another process holds the lock.
        """
        if self._lock is not None:
            return
        name = os.path.abspath(folder)
        last = self._last_of_folder.get(name)
        if last is not None:
            last.release()
        self._lock = Trace.lock(folder)
        self._last_of_folder[name] = self

    def release(self) -> None:
        """Release the lock, if this tracker holds it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
