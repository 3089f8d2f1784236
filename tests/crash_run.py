"""Kill a tracked run at many of its file operations and resume it each time. Started by `integration/test_crashes.py`.

`python crash_run.py FOLDER KILLS` prints one JSON object that summarizes KILLS runs. Their kill points are spread
evenly over the file operations of an undisturbed run. Each run is a fork of this process, so imports run only once.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from helpers import random_rows, tiny_llama
from pyarrow import parquet
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from forgetfilter_callback import ForgetTracker, Trace


NOISY, SAFETY = random_rows(8, seed=1), random_rows(7, seed=2)
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile")


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])
        for name, filler in (("input_ids", 1), ("labels", -100))
    }


def program(output: Path) -> None:
    """A careful user's program: two sessions, each resumed from its last complete checkpoint."""
    model, tracker = tiny_llama(), ForgetTracker(trace_dir=output / "trace", record_steps=1)
    for name, rows in (("noisy", NOISY), ("safety", SAFETY)):
        folder = output / name
        if (folder / "done").exists():
            model.load_state_dict(load_file(folder / "final" / "model.safetensors"), strict=False)
            continue
        args = TrainingArguments(
            str(folder), num_train_epochs=1, per_device_train_batch_size=1, learning_rate=1e-2, use_cpu=True,
            save_strategy="steps", save_steps=2, save_total_limit=1, logging_steps=1, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows, data_collator=collate, callbacks=[tracker])
        trainer.train(resume_from_checkpoint=last_good_checkpoint(folder))
        trainer.save_model(str(folder / "final"))
        (folder / "done").touch()


def last_good_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint; Trainer does not write checkpoints atomically."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda each: -int(each.name.partition("-")[2])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            load_file(checkpoint / "model.safetensors")
            for name in ("optimizer.pt", "scheduler.pt"):
                torch.load(checkpoint / name, weights_only=True)
            if (checkpoint / "rng_state.pth").stat().st_size and (checkpoint / "training_args.bin").stat().st_size:
                return str(checkpoint)
        except Exception:
            continue
    return None


def watch(output: Path, kill_at: int | None, tear: int | None = None) -> Callable[[], int]:
    """Count the file operations in `output`; kill this process at operation `kill_at`, or in the middle of record `tear`."""
    count = records = 0

    def operation() -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        if event in OPERATIONS and arguments and str(output) in str(arguments[0]):
            operation()

    class Watched(parquet.ParquetWriter):  # audit hooks do not see the writes of pyarrow
        def write_table(self, *args: object, **kwargs: object) -> None:
            operation()
            super().write_table(*args, **kwargs)
            operation()

        def close(self) -> None:
            nonlocal records
            operation()
            super().close()
            records += Path(self.where).parent.name == "records"
            if records == tear:
                os.truncate(self.where, os.path.getsize(self.where) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            operation()

    parquet.ParquetWriter = Watched
    sys.addaudithook(hook)
    return lambda: count


def contents(folder: Path) -> dict[str, list]:
    """The bits of every record, by file name."""
    trace = Trace.open(folder)
    return {
        record.file_name: [trace.token_losses(record).view(np.int32).tolist(), parquet.read_schema(
            folder / "records" / record.file_name).names]
        for record in trace.records()
    }  # fmt: skip


def digests(folder: Path) -> list[str]:
    """Hashes of the files of all records, in use or superseded."""
    files = [file for name in ("records", "superseded") for file in (folder / name).rglob("*.parquet")]
    return sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)


def run_in_fork(action: Callable[[], object]) -> tuple[int, object]:
    """Run `action` in a forked process. Returns its exit code (negative: signal) and its result (`None` if it failed)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            os.write(writer, json.dumps(action()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as stream:
        output = stream.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), json.loads(output) if output else None


def main(folder: Path, kills: int) -> None:
    logging.set_verbosity_error()
    gc.freeze()  # Trainer collects garbage, which would copy all imported modules into each fork
    sys.stdout.flush()
    hide_progress = os.open(os.devnull, os.O_WRONLY)
    stdout = os.dup(1)
    os.dup2(hide_progress, 1)

    def undisturbed() -> list:
        count = watch(folder / "whole", None)
        program(folder / "whole")
        operations = count()
        return [operations, contents(folder / "whole" / "trace")]

    code, (operations, whole) = run_in_fork(undisturbed)
    assert code == 0
    report = {
        "operations": operations,
        "records": len(whole),
        "killed": 0,
        "torn": 0,
        "broken": [],
        "different": [],
        "lost": [],
    }
    points = np.unique(np.linspace(1, operations, kills).astype(int)).tolist()
    for kill_at, tear in [*((point, None) for point in points), (None, 3)]:
        output = folder / f"killed-{kill_at}"

        def killed(output: Path = output, kill_at: int | None = kill_at, tear: int | None = tear) -> None:
            watch(output, kill_at, tear)
            program(output)

        code, _ = run_in_fork(killed)
        report["killed"] += code == -signal.SIGKILL

        def look(output: Path = output) -> list:
            after = contents(output / "trace") if Trace.exists(output / "trace") else {}
            return [after, digests(output / "trace")]

        code, found = run_in_fork(look)
        after, written = found or [{}, []]
        report["torn"] = len(after)  # the last run is the torn one
        if code != 0 or any(whole[name] != content for name, content in after.items()):
            report["broken"].append(kill_at)

        def resumed(output: Path = output) -> list:
            program(output)
            return [contents(output / "trace"), digests(output / "trace")]

        code, found = run_in_fork(resumed)
        result, kept = found or [{}, []]
        if code != 0 or result != whole:
            report["different"].append(kill_at)
        if Counter(written) - Counter(kept):
            report["lost"].append(kill_at)
        shutil.rmtree(output)
    os.dup2(stdout, 1)
    print(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
