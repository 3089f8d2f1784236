"""What else a Trainer can do: with each, training stays untouched and a record holds the losses of the model as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_llama, tiny_lora
from test_tracker import reference_means
from transformers import Trainer, TrainingArguments

from forgetfilter_callback import FilteredTrainer, ForgetTracker, Trace, filtered
from forgetfilter_callback.trace.records import Record


_FIELDS = TrainingArguments.__dataclass_fields__
ACTIVATION_CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"  # its older name
)
FEATURES = {
    "save_total_limit": {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1},
    "gradient accumulation": {"gradient_accumulation_steps": 3},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "NEFTune": {"neftune_noise_alpha": 5},
    "dataloader workers": {"dataloader_num_workers": 2},
    "activation checkpointing": {ACTIVATION_CHECKPOINTING: True},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "schedule-free": {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
    "evaluation between steps": {"eval_strategy": "steps", "eval_steps": 2},
}


def without_timings(logs):
    return [
        {key: value for key, value in log.items() if not key.endswith(("runtime", "per_second"))}
        for log in logs
        if "forgetfilter/loss" not in log
    ]


@pytest.mark.parametrize("feature", FEATURES)
def test_training_is_untouched_and_records_are_true(feature, noisy, safety, make_args, collator):
    runs = []
    for tracked in (False, True):
        model, tracker, logs = tiny_lora().train(), ForgetTracker(record_steps=1), []
        for folder, rows in (("s1", noisy), ("s1plus", safety)):
            trainer = Trainer(
                model, make_args(f"{folder}-{tracked}", **FEATURES[feature]), train_dataset=rows, eval_dataset=safety,
                data_collator=collator, callbacks=[tracker] if tracked else [],
            )  # fmt: skip
            trainer.train()
            logs += without_timings(trainer.state.log_history)
        runs.append((model, logs))
    (plain, plain_logs), (model, logs) = runs
    assert logs == plain_logs and len(logs) > 4
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    np.testing.assert_allclose(tracker.trace.losses()[-1], reference_means(model.eval(), noisy), rtol=1e-5)
    last = tracker.trace.records()[-1].step
    assert [record.step for record in tracker.trace.records() if record.session == "safety"] == list(range(last + 1))


def test_checkpoints_that_are_deleted_leave_the_trace_alone(noisy, make_args, collator):
    tracker = ForgetTracker(record_steps=2)
    args = make_args(save_strategy="steps", save_steps=2, save_total_limit=1)
    Trainer(tiny_llama(), args, train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    assert [record.step for record in Trace.open(tracker.trace.folder).records()] == [0, 2, 4, 6, 8, 10, 12]


def test_two_trackers_in_one_trainer(noisy, safety, make_args, collator):
    """One adopts the training set, one follows other rows."""
    adopting, other = ForgetTracker(), ForgetTracker(safety, trace_dir=make_args("other").output_dir)
    model = tiny_llama()
    Trainer(model, make_args(), train_dataset=noisy, data_collator=collator, callbacks=[adopting, other]).train()
    assert adopting.trace.records() == [Record("noisy", 0), Record("noisy", 12)]
    assert other.trace.records() == [Record("safety", 0), Record("safety", 12)]
    for tracker, rows in ((adopting, noisy), (other, safety)):
        np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), rows), rtol=1e-5)
        np.testing.assert_allclose(tracker.trace.losses()[1], reference_means(model.eval(), rows), rtol=1e-5)


def test_bfloat16_autocast(noisy, make_args, collator):
    """A record is taken as the trainer evaluates: under its autocast."""
    model, tracker = tiny_llama(), ForgetTracker()
    trainer = Trainer(model, make_args(bf16=True), train_dataset=noisy, data_collator=collator, callbacks=[tracker])
    trainer.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = reference_means(model.eval(), noisy)
    np.testing.assert_allclose(tracker.trace.losses()[-1], expected, rtol=0.01)


class Doubling(Trainer):
    """Somebody's own trainer."""

    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


def test_filtered_makes_a_filtered_trainer_of_any_trainer(noisy, safety, make_args, collator):
    model, tracker = tiny_llama(), ForgetTracker()
    for folder, rows in (("s1", noisy), ("s1plus", safety)):
        Doubling(model, make_args(folder), train_dataset=rows, data_collator=collator, callbacks=[tracker]).train()
    values = tracker.trace.forgetting()
    phi = float(np.median(values))
    kept = noisy.select(np.flatnonzero(values <= phi))
    plain = Doubling(tiny_llama(), make_args("a"), train_dataset=kept, data_collator=collator)
    trainer = filtered(Doubling)(
        tiny_llama(), make_args("b"), train_dataset=noisy, data_collator=collator, forgetting=tracker, threshold=phi
    )
    assert isinstance(trainer, FilteredTrainer) and type(trainer).__name__ == "FilteredDoubling"
    assert plain.train().training_loss == trainer.train().training_loss
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), trainer.model.parameters(), strict=True))
