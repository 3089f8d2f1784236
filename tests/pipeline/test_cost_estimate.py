"""`plan`: what it makes of the measured steps."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import call, run_options
from transformers import Trainer

from forgetfilter_callback import RunConfig
from forgetfilter_callback.pipeline import cost_estimate
from forgetfilter_callback.pipeline.cost_estimate import Plan, plan
from forgetfilter_callback.pipeline.step_cost import StepCost


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(
    ("training", "epochs", "record_steps", "records"),
    [({}, 3, None, 3), ({}, 3, 0.5, 5), ({"max_steps": 6}, 2, None, 3)],  # three steps per epoch
)
def test_the_time_is_that_of_all_sessions_and_records(
    training, epochs, record_steps, records, refit, files, byte_tokenizer, monkeypatch
):
    monkeypatch.setattr(cost_estimate, "measure_steps", lambda *_: StepCost(7, 1, 10_000))  # 7 bytes; seconds per token
    given = [str(files[name]) for name in ("model", "noisy", "safety")]
    planned = plan(RunConfig(*given, "out", training=training, record_steps=record_steps, refit=refit))
    noisy, safety = (
        sum(len(byte_tokenizer(row["prompt"] + row["completion"]).input_ids) + 1 for row in rows)  # and <eos>
        for rows in (
            [json.loads(line) for line in files[name].read_text().splitlines()] for name in ("noisy", "safety")
        )
    )
    trained = epochs * noisy * (2 if refit else 1) + 2 * safety
    assert planned.seconds == trained + 10_000 * records * noisy
    assert planned.peak_bytes == 7


def no_memory_on_a_gpu(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_memory_on_a_cpu(*_: object) -> None:
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("fail", [no_memory_on_a_gpu, no_memory_on_a_cpu])
def test_the_rest_is_reported_if_memory_runs_out(fail, files, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "training_step", fail)
    arguments = ["run", *run_options(files, tmp_path / "out"), "--dry-run"]
    told = call(*arguments)
    assert told.exit_code == 0, told.output
    for part in ("12 steps", "does not fit into the memory", "The longest row has", "gradient_checkpointing=true"):
        assert part in told.stdout
    assert "torchrun" not in told.stdout and "GB more" not in told.stdout
    cost = json.loads(call(*arguments, "--json").stdout)
    assert cost["steps"] == 12 and cost["peak_bytes"] is cost["seconds"] is None


def test_other_errors_of_a_step_are_raised(files, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(Trainer, "training_step", fail)
    told = call("run", *run_options(files, tmp_path / "out"), "--dry-run")
    assert told.exit_code == 1 and "The size of tensor a" in told.output


def described(**given: object) -> str:
    settings = {
        "samples": 12, "safety_samples": 6, "tokens": 100, "safety_tokens": 50, "steps": 9, "safety_steps": 4,
        "records": 3, "extra_fraction": 0.5, "batch_rows": 1, "longest_row": 20, "logits_bytes": 1000, "long_rows": 0,
        "other_rows": 20, "gradient_checkpointing": False, "processes": 1, "peak_bytes": 300_000, "seconds": 60.0,
    }  # fmt: skip
    return str(Plan(**{**settings, **given}))


@pytest.mark.parametrize(("longest_row", "extended"), [(256, False), (257, True)])
def test_the_described_memory_is_that_of_tensors(longest_row, extended, files):
    told = described(longest_row=longest_row)
    assert ("take about 0.3 MB, extended from rows of up to 256 tokens." in told) == extended
    assert "Python and its libraries need about 0.6 GB more." in told


def test_several_processes_are_not_told_that_memory_ran_out():
    told = described(processes=2, peak_bytes=None, seconds=None)
    assert "If the model and its training fit on one device, run `--dry-run` without `torchrun`" in told
    assert "memory of this machine" not in told and "GB more" not in told
