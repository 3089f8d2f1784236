"""Killed processes, failing disks, and two runs in one folder. No record is lost, and training continues."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import tiny_llama
from trace_helpers import record_files
from transformers import Trainer

from forgetfilter_callback import ForgetTracker, Trace
from forgetfilter_callback.callbacks import early_stopping
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.trace.validate_trace import validate_trace


@pytest.mark.parametrize("kills", [6, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_trace(kills, tmp_path):
    """Kill it at `kills` of its file operations; 1000 exceeds their number, so it is killed at each one."""
    script = Path(__file__).parents[1] / "crash_run.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, script, tmp_path, str(kills)], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr[-4000:]
    report = json.loads(process.stdout)
    print(report)
    assert report["records"] == 17 and report["operations"] >= 200
    assert report["killed"] == min(kills, report["operations"]) + 1
    assert report["torn"] == 2  # killed in the middle of the third record
    assert report["broken"] == report["different"] == report["lost"] == []


SAFETY_RECORDS = [Record("safety", 0), Record("safety", 4), Record("safety", 6)]
WRITES = {
    "a table": (pq.ParquetWriter, "write_table"),
    "the end of a file": (pq.ParquetWriter, "close"),
    "flushing": (os, "fsync"),
    "renaming": (os, "replace"),
    "the manifest": (Path, "write_text"),
    "a folder": (Path, "mkdir"),
    "a copy": (shutil, "copyfile"),
}


def fail(monkeypatch, what: str, code: int, after: int = 0) -> None:
    """Make one kind of write fail after it has succeeded `after` times."""
    owner, name = WRITES[what]
    real, done = getattr(owner, name), 0

    def failing(*args, **kwargs):
        nonlocal done
        done += 1
        if done > after:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


def train(rows, args, collator, *callbacks, model=None):
    trainer = Trainer(
        model or tiny_llama(), args, train_dataset=rows, data_collator=collator, callbacks=list(callbacks)
    )
    trainer.train()
    return trainer.model


WEIGHTS: dict[str, torch.Tensor] = {}


@pytest.fixture
def untracked(noisy, safety, make_args, collator) -> dict[str, torch.Tensor]:
    """The final weights of both sessions without a tracker, trained once."""
    if not WEIGHTS:
        model = train(noisy, make_args("untracked-noisy"), collator)
        WEIGHTS.update(train(safety, make_args("untracked-safety"), collator, model=model).state_dict())
    return WEIGHTS


@pytest.mark.parametrize(("code", "after"), [(errno.EROFS, 0), (errno.ENOSPC, 2)], ids=str)
@pytest.mark.parametrize("what", WRITES)
def test_training_continues_when_the_disk_fails(
    what, after, code, untracked, noisy, safety, make_args, collator, monkeypatch, caplog
):
    tracker = ForgetTracker(record_steps=4)
    with monkeypatch.context() as patched:
        fail(patched, what, code, after)
        model = train(noisy, make_args("noisy"), collator, tracker)
        model = train(safety, make_args("safety"), collator, tracker, model=model)
    assert all(torch.equal(weights, untracked[name]) for name, weights in model.state_dict().items())
    # Reported once in each affected session; some writes do not occur in both, or not often enough to fail.
    errors = caplog.text.count("Forgetting is no longer tracked")
    assert errors <= 2
    folder = Path(make_args("noisy").output_dir) / "_forgetfilter"
    if Trace.exists(folder):
        trace = Trace.open(folder)
        assert all(np.isfinite(trace.token_losses(record)).all() for record in trace.records())
        assert not validate_trace(folder).problems
        assert errors or len(trace.records()) == 4 + 3
    else:
        assert errors == 1  # the safety session does not adopt the safety set


def test_training_continues_when_the_ranking_checks_cannot_be_written(
    noisy, safety, make_args, collator, monkeypatch, caplog
):
    tracker = ForgetTracker(stop_early=True)
    model = train(noisy, make_args("noisy"), collator, tracker)

    def on_a_full_disk(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(early_stopping, "write_json", on_a_full_disk)
    train(safety, make_args("safety"), collator, tracker, model=model)
    assert caplog.text.count("Forgetting is no longer tracked") == 1
    assert [record.step for record in tracker.trace.records() if record.session == "safety"] == [0]


def test_raise_on_disk_error_ends_training(noisy, make_args, collator, monkeypatch):
    fail(monkeypatch, "flushing", errno.ENOSPC, after=3)
    with pytest.raises(OSError, match="No space left"):
        train(noisy, make_args(), collator, ForgetTracker(raise_on_disk_error=True, record_steps=1))


def test_the_run_after_a_full_disk_completes_the_trace(noisy, safety, make_args, collator, monkeypatch):
    tracker = ForgetTracker(record_steps=4)
    with monkeypatch.context() as patched:
        fail(patched, "a table", errno.ENOSPC, after=2)
        train(noisy, make_args("noisy"), collator, tracker)
    assert len(tracker.trace.records()) == 1
    again = ForgetTracker(trace_dir=tracker.trace.folder, record_steps=4)
    model = train(noisy, make_args("noisy"), collator, again)
    train(safety, make_args("safety"), collator, again, model=model)
    assert len(again.trace.records()) == 4 + 3 and validate_trace(again.trace.folder) == ([], [])


@pytest.mark.parametrize("what", ["a table", "the end of a file", "flushing", "a copy"])
def test_a_session_restarted_on_a_full_disk_loses_no_records(what, noisy, safety, make_args, collator, monkeypatch):
    tracker = ForgetTracker(record_steps=4)
    model = train(noisy, make_args("noisy"), collator, tracker)
    train(safety, make_args("safety"), collator, tracker, model=model)
    whole = {record: tracker.trace.token_losses(record).tobytes() for record in tracker.trace.records()}
    again = ForgetTracker(trace_dir=tracker.trace.folder)
    with monkeypatch.context() as patched:
        # The first flush is that of the manifest, which lists the new session.
        fail(patched, what, errno.ENOSPC, after=1 if what == "flushing" else 0)
        train(noisy, make_args("noisy-again"), collator, again, model=tiny_llama(seed=1))
    assert {record: again.trace.token_losses(record).tobytes() for record in again.trace.records()} == whole


def test_an_interrupted_restart_leaves_no_stale_records(noisy, safety, make_args, collator, monkeypatch):
    """A crash while a restarted session moves old records: the next run moves the rest."""
    tracker = ForgetTracker(record_steps=4)
    model = train(noisy, make_args("noisy"), collator, tracker)
    train(safety, make_args("safety"), collator, tracker, model=model)
    folder = tracker.trace.folder
    old = Counter(record_files(folder).values())
    real, moved = os.replace, []

    def interrupted(source, target) -> None:
        if Path(source).parent.name == "records" and Path(source).suffix == ".parquet":
            if len(moved) == 4:
                raise KeyboardInterrupt
            moved.append(Path(source).name)
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(noisy, make_args("interrupted"), collator, ForgetTracker(trace_dir=folder))
    assert moved == [record.file_name for record in (*SAFETY_RECORDS[::-1], Record("noisy", 12))]
    assert not old - Counter(record_files(folder).values())
    again = ForgetTracker(trace_dir=folder)
    train(noisy, make_args("again"), collator, again)
    assert again.trace.records() == [Record("noisy", 0), Record("noisy", 12)]
    assert not old - Counter(record_files(folder).values())


HOLDS = """
import sys
from forgetfilter_callback import Trace
lock = Trace.lock(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
"""


def test_two_runs_in_one_folder_are_refused(noisy, make_args, collator, tmp_path):
    folder = tmp_path / "run" / "_forgetfilter"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    tracker = ForgetTracker(trace_dir=folder)
    with pytest.raises(TraceError, match="Another process is recording"):
        train(noisy, make_args("run"), collator, tracker)
    assert not Trace.exists(folder)
    other.kill()
    other.wait()
    train(noisy, make_args("run"), collator, tracker)  # a killed process holds no lock
    assert len(tracker.trace.records()) == 2
    lock = Trace.lock(folder)  # nor does a finished session
    assert lock.is_locked
    lock.release(force=True)
