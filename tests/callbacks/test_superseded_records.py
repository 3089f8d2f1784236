"""A restarted or resumed session moves older records to `superseded` and loses none."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers import tiny_llama
from trace_helpers import record_files
from transformers import Trainer, TrainerCallback

from forgetfilter_callback import ForgetTracker
from forgetfilter_callback.trace.records import Record


class Crash(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def lost(before: dict[str, bytes], after: dict[str, bytes]) -> int:
    """How many files of `before` have no equal file in `after`. Each file of `after` counts once."""
    return (Counter(before.values()) - Counter(after.values())).total()


@pytest.fixture
def session(make_args, collator):
    """A function that prepares one session with its own tracker on one trace."""
    folder = make_args("trace").output_dir

    def prepare(name, rows, model, *callbacks, **overrides):
        tracker = ForgetTracker(trace_dir=folder, record_steps=2)
        args = make_args(name, save_strategy="steps", save_steps=4, **overrides)
        trainer = Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[tracker, *callbacks])
        return trainer, tracker

    return prepare


@pytest.mark.parametrize("name", ["noisy", "safety"])
def test_a_restarted_session_loses_no_record(name, noisy, safety, session):
    model = tiny_llama()
    session("noisy", noisy, model)[0].train()
    trainer, tracker = session("safety", safety, model)
    trainer.train()
    folder = tracker.trace.folder
    for number in (1, 2):
        before = record_files(folder)
        if name == "noisy":
            trainer, tracker = session("again", noisy, tiny_llama(seed=number))
        else:
            trainer, tracker = session("safety", safety, model, learning_rate=3e-3 * number)
        trainer.train()
        after = record_files(folder)
        assert lost(before, after) == 0
        moved = record_files(folder / "superseded" / str(number))
        assert moved == {
            file.removeprefix("records/"): content
            for file, content in before.items()
            if file.startswith(("records/noisy", "records/safety") if name == "noisy" else "records/safety")
        }
    steps = [Record("noisy", step) for step in range(0, 13, 2)]
    assert tracker.trace.records() == (
        steps if name == "noisy" else [*steps, *(Record("safety", step) for step in (0, 2, 4, 6))]
    )


def test_a_resumed_session_loses_no_record(noisy, session):
    trainer, tracker = session("noisy", noisy, tiny_llama(), Crash(11))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    folder = tracker.trace.folder
    before = record_files(folder)
    trainer, tracker = session("noisy", noisy, tiny_llama())
    trainer.train(resume_from_checkpoint=True)  # from step 8
    assert lost(before, record_files(folder)) == 0
    moved = record_files(folder / "superseded")
    assert moved == {"1/noisy-00000010.parquet": before["records/noisy-00000010.parquet"]}
    assert tracker.trace.records() == [Record("noisy", step) for step in range(0, 13, 2)]


def test_resuming_the_noisy_session_after_the_safety_session_loses_no_record(noisy, safety, session):
    model = tiny_llama()
    session("noisy", noisy, model)[0].train()
    trainer, tracker = session("safety", safety, model)
    trainer.train()
    folder = tracker.trace.folder
    before = record_files(folder)
    trainer, tracker = session("noisy", noisy, tiny_llama())
    trainer.train(resume_from_checkpoint=trainer.args.output_dir + "/checkpoint-4")
    after = record_files(folder)
    assert lost(before, after) == 0
    moved = [Record("noisy", step) for step in (6, 8, 10, 12)] + [Record("safety", step) for step in (0, 2, 4, 6)]
    assert sorted(record_files(folder / "superseded" / "1")) == [record.file_name for record in moved]
    assert tracker.trace.records() == [Record("noisy", step) for step in range(0, 13, 2)]


def test_repeated_attempts_within_a_session_lose_no_record(noisy, make_args, collator):
    """`auto_find_batch_size` begins training again after two attempts that have taken records."""
    tracker, seen = ForgetTracker(record_steps=1), []

    class Tight(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 2 and self.state.global_step == 2:
                seen.append(record_files(tracker.trace.folder))
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    args = make_args(auto_find_batch_size=True)
    Tight(tiny_llama(), args, train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    attempts = [["records/noisy-00000001.parquet", "records/noisy-00000002.parquet"]] * 2
    assert [
        [name for name in files if name.startswith("records/") and "00000000" not in name] for files in seen
    ] == attempts
    after = record_files(tracker.trace.folder)
    assert [lost(files, after) for files in seen] == [0, 0]
    assert sorted(record_files(tracker.trace.folder / "superseded")) == [
        f"{number}/noisy-0000000{step}.parquet" for number in (1, 2) for step in (1, 2)
    ]
    assert tracker.trace.records() == [Record("noisy", step) for step in range(25)]
