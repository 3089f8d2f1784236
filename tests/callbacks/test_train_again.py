"""`train()` is called again on a trainer whose callbacks include the tracker."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import reference_losses, reference_means, tiny_llama
from trace_helpers import record_files
from transformers import Trainer, TrainerCallback

from forgetfilter_callback import ForgetTracker
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.trace.lock_folder import is_locked
from forgetfilter_callback.trace.records import Record


class FailOnce(TrainerCallback):
    """Ends the first call of `train()` at step 3."""

    def __init__(self, error: BaseException):
        self.error: BaseException | None = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.fixture
def trainer_of(make_args, collator):
    def prepare(model, rows, *callbacks, trainer_class=Trainer, **overrides):
        args = make_args(**overrides)
        return trainer_class(model, args, train_dataset=rows, data_collator=collator, callbacks=list(callbacks))

    return prepare


@pytest.mark.parametrize("auto_find_batch_size", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the data loader has died")], ids=repr)
def test_after_an_error_the_model_is_recorded_as_it_is_now(error, auto_find_batch_size, noisy, trainer_of, caplog):
    model, tracker = tiny_llama(), ForgetTracker()
    base = reference_losses(model, noisy)
    trainer = trainer_of(model, noisy, tracker, FailOnce(error), auto_find_batch_size=auto_find_batch_size)
    with pytest.raises(type(error)):
        trainer.train()
    now = reference_means(model.eval(), noisy)
    trainer.train()
    trace = tracker.trace
    assert trace.records() == [Record("noisy", 0), Record("noisy", 12)]
    np.testing.assert_allclose(trace.losses(), [now, reference_means(model.eval(), noisy)], rtol=1e-4)
    old = pq.read_table(trace.folder / "superseded" / "1" / "noisy-00000000.parquet")["loss"].combine_chunks()
    np.testing.assert_allclose(old.values.to_numpy(), base, rtol=1e-4, atol=1e-5)
    message = f"starts again from another model: the mean loss of the noisy set is {now.mean():.3f} nats per token now"
    assert message in caplog.text


def test_after_an_interrupt_a_smaller_batch_keeps_the_record_of_the_second_call(noisy, trainer_of):
    tracker, failures = ForgetTracker(), [KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory.")]

    class Failing(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 3 and failures:
                raise failures.pop(0)
            return super().training_step(*args, **kwargs)

    model = tiny_llama()
    trainer = trainer_of(model, noisy, tracker, trainer_class=Failing, auto_find_batch_size=True)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    now = reference_means(model.eval(), noisy)
    trainer.train()
    assert not failures and trainer.state.max_steps > 12  # the batch has shrunk
    assert tracker.trace.records() == [Record("noisy", 0), Record("noisy", trainer.state.max_steps)]
    np.testing.assert_allclose(tracker.trace.losses()[0], now, rtol=1e-4)


def test_after_an_interrupt_the_trainer_may_get_the_safety_set(noisy, safety, trainer_of):
    model, tracker = tiny_llama(), ForgetTracker()
    trainer = trainer_of(model, noisy, tracker, FailOnce(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    now = reference_means(model.eval(), noisy)
    trainer.train_dataset = safety
    trainer.train()
    assert tracker.trace.records() == [Record("noisy", 0), Record("safety", 0), Record("safety", 6)]
    np.testing.assert_allclose(tracker.trace.losses()[1], now, rtol=1e-4)


def test_each_call_with_its_own_training_set_is_a_session(noisy, safety, trainer_of):
    model, tracker = tiny_llama(), ForgetTracker()
    expected = [reference_means(model, noisy)]
    trainer = trainer_of(model, noisy, tracker)
    trainer.train()
    expected.append(reference_means(model.eval(), noisy))
    trainer.train_dataset = safety
    trainer.train()
    expected += [expected[1], reference_means(model.eval(), noisy)]
    assert tracker.trace.records() == [
        Record("noisy", 0),
        Record("noisy", 12),
        Record("safety", 0),
        Record("safety", 6),
    ]
    np.testing.assert_allclose(tracker.trace.losses(), expected, rtol=1e-4)


def test_a_second_call_with_the_same_training_set_names_what_to_do(noisy, trainer_of):
    tracker = ForgetTracker()
    trainer = trainer_of(tiny_llama(), noisy, tracker)
    trainer.train()
    old = record_files(tracker.trace.folder)
    with pytest.raises(TraceError, match=r"already recorded a noisy session.*`trainer\.remove_callback\(tracker\)`"):
        trainer.train()
    assert record_files(tracker.trace.folder) == old
    trainer.remove_callback(tracker)
    trainer.train()
    assert record_files(tracker.trace.folder) == old


def test_a_new_tracker_frees_the_folder_of_an_interrupted_one(noisy, safety, trainer_of):
    """The cell of a notebook, interrupted and run again. The notebook keeps the first tracker alive."""

    def cell(*callbacks) -> ForgetTracker:
        model, tracker = tiny_llama(), ForgetTracker()
        for rows in (noisy, safety):
            trainer_of(model, rows, tracker, *callbacks).train()
        return tracker

    with pytest.raises(KeyboardInterrupt) as interrupted:
        cell(FailOnce(KeyboardInterrupt()))
    folder = cell().trace.folder
    assert interrupted.tb is not None
    assert not is_locked(folder)
