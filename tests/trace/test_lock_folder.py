"""The lock of a trace: which processes wait for it, and which are refused."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from forgetfilter_callback import Trace
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.trace.lock_folder import is_locked


HOLDS = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.readline()
"""


def test_a_file_is_no_folder_for_a_trace(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TraceError, match=r"file is a file\. Choose a folder for the trace"):
        Trace.lock(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_is_locked_until_it_is_released(trace):
    lock = Trace.lock(trace.folder)
    assert lock.is_locked and Path(lock.lock_file) == trace.folder / ".lock"
    assert Trace.lock(str(trace.folder)) is lock  # the same process may lock it again
    lock.release(force=True)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, lock.lock_file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(
        TraceError, match=r"Another process is recording into .*trace. Choose another folder for this run"
    ):
        Trace.lock(trace.folder)
    other.kill()
    other.wait()
    Trace.lock(trace.folder).release(force=True)


def test_a_command_that_looks_at_the_lock_disturbs_nobody(trace, monkeypatch):
    """It holds the lock for a moment."""
    Trace.lock(trace.folder).release(force=True)
    reader = FileLock(trace.folder / ".lock", thread_local=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: reader.release())
    reader.acquire()
    assert not is_locked(trace.folder)
    reader.acquire()
    Trace.lock(trace.folder).release(force=True)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_gives_a_warning(code, trace, monkeypatch, caplog):
    def none(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    assert Trace.lock(trace.folder) is None
    assert f"The file system of {trace.folder} has no locks ([Errno {code}]" in caplog.text
