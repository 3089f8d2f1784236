"""When and at which step records are taken. No record is computed twice."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import reference_means, run_both, tiny_llama, tiny_lora
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from forgetfilter_callback import FilterConfig, ForgetTracker, ReviewQueue, find_forgotten
from forgetfilter_callback.callbacks import recorder
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.scoring.token_losses import window_scores
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.trace.validate_trace import validate_trace


def change_nothing(model):
    pass


def change_one_bit(model):
    model.base_model.model.lm_head.weight.data.view(torch.int32)[3, 3] += 1


def swap_two_rows(model):
    weight = model.base_model.model.lm_head.weight.data
    weight[[3, 4]] = weight[[4, 3]]


def scale_the_adapter(model):
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2


def switch_the_adapter_off(model):
    model.base_model.disable_adapter_layers()


def hook_a_layer(model):
    model.base_model.model.model.layers[0].register_forward_hook(lambda module, args, output: 1.1 * output)


def change_an_unregistered_tensor(model):
    model.steering = torch.ones(3)


def swap_rows_of_equal_sums(model):
    weight = model.base_model.model.model.layers[0].mlp.up_proj.weight.data
    weight[:] = 8 * torch.eye(*weight.shape)
    weight[[0, 9]] = weight[[9, 0]]


def change_the_attention(model):
    model.config._attn_implementation = "eager"


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        (change_nothing, 3),
        (change_one_bit, 4),
        (swap_two_rows, 4),
        (hook_a_layer, 4),
        (change_an_unregistered_tensor, 4),
        (swap_rows_of_equal_sums, 4),
        (scale_the_adapter, 4),
        (switch_the_adapter_off, 4),
        (change_the_attention, 4),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_record_of_an_unchanged_model_is_not_recomputed(
    change, taken, noisy, safety, make_args, collator, monkeypatch
):
    recordings = []

    def counting(*args, **kwargs):
        recordings.append(kwargs["description"])
        return window_scores(*args, **kwargs)

    monkeypatch.setattr(recorder, "window_scores", counting)
    model, tracker = tiny_lora(), ForgetTracker()
    Trainer(model, make_args("noisy"), train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    change(model)
    before = reference_means(model.eval(), noisy)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    Trainer(model, make_args("safety"), train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    assert len(recordings) == taken
    np.testing.assert_allclose(tracker.trace.losses()[2], before, rtol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True], ids=["copied", "autocast"])
def test_hidden_states_are_stored_where_they_are_read(wrapped, noisy, safety, make_args, collator):
    """At step 0 of the safety session, and in the record it is a copy of. Under autocast it is computed again."""
    model, tracker = tiny_llama(), ForgetTracker(record_steps=3)
    run_both(model, noisy, safety, make_args, collator, tracker, bf16=wrapped)
    records = tracker.trace.records()
    assert records == [Record("noisy", step) for step in (0, 3, 6, 9, 12)] + [
        Record("safety", step) for step in (0, 3, 6)
    ]
    folder = tracker.trace.folder / "records"
    have_states = [record for record in records if "state" in pq.read_schema(folder / record.file_name).names]
    assert have_states == ([] if wrapped else [Record("noisy", 12)]) + [Record("safety", 0)]
    assert np.isfinite(tracker.trace.forgetting("combined")).all()
    assert validate_trace(tracker.trace.folder) == ([], [])


def test_the_last_record_is_taken_before_the_best_checkpoint_is_loaded(noisy, make_args, collator):
    """`load_best_model_at_end` swaps the weights before `on_train_end`."""
    model, tracker = tiny_llama(), ForgetTracker()
    last = {}

    class Last(TrainerCallback):
        def on_epoch_end(self, args, state, control, model, **kwargs):
            last["means"] = reference_means(model.eval(), noisy)
            model.train()

    args = make_args(
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,  # makes the first checkpoint the best one
    )  # fmt: skip
    Trainer(
        model, args, train_dataset=noisy, eval_dataset=noisy, data_collator=collator, callbacks=[tracker, Last()]
    ).train()
    np.testing.assert_allclose(tracker.trace.losses()[-1], last["means"], rtol=1e-4)
    assert np.abs(reference_means(model.eval(), noisy) - last["means"]).mean() > 0.01  # the best one differs


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("load_best", [True, False])
def test_early_stopping_is_recorded_where_it_stops(strategy, load_best, noisy, make_args, collator, monkeypatch):
    # Skip the callback's check at the beginning, so that it works without `load_best_model_at_end`.
    monkeypatch.setattr(EarlyStoppingCallback, "on_train_begin", lambda *args, **kwargs: None)
    tracker = ForgetTracker()
    args = make_args(
        learning_rate=1e-2, num_train_epochs=4, eval_strategy=strategy, eval_steps=1, save_strategy=strategy, save_steps=1,
        load_best_model_at_end=load_best, metric_for_best_model="loss", greater_is_better=True,  # makes it stop soon
    )  # fmt: skip
    trainer = Trainer(
        tiny_llama(), args, train_dataset=noisy, eval_dataset=noisy, data_collator=collator,
        callbacks=[tracker, EarlyStoppingCallback(1)],
    )  # fmt: skip
    trainer.train()
    assert 0 < trainer.state.global_step < trainer.state.max_steps
    assert tracker.trace.records()[-1] == Record("noisy", trainer.state.global_step)


def test_early_stopping_at_an_evaluation_that_saves_nothing(noisy, make_args, collator):
    tracker, last = ForgetTracker(), {}

    class Last(TrainerCallback):
        def on_evaluate(self, args, state, control, model, **kwargs):
            last[state.global_step] = reference_means(model, noisy)

    args = make_args(
        num_train_epochs=6, eval_strategy="epoch", save_strategy="best", load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer = Trainer(
        tiny_llama(), args, train_dataset=noisy, eval_dataset=noisy, data_collator=collator,
        callbacks=[tracker, Last(), EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.global_step < trainer.state.max_steps
    assert tracker.trace.records() == [Record("noisy", 0), Record("noisy", trainer.state.global_step)]
    np.testing.assert_allclose(tracker.trace.losses()[-1], last[trainer.state.global_step], rtol=1e-5)


def test_a_smaller_batch_after_out_of_memory_continues_the_session(noisy, make_args, collator):
    tracker, tried = ForgetTracker(), []

    class Tight(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            tried.append(len(inputs["input_ids"]))
            if tried[-1] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    args = make_args(auto_find_batch_size=True)
    trainer = Tight(tiny_llama(), args, train_dataset=noisy, data_collator=collator, callbacks=[tracker])
    trainer.train()
    assert max(tried) == 4 and trainer.state.global_step == 24
    assert tracker.trace.records() == [Record("noisy", 0), Record("noisy", 24)]
    logged = [log["step"] for log in trainer.state.log_history if "forgetfilter/loss" in log]
    assert logged == [0, 24]
    np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), noisy), rtol=1e-5)


def test_resuming_gives_the_trace_of_an_uninterrupted_run(noisy, safety, make_args, collator, caplog):
    def trainer(model, folder, rows, tracker, **overrides):
        args = make_args(folder, save_strategy="steps", save_steps=4, **overrides)
        return Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[tracker])

    whole = ForgetTracker(record_steps=3)
    trainer(tiny_lora(), "whole-noisy", noisy, whole).train()

    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 11:
                raise KeyboardInterrupt

    crashed = trainer(tiny_lora(), "cut-noisy", noisy, ForgetTracker(record_steps=3))
    crashed.add_callback(Crash())
    with pytest.raises(KeyboardInterrupt):
        crashed.train()
    resumed = ForgetTracker(record_steps=3)
    trainer(tiny_lora(), "cut-noisy", noisy, resumed).train(resume_from_checkpoint=True)

    # The record at step 9 was taken before the crash and after the checkpoint.
    assert (
        "The noisy session restarts at step 8." in caplog.text and "superseded: noisy session, step 9." in caplog.text
    )
    assert resumed.trace.records() == whole.trace.records()
    for record in whole.trace.records():
        np.testing.assert_array_equal(resumed.trace.token_losses(record), whole.trace.token_losses(record))


def test_bfloat16_autocast(noisy, make_args, collator):
    """Records are taken under the trainer's autocast, as in its evaluation."""
    model, tracker = tiny_llama(), ForgetTracker()
    trainer = Trainer(model, make_args(bf16=True), train_dataset=noisy, data_collator=collator, callbacks=[tracker])
    trainer.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = reference_means(model.eval(), noisy)
    np.testing.assert_allclose(tracker.trace.losses()[-1], expected, rtol=0.01)


def test_a_model_without_hidden_states_is_reported_once(noisy, safety, make_args, collator, caplog, monkeypatch):
    model, tracker = tiny_llama(), ForgetTracker(record_steps=4)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    Trainer(model, make_args("noisy"), train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    assert caplog.text.count("there are no hidden states. The measures combined") == 1
    Trainer(model, make_args("safety"), train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    assert caplog.text.count("there are no hidden states") == 1
    for needs_states in (find_forgotten, ReviewQueue):
        with pytest.raises(
            TraceError,
            match=r"there are no hidden states\. .* Use the measure pooled or loss, for example `measure='pooled'`",
        ):
            needs_states(tracker.trace)
    assert find_forgotten(tracker.trace, FilterConfig("pooled", 99.0)).counts["removed"] == 0
