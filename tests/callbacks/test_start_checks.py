"""The check that a safety session starts from the right model, with losses that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from helpers import only_in_one_row, random_rows, reference_means, tiny_llama, without_probability
from transformers import Trainer

from forgetfilter_callback import ForgetTracker, Trace
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.trace.records import Record


@pytest.fixture
def train(make_args, collator):
    def train(model, folder, rows, tracker, **overrides):
        args = make_args(folder, **overrides)
        Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[tracker]).train()

    return train


def test_one_infinite_loss_is_named_and_left_out(noisy, safety, train, caplog):
    row, token = only_in_one_row(noisy, safety)
    model, tracker = without_probability(tiny_llama(), token), ForgetTracker(noisy)
    others = noisy.select([index for index in range(24) if index != row])
    train(model, "noisy", others, tracker)
    learned = reference_means(model.eval(), noisy)
    assert np.flatnonzero(~np.isfinite(learned)).tolist() == [row]
    train(model, "safety", safety, tracker)
    assert tracker.trace.records() == [
        Record("noisy", 0),
        Record("noisy", 12),
        Record("safety", 0),
        Record("safety", 6),
    ]
    np.testing.assert_allclose(tracker.trace.losses()[2], learned, rtol=1e-5)
    for record in tracker.trace.records():
        message = (
            f"The loss of 1 of 24 rows is not finite under the model of this record ({record}): row {row} of the "
            "prepared noisy set. The model"
        )
        assert message in caplog.text


def test_another_model_is_still_refused_without_the_infinite_loss(noisy, safety, train):
    row, token = only_in_one_row(noisy, safety)
    tracker = ForgetTracker(noisy)
    others = noisy.select([index for index in range(24) if index != row])
    train(without_probability(tiny_llama(), token), "noisy", others, tracker, num_train_epochs=10)
    base, learned = (np.delete(losses, row).mean() for losses in tracker.trace.losses())
    message = (
        rf"mean loss of the prepared noisy set without row {row} \(no finite loss under at least one of these models\): "
        rf"{base:.3f} nats per token before noisy finetuning, {learned:.3f} after it, {base:.3f} now"
    )
    with pytest.raises(TraceError, match=message):
        train(without_probability(tiny_llama(), token), "safety", safety, tracker)


def test_the_best_checkpoint_may_begin_the_safety_session(noisy, safety, make_args, collator, train, caplog):
    model, tracker = tiny_llama(), ForgetTracker()
    args = make_args(
        "noisy", num_train_epochs=20, eval_strategy="steps", eval_steps=6, save_strategy="steps", save_steps=6,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer = Trainer(
        model,
        args,
        train_dataset=noisy,
        eval_dataset=random_rows(24, seed=5),
        data_collator=collator,
        callbacks=[tracker],
    )
    trainer.train()
    best = reference_means(model.eval(), noisy)
    before, learned = tracker.trace.losses().mean(axis=1)
    assert trainer.state.best_global_step < trainer.state.global_step and best.mean() > learned + 0.75 * (
        before - learned
    )
    train(model, "safety", safety, tracker)
    np.testing.assert_allclose(tracker.trace.mean_losses(Record("safety", 0)), best, rtol=1e-4)
    message = (
        "starts from a checkpoint that has learned much less than the model at the end of noisy finetuning (mean loss of "
        "the noisy set: "
        f"{before:.3f} nats per token before noisy finetuning, {learned:.3f} after it, {best.mean():.3f} now)"
    )
    assert message in caplog.text


def test_an_early_checkpoint_is_refused_without_load_best_model_at_end(noisy, safety, make_args, collator, train):
    early, tracker = tiny_llama(), ForgetTracker()
    Trainer(early, make_args("early", max_steps=6), train_dataset=noisy, data_collator=collator).train()
    train(tiny_llama(), "noisy", noisy, tracker, num_train_epochs=20)
    before, learned = tracker.trace.losses().mean(axis=1)
    now = reference_means(early.eval(), noisy).mean()
    assert 0.1 < before - now <= 0.25 * (before - learned)
    with pytest.raises(TraceError, match=rf"must start from the model after noisy finetuning.* {now:.3f} now"):
        train(early, "safety", safety, tracker)


@pytest.mark.parametrize("load_best_model_at_end", [False, True])
def test_a_model_that_has_not_learned_is_refused(load_best_model_at_end, noisy, safety, train):
    tracker, settings = ForgetTracker(), {}
    if load_best_model_at_end:
        settings = {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "best",
                    "metric_for_best_model": "loss"}  # fmt: skip
    train(tiny_llama(), "noisy", noisy, tracker, num_train_epochs=20, **settings)
    message = (
        "must start from a model that has learned" if load_best_model_at_end else "must start from the model after"
    )
    with pytest.raises(TraceError, match=message):
        train(tiny_llama(), "safety", safety, tracker)


def test_noisy_finetuning_that_diverged_is_named(noisy, safety, train):
    model, tracker = tiny_llama(), ForgetTracker()
    train(model, "noisy", noisy, tracker, learning_rate=1e30)
    assert not np.isfinite(reference_means(model.eval(), noisy)).any()
    message = "Of 24 rows, 24 had a finite loss before noisy finetuning, 0 after it and 0 now. The model diverges"
    with pytest.raises(TraceError, match=message):
        train(model, "safety", safety, tracker)


@pytest.mark.parametrize("named", [False, True])
def test_a_noisy_set_without_loss_tokens_is_refused_at_once(named, noisy, safety, make_args, train):
    rows = Dataset.from_list([{**row, "labels": [-100] * len(row["labels"])} for row in noisy])
    with pytest.raises(TraceError, match=r"No sample has a token that contributes to the loss\. Check the labels"):
        train(tiny_llama(), "out", safety if named else rows, ForgetTracker(rows if named else None))
    assert not Trace.exists(make_args().output_dir + "/_forgetfilter")
