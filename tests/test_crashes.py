"""Killed processes, failing disks, and two runs in one folder: nothing that was recorded is lost, and training goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_llama
from transformers import Trainer

from forgetfilter_callback import ForgetTracker, Trace
from forgetfilter_callback.callbacks import early_stopping
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.trace.validation import validate_trace


@pytest.mark.parametrize("kills", [6, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_run_killed_anywhere_is_gone_on_with_as_if_it_had_not_been(kills, tmp_path):
    """At so many of its file operations; a thousand are more than there are, so at each."""
    script = Path(__file__).parent / "crash_run.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, script, tmp_path, str(kills)], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr[-4000:]
    report = json.loads(process.stdout)
    print(report)
    assert report["records"] == 17 and report["operations"] >= 200
    assert report["killed"] == min(kills, report["operations"])
    assert report["broken"] == report["different"] == []


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
    """Lets a kind of write fail from its `after`-th time on."""
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
    """The weights that the two sessions end with, trained once."""
    if not WEIGHTS:
        model = train(noisy, make_args("untracked-s1"), collator)
        WEIGHTS.update(train(safety, make_args("untracked-s1plus"), collator, model=model).state_dict())
    return WEIGHTS


@pytest.mark.parametrize(
    ("code", "after"), [(errno.ENOSPC, 0), (errno.ENOSPC, 2), (errno.EROFS, 0), (errno.EIO, 2)], ids=str
)
@pytest.mark.parametrize("what", WRITES)
def test_training_goes_on_where_the_disk_does_not(
    what, after, code, untracked, noisy, safety, make_args, collator, monkeypatch, caplog
):
    tracker = ForgetTracker(record_steps=4)
    with monkeypatch.context() as patched:
        fail(patched, what, code, after)
        model = train(noisy, make_args("s1"), collator, tracker)
        model = train(safety, make_args("s1plus"), collator, tracker, model=model)
    assert all(torch.equal(weights, untracked[name]) for name, weights in model.state_dict().items())
    # Said once a session that lost it; some writes are not reached in both, or not so often.
    said = caplog.text.count("FORGETTING IS NO LONGER TRACKED")
    assert said <= 2
    folder = Path(make_args("s1").output_dir) / "_forgetfilter"
    if Trace.exists(folder):
        trace = Trace.open(folder)
        assert all(np.isfinite(trace.token_losses(record)).all() for record in trace.records())
        assert not validate_trace(folder).problems
        assert said or len(trace.records()) == 4 + 3
    else:
        assert said == 1  # the safety set is not taken for the noisy one afterwards


def test_training_goes_on_where_the_notes_of_an_early_stop_cannot_be_written(
    noisy, safety, make_args, collator, monkeypatch, caplog
):
    tracker = ForgetTracker(stop_early=True)
    model = train(noisy, make_args("s1"), collator, tracker)

    def on_a_full_disk(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(early_stopping, "write_json", on_a_full_disk)
    train(safety, make_args("s1plus"), collator, tracker, model=model)
    assert caplog.text.count("FORGETTING IS NO LONGER TRACKED") == 1
    assert [record.step for record in tracker.trace.records() if record.session == "safety"] == [0]


def test_a_full_disk_ends_training_if_that_is_wanted(noisy, make_args, collator, monkeypatch):
    fail(monkeypatch, "flushing", errno.ENOSPC, after=3)
    with pytest.raises(OSError, match="No space left"):
        train(noisy, make_args(), collator, ForgetTracker(raise_on_disk_error=True, record_steps=1))


def test_after_a_full_disk_the_next_run_makes_the_trace_whole(noisy, safety, make_args, collator, monkeypatch):
    tracker = ForgetTracker(record_steps=4)
    with monkeypatch.context() as patched:
        fail(patched, "a table", errno.ENOSPC, after=2)
        train(noisy, make_args("s1"), collator, tracker)
    assert len(tracker.trace.records()) == 1
    again = ForgetTracker(trace_dir=tracker.trace.folder, record_steps=4)
    model = train(noisy, make_args("s1"), collator, again)
    train(safety, make_args("s1plus"), collator, again, model=model)
    assert len(again.trace.records()) == 4 + 3 and validate_trace(again.trace.folder) == ([], [])


@pytest.mark.parametrize("what", ["a table", "the end of a file", "flushing"])
def test_a_session_begun_anew_on_a_full_disk_loses_nothing(what, noisy, safety, make_args, collator, monkeypatch):
    tracker = ForgetTracker(record_steps=4)
    model = train(noisy, make_args("s1"), collator, tracker)
    train(safety, make_args("s1plus"), collator, tracker, model=model)
    whole = {record: tracker.trace.token_losses(record).tobytes() for record in tracker.trace.records()}
    again = ForgetTracker(trace_dir=tracker.trace.folder)
    with monkeypatch.context() as patched:
        # Flushing begins with the manifest's, in which the new session is noted.
        fail(patched, what, errno.ENOSPC, after=1 if what == "flushing" else 0)
        train(noisy, make_args("s1-again"), collator, again, model=tiny_llama(seed=1))
    assert {record: again.trace.token_losses(record).tobytes() for record in again.trace.records()} == whole


def test_a_deletion_that_is_cut_off_leaves_no_successors_of_another_session(
    noisy, safety, make_args, collator, monkeypatch
):
    """S1 anew makes the records of S1+ stale: killed in between, the next run must know that too."""
    tracker = ForgetTracker(record_steps=4)
    model = train(noisy, make_args("s1"), collator, tracker)
    train(safety, make_args("s1plus"), collator, tracker, model=model)
    real, deleted = Path.unlink, []

    def cut_off(file: Path, *arguments, **more) -> None:
        if file.parent.name == "records" and file.suffix == ".parquet":
            if len(deleted) == 4:
                raise KeyboardInterrupt
            deleted.append(file.name)
        real(file, *arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", cut_off)
        with pytest.raises(KeyboardInterrupt):
            train(noisy, make_args("cut"), collator, ForgetTracker(trace_dir=tracker.trace.folder))
    assert len(deleted) == 4
    again = ForgetTracker(trace_dir=tracker.trace.folder)
    train(noisy, make_args("again"), collator, again)
    assert [(record.session, record.step) for record in again.trace.records()] == [("noisy", 0), ("noisy", 12)]


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
    train(noisy, make_args("run"), collator, tracker)  # a killed process holds nothing
    assert len(tracker.trace.records()) == 2
    lock = Trace.lock(folder)  # and a finished session neither
    assert lock.is_locked
    lock.release(force=True)
