"""How ForgetTracker decides whether a run is the noisy or the safety session."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from helpers import random_rows, reference_means, run_both, tiny_llama, train_tracked
from transformers import Trainer, TrainerCallback

from forgetfilter_callback import ForgetTracker, Trace, encode_rows
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


def test_a_second_tracker_continues_the_trace(noisy, safety, make_args, collator):
    model = tiny_llama()
    first = ForgetTracker()
    Trainer(model, make_args("noisy"), train_dataset=noisy, data_collator=collator, callbacks=[first]).train()
    second = ForgetTracker(trace_dir=first.trace.folder)
    Trainer(model, make_args("safety"), train_dataset=safety, data_collator=collator, callbacks=[second]).train()
    assert second.trace.records() == [Record("noisy", 0), Record("noisy", 12), Record("safety", 0), Record("safety", 6)]
    assert [entry["session"] for entry in second.trace.manifest["sessions"]] == ["noisy", "safety"]


def test_a_repeated_safety_session_moves_its_old_records(noisy, safety, make_args, collator, caplog):
    model = tiny_llama()
    first = ForgetTracker(noisy, trace_dir=make_args("t").output_dir)
    Trainer(model, make_args(), train_dataset=safety, data_collator=collator, callbacks=[first]).train()
    again = ForgetTracker(noisy, trace_dir=make_args("t").output_dir, record_steps=3)
    Trainer(
        model, make_args(num_train_epochs=1), train_dataset=safety, data_collator=collator, callbacks=[again]
    ).train()
    assert again.trace.records() == [Record("safety", 0), Record("safety", 3)]
    assert "The safety session restarts at step 0." in caplog.text
    assert f"were moved to {again.trace.folder / 'superseded'}: safety session, step 6." in caplog.text
    moved = sorted(file.name for file in (again.trace.folder / "superseded" / "1").iterdir())
    assert moved == ["safety-00000000.parquet", "safety-00000006.parquet"]


def test_forgetting_needs_both_sessions(noisy, make_args, collator):
    tracker = ForgetTracker()
    with pytest.raises(TraceError, match="has not been used in a training run yet"):
        _ = tracker.trace
    train_tracked(noisy, make_args, collator, tracker)
    with pytest.raises(TraceError, match="has records of noisy finetuning only"):
        tracker.trace.forgetting()


def test_third_session_is_refused(noisy, safety, make_args, collator):
    model, tracker = tiny_llama(), ForgetTracker()
    run_both(model, noisy, safety, make_args, collator, tracker)
    with pytest.raises(TraceError, match="has already recorded a noisy session"):
        train_tracked(noisy, make_args, collator, tracker)


def test_a_trace_of_another_dataset_is_refused(noisy, make_args, collator):
    train_tracked(noisy, make_args, collator, ForgetTracker())
    with pytest.raises(TraceError, match="another dataset or tokenizer: 0 of 24"):
        train_tracked(random_rows(24, seed=7), make_args, collator, ForgetTracker())


def test_safety_session_from_an_untrained_model_is_refused(noisy, safety, make_args, collator):
    tracker = ForgetTracker()
    train_tracked(noisy, lambda: make_args("noisy", num_train_epochs=10), collator, tracker)
    base, learned = tracker.trace.losses().mean(1)
    message = rf"{base:.3f} nats per token before noisy finetuning, {learned:.3f} after it, {base:.3f} now"
    with pytest.raises(TraceError, match=message):
        train_tracked(safety, make_args, collator, tracker)


def test_the_tracker_works_with_the_right_model_after_an_error(noisy, safety, make_args, collator):
    model, tracker = tiny_llama(), ForgetTracker()
    args = make_args("noisy", num_train_epochs=10)
    Trainer(model, args, train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    learned = reference_means(model.eval(), noisy)
    with pytest.raises(TraceError, match="must start from the model after noisy finetuning, but does not"):
        train_tracked(safety, make_args, collator, tracker)
    assert Record("safety", 0) not in tracker.trace.records()
    Trainer(model, make_args("safety"), train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    np.testing.assert_allclose(tracker.trace.losses()[2], learned, rtol=1e-4)


@pytest.mark.parametrize("same_args", [False, True])
def test_an_interrupted_noisy_session_is_followed_by_the_safety_session(same_args, noisy, safety, make_args, collator):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model, tracker = tiny_llama(), ForgetTracker()
    args = make_args("noisy")
    trainer = Trainer(model, args, train_dataset=noisy, data_collator=collator, callbacks=[tracker, Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    args = args if same_args else make_args("safety")
    Trainer(model, args, train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    assert tracker.trace.records() == [Record("noisy", 0), Record("safety", 0), Record("safety", 6)]


@pytest.mark.parametrize("session", ["noisy", "safety"])
def test_a_session_interrupted_before_its_first_step_can_be_repeated(session, noisy, safety, make_args, collator):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model, tracker = tiny_llama(), ForgetTracker()
    for name, rows in (("noisy", noisy), ("safety", safety)):
        args = make_args(name)
        trainer = partial(Trainer, model, args, train_dataset=rows, data_collator=collator)
        if name == session:
            with pytest.raises(KeyboardInterrupt):
                trainer(callbacks=[tracker, Interrupt()]).train()
        trainer(callbacks=[tracker]).train()
    assert tracker.trace.records() == [
        Record("noisy", 0),
        Record("noisy", 12),
        Record("safety", 0),
        Record("safety", 6),
    ]
    assert np.isfinite(tracker.trace.forgetting("relative")).all()


def test_other_rows_after_an_interrupted_session_give_a_warning(noisy, make_args, collator, caplog):
    """The second job is treated as the safety session."""
    folder = make_args("t").output_dir

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(
            tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator,
            callbacks=[ForgetTracker(trace_dir=folder), Interrupt()],
        ).train()  # fmt: skip
    assert "interrupted" not in caplog.text
    train_tracked(random_rows(24, seed=7), make_args, collator, ForgetTracker(trace_dir=folder))
    assert "has only the first record of the noisy session: it was interrupted, or it trained" in caplog.text


def test_other_rows_after_a_complete_session_give_no_warning(noisy, safety, make_args, collator, caplog):
    run_both(tiny_llama(), noisy, safety, make_args, collator, ForgetTracker())
    assert "has only the first record" not in caplog.text


def test_rows_in_another_order_continue_the_trace(noisy, safety, make_args, collator):
    audited = noisy.add_column("unsafe", [index % 3 == 0 for index in range(len(noisy))])
    folder = make_args("t").output_dir
    tracker = ForgetTracker(audited.shuffle(seed=1), trace_dir=folder, audit_column="unsafe")
    model = tiny_llama()
    for rows, session_tracker in ((noisy, ForgetTracker(trace_dir=folder)), (safety, tracker)):
        Trainer(model, make_args(), train_dataset=rows, data_collator=collator, callbacks=[session_tracker]).train()
    trace = tracker.trace
    assert trace.rows.ids == encode_rows(noisy).ids
    assert tracker._unsafe.tolist() == audited["unsafe"]
    assert [record.session for record in trace.records()] == ["noisy", "noisy", "safety", "safety"]


def test_a_trace_names_the_model_of_the_last_noisy_session(noisy, safety, make_args, collator):
    for name in ("org/first", "org/second"):
        model, tracker = tiny_llama(), ForgetTracker()
        model.config.name_or_path = name
        Trainer(model, make_args("noisy"), train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
        model.config.name_or_path = "org/learned"
        Trainer(model, make_args("safety"), train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
        assert Trace.open(tracker.trace.folder).manifest["model"] == name


def test_a_trace_with_a_scored_base_model_keeps_its_name(noisy, safety, make_args, collator):
    folder, rows = make_args("trace").output_dir, encode_rows(noisy)
    trace = Trace.create(folder, rows, "org/base", None, None)
    trace.append(Record("noisy", 0), [Scores(np.ones(rows.loss_offsets[-1], np.float32))])
    model, tracker = tiny_llama(), ForgetTracker(trace_dir=folder)
    model.config.name_or_path = "org/learned"
    Trainer(model, make_args(), train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    assert tracker.trace.records() == [Record("noisy", 0), Record("safety", 0), Record("safety", 6)]
    assert Trace.open(folder).manifest["model"] == "org/base"


def test_resuming_does_not_change_the_model_name_of_a_trace(noisy, make_args, collator, tokenizer):
    args = make_args(save_strategy="steps", save_steps=4)
    for name, checkpoint in (("org/first", None), ("org/second", args.output_dir + "/checkpoint-8")):
        model, tracker = tiny_llama(), ForgetTracker()
        model.config.name_or_path = name
        Trainer(model, args, train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train(checkpoint)
        assert Trace.open(tracker.trace.folder).manifest["model"] == "org/first"


def test_rows_that_the_trainer_encodes_differently_are_not_taken_as_safety_in_silence(make_args, collator, caplog):
    """The trainer adds no EOS token, so it trains on none of the rows that the tracker was given."""
    without_eos = random_rows(24, seed=1)
    with_eos = without_eos.map(lambda row: {name: [*row[name], 2] for name in ("input_ids", "labels")})
    model, tracker = tiny_llama(), ForgetTracker(with_eos)
    Trainer(model, make_args("a"), train_dataset=without_eos, data_collator=collator, callbacks=[tracker]).train()
    assert "This run trains on 0 of 24 tracked rows, so it is treated as safety finetuning" in caplog.text
    assert "If that is right, pass `session='safety'`; this warning" in caplog.text
    assert "The usual causes are an EOS token that only one of them adds" in caplog.text
    safety = random_rows(12, seed=2)
    message = (
        r"no run trained on most of the 24 tracked rows\. If the earlier run was noisy finetuning, .* an EOS token"
    )
    for next_tracker in (tracker, ForgetTracker(with_eos, trace_dir=tracker.trace.folder)):
        trainer = Trainer(model, make_args("b"), train_dataset=safety, data_collator=collator, callbacks=[next_tracker])
        with pytest.raises(TraceError, match=message):
            trainer.train()


def test_a_safety_session_that_is_named_gives_no_warning(noisy, safety, make_args, collator, caplog):
    tracker = ForgetTracker(noisy, session="safety")
    train_tracked(safety, make_args, collator, tracker)
    assert "is treated as safety finetuning" not in caplog.text and "usual causes" not in caplog.text


def test_a_named_noisy_session_on_other_rows_gives_a_warning(noisy, safety, make_args, collator, caplog):
    train_tracked(safety, make_args, collator, ForgetTracker(noisy, session="noisy"))
    assert "This noisy session trains on 0 of 24 tracked rows, so the others cannot be learned." in caplog.text
