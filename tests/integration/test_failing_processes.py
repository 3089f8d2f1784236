"""One of two processes is killed, or has a full disk: neither waits for the other, and no record is lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from helpers import random_rows, reference_means, tiny_llama

from forgetfilter_callback import Trace
from forgetfilter_callback.trace.records import Record


SCRIPT = """
import errno, json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import pyarrow.parquet as pq, torch
from helpers import random_rows, tiny_llama
from forgetfilter_callback import ForgetTracker
from transformers import Trainer, TrainerCallback, TrainingArguments

output, case, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])

def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    pad = lambda name, value: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
    return {{"input_ids": pad("input_ids", 1), "labels": pad("labels", -100)}}

class BetweenRecords(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if case == "killed" and rank == 1 and state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if case == "full disk" and rank == 0 and state.global_step == 3:
            pq.ParquetWriter.write_table = full_disk

def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")

def train(folder, callbacks):
    model = tiny_llama()
    args = TrainingArguments(str(output / folder), num_train_epochs=2, per_device_train_batch_size=2, use_cpu=True,
                             logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    Trainer(model, args, train_dataset=random_rows(12, seed=1), data_collator=collate, callbacks=callbacks).train()
    return model.state_dict()

tracked = train("tracked", [ForgetTracker(record_steps=2), BetweenRecords()])
plain = train("plain", [])
unchanged = all(torch.equal(tracked[name], plain[name]) for name in plain)
(output / f"rank-{{rank}}.json").write_text(json.dumps(unchanged))
torch.distributed.barrier()
sys.stderr.flush()
os._exit(0)
"""


def run_two(folder: Path, case: str) -> list[tuple[int, str]]:
    """Run two processes without a launcher that would end one if the other ends. Return their exit codes and errors."""
    (folder / "script.py").write_text(SCRIPT.format(tests=str(Path(__file__).parents[1])))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(folder / "script.py"), str(folder), case], stderr=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        # A process that waited for the other would do so for half an hour, the timeout of Trainer.
        errors = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def check_records(folder: Path, records: list[Record]) -> None:
    trace = Trace.open(folder / "tracked" / "_forgetfilter")
    assert trace.records() == records
    np.testing.assert_allclose(trace.losses()[0], reference_means(tiny_llama(), random_rows(12, seed=1)), rtol=1e-5)


def test_a_process_that_is_killed_between_records_ends_the_other(tmp_path):
    (code, errors), (killed, _) = run_two(tmp_path, "killed")
    assert killed == -9
    assert code not in (0, -9) and ("Connection closed by peer" in errors or "Connection reset by peer" in errors)
    check_records(tmp_path, [Record("noisy", 0), Record("noisy", 2)])


def test_a_full_disk_of_the_main_process_ends_tracking_on_both(tmp_path):
    (code, errors), (other_code, other_errors) = run_two(tmp_path, "full disk")
    assert code == other_code == 0, errors[-4000:]
    assert errors.count("Forgetting is no longer tracked") == 1
    assert "Forgetting is no longer tracked" not in other_errors
    for rank in range(2):
        assert json.loads((tmp_path / f"rank-{rank}.json").read_text())
    check_records(tmp_path, [Record("noisy", 0), Record("noisy", 2)])
