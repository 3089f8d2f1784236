"""`ForgetTracker(session=...)`, and runs whose session must be guessed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import random_rows, run_both, tiny_llama, train_tracked
from trace_helpers import record_files
from transformers import PrinterCallback, Trainer

from forgetfilter_callback import ForgetTracker, Trace
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.trace.records import Record


@pytest.fixture
def train(make_args, collator):
    """A function that trains a model with a tracker and returns the model."""

    def train(rows, tracker, model=None, folder="out", **overrides):
        model = model if model is not None else tiny_llama()
        Trainer(
            model, make_args(folder, **overrides), train_dataset=rows, data_collator=collator, callbacks=[tracker]
        ).train()
        return model

    return train


def all_files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def test_a_safety_set_with_anchors_in_a_second_job_is_the_safety_session(train, caplog):
    noisy = random_rows(16, seed=1)
    anchored = Dataset.from_list(random_rows(16, seed=2).to_list() + noisy.select(range(8)).to_list())
    first = ForgetTracker()
    model = train(noisy, first)
    old = record_files(first.trace.folder)
    assert sorted(old) == ["records/noisy-00000000.parquet", "records/noisy-00000008.parquet", "rows.parquet"]
    second = ForgetTracker(trace_dir=first.trace.folder)
    train(anchored, second, model, "safety")
    assert second.trace.records() == [Record("noisy", 0), Record("noisy", 8), Record("safety", 0), Record("safety", 12)]
    new = record_files(first.trace.folder)
    assert {name: new[name] for name in old} == old
    assert not (first.trace.folder / "superseded").exists()
    assert "8 of 24 rows are in both the safety set and the noisy set." in caplog.text


@pytest.mark.parametrize(
    ("trained_on", "guess", "requested"), [("safety", "safety", "noisy"), ("noisy", "noisy", "safety")]
)
def test_a_requested_session_overrides_the_guess(trained_on, guess, requested, noisy, safety, train):
    rows = {"noisy": noisy, "safety": safety}[trained_on]
    for argument, expected in (("auto", guess), (requested, requested)):
        tracker = ForgetTracker(noisy, session=argument)
        train(rows, tracker, folder=argument)
        assert {record.session for record in tracker.trace.records()} == {expected}
        assert len(tracker.trace.records()) == 2
        assert [entry["session"] for entry in tracker.trace.manifest["sessions"]] == [expected]


def test_an_unknown_session_is_refused(noisy):
    with pytest.raises(ValueError, match=r"session='S1' is unknown\. Choose 'auto', 'noisy' or 'safety'"):
        ForgetTracker(noisy, session="S1")


def test_a_guess_never_replaces_noisy_records(noisy, train):
    first = ForgetTracker()
    model = train(noisy, first)
    folder = first.trace.folder
    old = all_files(folder)
    mostly_noisy = Dataset.from_list(noisy.select(range(20)).to_list() + random_rows(2, seed=5).to_list())
    message = (
        r"already has records of the noisy session, and it is not certain that this run repeats it: it trains on other "
        r"rows, with 20 of 24 tracked rows among them\. Pass `ForgetTracker\(session='noisy'\)` or "
        r"`ForgetTracker\(session='safety'\)`"
    )
    with pytest.raises(TraceError, match=message):
        train(mostly_noisy, ForgetTracker(trace_dir=folder), model, "again")
    assert all_files(folder) == old
    safety = ForgetTracker(trace_dir=folder, session="safety")
    train(mostly_noisy, safety, model, "safety")
    steps = [Record("noisy", 0), Record("noisy", 12), Record("safety", 0), Record("safety", 12)]
    assert safety.trace.records() == steps
    old = record_files(folder / "records")
    again = ForgetTracker(trace_dir=folder, session="noisy")
    train(mostly_noisy, again, tiny_llama(seed=1), "noisy")
    assert again.trace.records() == steps[:2]
    assert record_files(folder / "superseded" / "1") == old


@pytest.mark.parametrize("with_folder", [False, True])
def test_the_safety_session_needs_to_know_the_noisy_set(with_folder, safety, make_args, train):
    folder = Path(make_args("trace").output_dir)
    tracker = ForgetTracker(session="safety", trace_dir=folder if with_folder else None)
    with pytest.raises(TraceError, match=r"does not know the noisy set. Pass its rows, `ForgetTracker\(noisy, "):
        train(safety, tracker)
    assert not Trace.exists(folder) and not Trace.exists(Path(make_args().output_dir) / "_forgetfilter")


def test_the_tracker_logs_its_sessions_and_prints_nothing(noisy, safety, make_args, collator, capsys, caplog):
    caplog.set_level(logging.INFO, logger="forgetfilter_callback")
    model, tracker = tiny_llama(), ForgetTracker(record_steps=2, stop_early=True)
    for folder, rows in (("noisy", noisy), ("safety", safety)):
        args = make_args(folder)
        trainer = Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[tracker])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    assert capsys.readouterr().out == ""
    assert {record.levelname for record in caplog.records} == {"INFO"}
    messages = [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]
    sessions = [message.partition(" Up to ")[0] for message in messages if message.startswith("ForgetTracker:")]
    assert sessions == [
        "ForgetTracker: noisy session. It trains on 24 of 24 tracked rows.",
        "ForgetTracker: safety session. It trains on none of the 24 tracked rows, as it should.",
    ]
    assert ["Up to 1 check for early stopping: each measures 20 rows." in message for message in messages[:2]] == [
        False,
        True,
    ]  # of the ranking


def test_without_logging_at_info_level_the_tracker_is_silent(noisy, safety, make_args, collator, caplog):
    logging.getLogger("forgetfilter_callback").setLevel(logging.NOTSET)  # the command line sets it to INFO
    run_both(tiny_llama(), noisy, safety, make_args, collator, ForgetTracker())
    assert [record.getMessage() for record in caplog.records if "ForgetTracker" in record.getMessage()] == []


def test_a_guessed_session_can_be_resumed(make_args, collator, tmp_path):
    noisy = random_rows(16, seed=1)
    rows = Dataset.from_list(random_rows(4, seed=2).to_list() + noisy.to_list())
    args = make_args("out", save_strategy="steps", save_steps=5)
    tracker = ForgetTracker(noisy, trace_dir=tmp_path / "trace")
    Trainer(tiny_llama(), args, train_dataset=rows, data_collator=collator, callbacks=[tracker]).train()
    before = record_files(tracker.trace.folder)
    assert tracker.trace.records() == [Record("noisy", 0), Record("noisy", 10)]
    resumed = ForgetTracker(noisy, trace_dir=tmp_path / "trace")
    trainer = Trainer(tiny_llama(), args, train_dataset=rows, data_collator=collator, callbacks=[resumed])
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert resumed.trace.records() == [Record("noisy", 0), Record("noisy", 10)]
    assert (
        record_files(resumed.trace.folder)["superseded/1/noisy-00000010.parquet"]
        == before["records/noisy-00000010.parquet"]
    )


def test_a_guess_never_replaces_safety_records(noisy, safety, train):
    first = ForgetTracker()
    model = train(noisy, first)
    folder = first.trace.folder
    train(safety, ForgetTracker(trace_dir=folder), model, "safety")
    old = all_files(folder)
    unrelated = random_rows(8, seed=7)
    with pytest.raises(TraceError, match="already has records of the safety session, and it is not certain"):
        train(unrelated, ForgetTracker(trace_dir=folder), model, "downstream")
    assert all_files(folder) == old
    train(unrelated, ForgetTracker(trace_dir=folder, session="safety"), model, "downstream")
    assert sorted((folder / "superseded" / "1").iterdir()) == [
        folder / "superseded" / "1" / name for name in ("safety-00000000.parquet", "safety-00000006.parquet")
    ]


@pytest.mark.parametrize("resumed", [False, True])
def test_the_output_folder_of_a_session_does_not_identify_it(resumed, noisy, safety, make_args, collator, train):
    folder = make_args("trace").output_dir
    train(safety, ForgetTracker(noisy, trace_dir=folder, record_steps=1), save_strategy="steps", save_steps=2)
    old = all_files(Path(folder))
    unrelated = random_rows(12, seed=7)
    args = make_args()
    trainer = Trainer(
        tiny_llama(), args, train_dataset=unrelated, data_collator=collator,
        callbacks=[ForgetTracker(noisy, trace_dir=folder)],
    )  # fmt: skip
    verb = "resumes" if resumed else "repeats"
    with pytest.raises(
        TraceError, match=f"it is not certain that this run {verb} it: it trains on other rows, with 0 of"
    ):
        trainer.train(resume_from_checkpoint=args.output_dir + "/checkpoint-2" if resumed else None)
    assert all_files(Path(folder)) == old


@pytest.mark.parametrize("in_order", [True, False])
def test_the_same_safety_set_repeats_the_session_in_any_folder(in_order, noisy, safety, make_args, train):
    folder = make_args("trace").output_dir
    train(safety, ForgetTracker(noisy, trace_dir=folder))
    old = record_files(Path(folder) / "records")
    rows = safety if in_order else safety.shuffle(seed=1)
    train(rows, ForgetTracker(noisy, trace_dir=folder), folder="elsewhere")
    assert record_files(Path(folder) / "superseded" / "1") == old


class Rows(torch.utils.data.IterableDataset):
    """A stream, whose rows cannot be encoded."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_a_streamed_safety_session_is_resumed_but_not_repeated(noisy, safety, make_args, collator):
    folder = Path(make_args("trace").output_dir)

    def trainer(**overrides):
        args = make_args(max_steps=4, save_strategy="steps", save_steps=2, **overrides)
        return Trainer(
            tiny_llama(), args, train_dataset=Rows(safety.to_list()), data_collator=collator,
            callbacks=[ForgetTracker(noisy, trace_dir=folder, record_steps=1)],
        )  # fmt: skip

    trainer().train()
    old = record_files(folder)
    for overrides, checkpoint in (({}, None), ({"output_dir": str(folder / "other")}, folder / "../out/checkpoint-2")):
        with pytest.raises(TraceError, match=r"it is not certain that this run .* it: its rows could not be encoded"):
            trainer(**overrides).train(checkpoint if checkpoint is None else str(checkpoint))
        assert record_files(folder) == old
    with pytest.raises(
        TraceError, match="it trains on rows that cannot be compared with those of the earlier run, with 0"
    ):
        train_tracked(safety, make_args, collator, ForgetTracker(noisy, trace_dir=folder))
    trainer().train(str(folder / "../out/checkpoint-2"))
    assert record_files(folder / "superseded" / "1") == {
        name.removeprefix("records/"): old[name] for name in old if name.endswith(("3.parquet", "4.parquet"))
    }
