"""Which trace a tracker opens or creates when a session begins or resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import tiny_llama
from transformers import Trainer, TrainerCallback

from forgetfilter_callback import ForgetTracker, Trace
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.trace.records import Record


class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.fixture
def start(noisy, safety, make_args, collator):
    """A function that creates the trainer of a session, which saves a checkpoint at step 4."""

    def start(session, folder, *callbacks, model=None):
        args = make_args(folder, save_strategy="steps", save_steps=4)
        rows = {"noisy": noisy, "safety": safety}[session]
        return Trainer(model or tiny_llama(), args, train_dataset=rows, data_collator=collator, callbacks=[*callbacks])

    return start


@pytest.mark.parametrize("with_rows", [False, True])
def test_a_resumed_session_never_creates_a_trace(with_rows, start, noisy):
    """Its training set would be adopted as the noisy set, and the first record of the session would be missing."""
    with pytest.raises(KeyboardInterrupt):
        start("safety", "out", Killed()).train()
    tracker = ForgetTracker(noisy if with_rows else None)
    trainer = start("safety", "out", tracker)
    message = r"resumes at step 4, but there is no trace in .*`ForgetTracker\(trace_dir=\.\.\.\)`"
    with pytest.raises(TraceError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert not Trace.exists(Path(trainer.args.output_dir) / "_forgetfilter")


def test_a_safety_session_in_the_folder_of_the_noisy_session_is_resumed_with_its_trace(start):
    model, tracker = tiny_llama(), ForgetTracker()
    start("noisy", "out", tracker, model=model).train()
    with pytest.raises(KeyboardInterrupt):
        start("safety", "out", tracker, Killed(), model=model).train()
    folder, checkpoint = tracker.trace.folder, str(tracker.trace.folder.parent / "checkpoint-4")
    with pytest.raises(TraceError, match=r"If this is the safety session of that trace, new or resumed, use") as error:
        start("safety", "out", ForgetTracker()).train(resume_from_checkpoint=checkpoint)
    assert "delete" not in str(error.value).lower() and f"trace_dir={str(folder)!r}" in str(error.value)
    resumed = ForgetTracker(trace_dir=folder)
    start("safety", "out", resumed).train(resume_from_checkpoint=checkpoint)
    assert resumed.trace.records() == [
        Record("noisy", 0),
        Record("noisy", 12),
        Record("safety", 0),
        Record("safety", 6),
    ]


def test_a_resumed_safety_session_without_its_first_record_says_so(start, caplog):
    model, tracker = tiny_llama(), ForgetTracker()
    start("noisy", "noisy", tracker, model=model).train()
    with pytest.raises(KeyboardInterrupt):
        start("safety", "safety", Killed(), model=model).train()
    start("safety", "safety", ForgetTracker(trace_dir=tracker.trace.folder)).train(resume_from_checkpoint=True)
    assert "resumes at step 4, but the trace in" in caplog.text and "has no record of its step 0" in caplog.text
