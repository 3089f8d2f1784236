"""FilteredTrainer checks that it starts from the base model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import only_in_one_row, reference_means, tiny_llama, without_probability
from transformers import Trainer, TrainerState

from forgetfilter_callback import FilterConfig, FilteredTrainer, ForgetTracker
from forgetfilter_callback.callbacks.sessions import has_smaller_batch
from forgetfilter_callback.errors import ForgetFilterError
from forgetfilter_callback.trainers.base_model_check import BaseModelCheck


def test_a_model_that_is_not_the_base_model_is_refused(noisy, safety, make_args, collator):
    model, tracker = tiny_llama(), ForgetTracker()
    for folder, rows in (("noisy", noisy), ("safety", safety)):
        Trainer(model, make_args(folder), train_dataset=rows, data_collator=collator, callbacks=[tracker]).train()
    trainer = FilteredTrainer(
        model,
        make_args(),
        train_dataset=noisy,
        data_collator=collator,
        forgetting=tracker,
        filter_config=FilterConfig(fraction=0.25),
    )
    with pytest.raises(ForgetFilterError, match=r"not the base model of the trace\. On 24 rows its mean loss is"):
        trainer.train()


def test_a_missing_base_record_is_reported(noisy, safety, make_args, collator, caplog):
    tracker = ForgetTracker(noisy)
    Trainer(tiny_llama(), make_args("s"), train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    FilteredTrainer(
        tiny_llama(),
        make_args(),
        train_dataset=noisy,
        data_collator=collator,
        forgetting=tracker,
        filter_config=FilterConfig(fraction=0.25),
    ).train()
    assert (
        "Could not check that this model is the base model: there is no record of it (step 0 of the noisy session)."
        in caplog.text
    )


def test_a_smaller_batch_after_out_of_memory_continues_training(noisy, safety, make_args, collator):
    """The trainer keeps what the first attempt has trained. A second call of `train()` is checked again."""
    model, tracker, batches = tiny_llama(), ForgetTracker(), []
    for folder, rows in (("noisy", noisy), ("safety", safety)):
        Trainer(model, make_args(folder), train_dataset=rows, data_collator=collator, callbacks=[tracker]).train()

    class Tight(FilteredTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            batches.append(len(inputs["input_ids"]))
            if len(batches) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    args = make_args(auto_find_batch_size=True, learning_rate=1.0)
    trainer = Tight(
        tiny_llama(), args, train_dataset=noisy, data_collator=collator,
        forgetting=tracker, filter_config=FilterConfig(fraction=0.25),
    )  # fmt: skip
    trainer.train()
    assert batches[:5] == [4, 4, 4, 4, 3] and trainer.state.global_step == len(batches) - 4
    with pytest.raises(ForgetFilterError, match="not the base model of the trace"):
        trainer.train()


@pytest.mark.parametrize("auto_find_batch_size", [False, True])
@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_only_a_smaller_batch_of_auto_find_batch_size_is_a_retry(batch_size, auto_find_batch_size, make_args):
    state = TrainerState(train_batch_size=batch_size)
    is_retry = has_smaller_batch(make_args(auto_find_batch_size=auto_find_batch_size), state, 4)
    assert is_retry == (auto_find_batch_size and batch_size == 2)


@pytest.fixture
def check(noisy, safety, make_args, collator):
    """A function that records a base model, and checks another model against it when training begins."""

    def check(base, model):
        tracker = ForgetTracker(noisy, session="noisy")
        args = make_args("recorded", max_steps=1)
        Trainer(base, args, train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
        args, callbacks = make_args(max_steps=1), [BaseModelCheck(tracker.trace)]
        Trainer(model, args, train_dataset=safety, data_collator=collator, callbacks=callbacks).train()

    return check


@pytest.mark.parametrize("which", ["this model", "the base model of the trace"])
def test_an_infinite_loss_under_one_model_is_named_and_left_out(which, noisy, safety, check, caplog):
    row, token = only_in_one_row(noisy, safety)
    infinite, base = without_probability(tiny_llama(), token), tiny_llama()
    check(*((base, infinite) if which == "this model" else (infinite, base)))
    message = f"leaves rows out: under {which}, the loss of row {row} of the prepared noisy set is not finite."
    assert message in caplog.text


def test_an_infinite_loss_under_both_models_is_left_out(noisy, safety, check, caplog):
    row, token = only_in_one_row(noisy, safety)
    check(without_probability(tiny_llama(), token), without_probability(tiny_llama(), token))
    assert caplog.text.count(f"the loss of row {row} of the prepared noisy set is not finite") == 2


def test_another_model_is_refused_without_the_infinite_loss(noisy, safety, check):
    row, token = only_in_one_row(noisy, safety)
    base, other = without_probability(tiny_llama(), token), tiny_llama(seed=1)
    other.lm_head.weight.data *= 5
    means = [np.delete(reference_means(model, noisy), row).mean() for model in (other, base)]
    message = rf"On 23 rows its mean loss is {means[0]:.3f} nats per token, and the base model's was {means[1]:.3f}"
    with pytest.raises(ForgetFilterError, match=message):
        check(base, other)


def test_a_model_without_any_finite_loss_is_refused_by_name(check):
    damaged = tiny_llama()
    with torch.no_grad():
        damaged.lm_head.weight[7] = float("nan")
    message = "cannot be compared with .*: under this model, the loss of rows 0, 1, 2, 3, 4 and 19 more of the prepared"
    with pytest.raises(ForgetFilterError, match=message):
        check(tiny_llama(), damaged)


def test_a_base_record_without_any_finite_loss_is_reported(check, caplog):
    damaged = tiny_llama()
    with torch.no_grad():
        damaged.lm_head.weight[7] = float("nan")
    check(damaged, tiny_llama())
    assert (
        "Could not check that this model is the base model: under the base model of the trace, the loss of"
        in caplog.text
    )
