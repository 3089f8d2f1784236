"""ForgetTracker: which records it takes and reports, and what it leaves on disk."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import reference_losses, reference_means, run_both, tiny_llama, tiny_lora, train_tracked
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer

from forgetfilter_callback import FilterConfig, FilteredTrainer, ForgetTracker, Trace
from forgetfilter_callback.errors import DataError, TraceError
from forgetfilter_callback.trace.records import Record


def test_one_tracker_through_both_sessions(noisy, safety, make_args, collator):
    model, tracker = tiny_llama(), ForgetTracker()
    base = reference_means(model, noisy)
    Trainer(model, make_args("noisy"), train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    learned = reference_means(model.eval(), noisy)
    Trainer(model, make_args("safety"), train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    forgotten = reference_means(model.eval(), noisy)

    trace = tracker.trace
    assert trace.records() == [Record("noisy", 0), Record("noisy", 12), Record("safety", 0), Record("safety", 6)]
    np.testing.assert_allclose(trace.losses(), [base, learned, learned, forgotten], rtol=1e-5)
    np.testing.assert_allclose(trace.forgetting("loss"), forgotten - learned, atol=1e-5)
    assert trace.folder == Path(make_args("noisy").output_dir) / "_forgetfilter"
    np.testing.assert_allclose(Trace.open(trace.folder).losses(), trace.losses())
    np.testing.assert_allclose(
        trace.token_losses(Record("safety", 6)), reference_losses(model, noisy), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("record_steps", "steps"), [(None, [0, 12]), (5, [0, 5, 10, 12]), (0.25, [0, 3, 6, 9, 12]), (4.0, [0, 4, 8, 12])]
)
def test_record_steps(record_steps, steps, noisy, make_args, collator):
    tracker = ForgetTracker(record_steps=record_steps)
    Trainer(tiny_llama(), make_args(), train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    assert [record.step for record in tracker.trace.records()] == steps


@pytest.mark.parametrize(("make_model", "passes"), [(tiny_llama, 3), (tiny_lora, 2)])
def test_the_cost_of_records_is_logged_at_the_start(make_model, passes, noisy, make_args, collator, capsys, caplog):
    caplog.set_level(logging.INFO, logger="forgetfilter_callback")
    tracker = ForgetTracker(record_steps=5)  # at steps 0, 5, 10 and 12
    args = make_args(disable_tqdm=False)
    Trainer(make_model(), args, train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    lengths = [len(row["input_ids"]) for row in noisy]
    scored = sum(max(i for i, label in enumerate(row["labels"]) if label != -100) for row in noisy)
    steps = math.ceil(4 * scored / (passes * 4 * np.mean(lengths)))  # four rows a step
    expected = (
        "ForgetTracker: noisy session. It trains on 24 of 24 tracked rows. "
        f"Up to 4 records: each measures the losses of 24 rows (up to {scored} tokens). "
        f"This takes at most as long as {steps} training steps (the session has 12)."
    )
    logged = [(entry.levelname, entry.getMessage().removeprefix("[RANK 0] ")) for entry in caplog.records]
    assert logged == [("INFO", expected)]
    assert "ForgetTracker" not in capsys.readouterr().out


@pytest.mark.parametrize("record_steps", [0, -1, 2.5])
def test_invalid_record_steps_are_refused(record_steps):
    with pytest.raises(ValueError, match="record_steps"):
        ForgetTracker(record_steps=record_steps)


def test_no_rows_are_pushed_to_the_hub(noisy, safety, make_args, collator, monkeypatch):
    pushed = []

    def upload_folder(folder_path, ignore_patterns, **kwargs):
        files = [str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()]
        pushed.extend(filter_repo_objects(files, ignore_patterns=ignore_patterns))

    # Trainer calls `hf_api().upload_folder` or, in older versions of transformers, `upload_folder`.
    hf_api = lambda: SimpleNamespace(upload_folder=upload_folder)  # noqa: E731
    monkeypatch.setattr("transformers.trainer.hf_api", hf_api, raising=False)
    monkeypatch.setattr("transformers.trainer.upload_folder", upload_folder, raising=False)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: setattr(self, "hub_model_id", "me/model"))
    monkeypatch.setattr(Trainer, "create_model_card", lambda self, **kwargs: None)
    model, tracker = tiny_llama(), ForgetTracker()
    for rows in (noisy, safety):
        args = make_args("out", push_to_hub=True)
        trainer = Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[tracker])
        trainer.train()
        trainer.push_to_hub()
    FilteredTrainer(
        tiny_llama(),
        args,
        train_dataset=noisy,
        data_collator=collator,
        forgetting=tracker,
        filter_config=FilterConfig(fraction=0.25),
    ).push_to_hub()
    folder = Path(args.output_dir)
    assert (folder / "_forgetfilter" / "rows.parquet").exists()
    assert (folder / "_forgetfilter-result" / "removed.jsonl").exists()
    assert "model.safetensors" in pushed and not [name for name in pushed if "forgetfilter" in name]


def test_a_session_that_teaches_nothing_gives_a_warning(noisy, safety, make_args, collator, caplog):
    run_both(tiny_llama(), noisy, safety, make_args, collator, ForgetTracker(), learning_rate=1e-7)
    assert "The model has hardly learned the noisy set" in caplog.text


@pytest.mark.parametrize("session", ["auto", "safety"])
def test_an_overlapping_safety_set_gives_a_warning(session, noisy, safety, make_args, collator, caplog):
    overlapping = Dataset.from_list(noisy.select(range(3)).to_list() + safety.to_list())
    tracker = ForgetTracker(noisy, session=session)
    train_tracked(overlapping, make_args, collator, tracker)
    assert tracker.trace.records()[0] == Record("safety", 0)
    assert "3 of 15 rows are in both the safety set and the noisy set." in caplog.text


def test_a_diverging_model_is_reported(noisy, make_args, collator, caplog):
    model, tracker = tiny_llama(), ForgetTracker()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    Trainer(model, make_args(), train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    message = (
        "The loss of 24 of 24 rows is not finite under the model of this record (noisy session, step 0): rows 0, 1, 2, "
        "3, 4 and 19 more of the prepared noisy set."
    )
    assert message in caplog.text
    assert len(tracker.trace.records()) == 2


def test_relative_forgetting_needs_the_base_model(noisy, safety, make_args, collator):
    tracker = ForgetTracker(noisy)
    train_tracked(safety, make_args, collator, tracker)
    with pytest.raises(TraceError, match="measure='relative' needs the losses of all rows under the base model"):
        tracker.trace.forgetting("relative")


def test_a_record_without_rouge_names_the_option(noisy, safety, make_args, collator):
    tracker = ForgetTracker(noisy)
    train_tracked(safety, make_args, collator, tracker)
    with pytest.raises(TraceError, match=r"ForgetTracker\(rouge1=True\)"):
        tracker.trace.forgetting("rouge1")


def test_rouge1_without_a_tokenizer_is_refused(noisy, make_args, collator):
    with pytest.raises(DataError, match="rouge1=True needs a tokenizer"):
        train_tracked(noisy, make_args, collator, ForgetTracker(rouge1=True))


def test_deleting_checkpoints_does_not_affect_the_trace(noisy, make_args, collator):
    tracker = ForgetTracker(record_steps=2)
    args = make_args(save_strategy="steps", save_steps=2, save_total_limit=1)
    Trainer(tiny_llama(), args, train_dataset=noisy, data_collator=collator, callbacks=[tracker]).train()
    assert [record.step for record in Trace.open(tracker.trace.folder).records()] == [0, 2, 4, 6, 8, 10, 12]


def test_two_trackers_in_one_trainer(noisy, safety, make_args, collator):
    """One tracker adopts the training set, the other tracks given rows."""
    adopting, other = ForgetTracker(), ForgetTracker(safety, trace_dir=make_args("other").output_dir)
    model = tiny_llama()
    Trainer(model, make_args(), train_dataset=noisy, data_collator=collator, callbacks=[adopting, other]).train()
    assert adopting.trace.records() == [Record("noisy", 0), Record("noisy", 12)]
    assert other.trace.records() == [Record("safety", 0), Record("safety", 12)]
    for tracker, rows in ((adopting, noisy), (other, safety)):
        np.testing.assert_allclose(tracker.trace.losses()[0], reference_means(tiny_llama(), rows), rtol=1e-5)
        np.testing.assert_allclose(tracker.trace.losses()[1], reference_means(model.eval(), rows), rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_length": "64"}, "max_length='64' must be a whole number of at least 2"),
        ({"max_length": 64.5}, "max_length=64.5 must be a whole number of at least 2"),
        ({"max_length": 1}, "max_length=1 must be a whole number of at least 2"),
        ({"max_length": True}, "max_length=True must be a whole number of at least 2"),
        ({"batch_tokens": 10.5}, "batch_tokens=10.5 must be a whole number of at least 1"),
        ({"max_new_tokens": "8", "rouge1": True}, "max_new_tokens='8' must be a whole number of at least 1"),
        ({"max_new_tokens": 8}, "max_new_tokens=8 has an effect only with rouge1=True"),
        ({"record_steps": True}, "record_steps=True is invalid"),
        ({"stop_early": "no"}, "stop_early='no' must be True or False"),
        ({"rouge1": 1}, "rouge1=1 must be True or False"),
        ({"raise_on_disk_error": None}, "raise_on_disk_error=None must be True or False"),
        ({"noisy": "noisy.jsonl"}, "`noisy` must be a dataset or a list of rows, but it is str"),
        ({"noisy": []}, "`noisy` has no rows"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_when_the_tracker_is_created(wrong, message):
    with pytest.raises(ValueError, match=message):
        ForgetTracker(**wrong)


def test_whole_numbers_of_numpy_are_accepted():
    tracker = ForgetTracker(max_length=np.int64(64), batch_tokens=np.int32(2048), record_steps=np.float64(0.25))
    assert (tracker.max_length, tracker.batch_tokens, tracker.record_steps) == (64, 2048, 0.25)
