"""A tracked run that is killed at one file operation after the other, and gone on with: `test_crashes.py` starts this.

`python crash_run.py FOLDER KILLS`: prints a line of JSON, what became of the run at each of so many kill points, evenly
taken from all file operations of an undisturbed run. Each run is a fork of this process, which has imported everything.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from conftest import random_rows, tiny_llama
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
    """What a careful user would write: two sessions, each gone on with from its last good checkpoint."""
    model, tracker = tiny_llama(), ForgetTracker(trace_dir=output / "trace", record_steps=1)
    for name, rows in (("s1", NOISY), ("s1plus", SAFETY)):
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
    """Trainer does not write checkpoints all or nothing."""
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


def watch(output: Path, kill_at: int | None) -> Callable[[], int]:
    """Counts the file operations in `output`, and ends this process at one of them without a word."""
    count = 0

    def operation() -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        if event in OPERATIONS and arguments and str(output) in str(arguments[0]):
            operation()

    class Watched(parquet.ParquetWriter):  # pyarrow's operations are not Python's
        def write_table(self, *args: object, **kwargs: object) -> None:
            operation()
            super().write_table(*args, **kwargs)
            operation()

        def close(self) -> None:
            operation()
            super().close()
            operation()

    parquet.ParquetWriter = Watched
    sys.addaudithook(hook)
    return lambda: count


def contents(folder: Path) -> dict[str, list]:
    """Every record, bit for bit."""
    trace = Trace.open(folder)
    return {
        record.file_name: [trace.token_losses(record).view(np.int32).tolist(), parquet.read_schema(
            folder / "records" / record.file_name).names]
        for record in trace.records()
    }  # fmt: skip


def in_a_fork(action: Callable[[], object]) -> tuple[int, object]:
    """Runs `action` in a process of its own. Returns by which signal or code it ended, and what it returned."""
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
        said = stream.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), json.loads(said) if said else None


def main(folder: Path, kills: int) -> None:
    logging.set_verbosity_error()
    sys.stdout.flush()
    hide_progress = os.open(os.devnull, os.O_WRONLY)
    said = os.dup(1)
    os.dup2(hide_progress, 1)

    def undisturbed() -> list:
        count = watch(folder / "whole", None)
        program(folder / "whole")
        operations = count()
        return [operations, contents(folder / "whole" / "trace")]

    code, (operations, whole) = in_a_fork(undisturbed)
    assert code == 0
    report = {"operations": operations, "records": len(whole), "killed": 0, "broken": [], "different": []}
    for kill_at in np.unique(np.linspace(1, operations, kills).astype(int)).tolist():
        output = folder / f"killed-{kill_at}"

        def killed(output: Path = output, kill_at: int = kill_at) -> None:
            watch(output, kill_at)
            program(output)

        code, _ = in_a_fork(killed)
        report["killed"] += code == -signal.SIGKILL

        def look(output: Path = output) -> dict[str, list]:
            return contents(output / "trace") if Trace.exists(output / "trace") else {}

        code, after = in_a_fork(look)
        if code != 0 or any(whole[name] != content for name, content in after.items()):
            report["broken"].append(kill_at)

        def gone_on_with(output: Path = output) -> dict[str, list]:
            program(output)
            return contents(output / "trace")

        code, result = in_a_fork(gone_on_with)
        if code != 0 or result != whole:
            report["different"].append(kill_at)
        shutil.rmtree(output)
    os.dup2(said, 1)
    print(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
