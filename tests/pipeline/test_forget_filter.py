"""ForgetFilter: all sessions as one object."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from helpers import random_rows, tiny_llama
from transformers import TrainerCallback

from forgetfilter_callback import FilterConfig, ForgetFilter, ForgetTracker, encode_rows
from forgetfilter_callback.callbacks import session_rows
from forgetfilter_callback.data.encoded_dataset import EncodedDataset
from forgetfilter_callback.trace.records import Record


class Steps(TrainerCallback):
    """Count the steps of all sessions; raise KeyboardInterrupt after `last` steps."""

    def __init__(self, last: int | None = None):
        self.count, self.last = 0, last

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1
        if self.count == self.last:
            raise KeyboardInterrupt


def run_of(noisy, safety, args, collator, **settings) -> ForgetFilter:
    filter_config = FilterConfig(fraction=0.25)
    return ForgetFilter(
        tiny_llama, noisy, safety, args, data_collator=collator, filter_config=filter_config, **settings
    )


def test_callbacks_see_all_three_sessions(noisy, safety, make_args, collator):
    steps = Steps()
    run = run_of(noisy, safety, make_args(), collator, callbacks=[steps])
    run.finetune()
    assert steps.count == 12
    run.safety_finetune()
    assert steps.count == 12 + 6
    trainer = run.refit()
    assert steps.count == 12 + 6 + trainer.state.max_steps and trainer.filter_result.counts["removed"] == 6


@pytest.mark.parametrize("last", [9, 12 + 5], ids=["noisy", "safety"])
def test_an_interrupted_session_resumes(last, noisy, safety, make_args, collator):
    whole = run_of(noisy, safety, make_args("whole"), collator)
    whole.finetune()
    whole.safety_finetune()
    run = run_of(
        noisy, safety, make_args("cut", save_strategy="steps", save_steps=4), collator, callbacks=[Steps(last)]
    )
    if last < 12:
        with pytest.raises(KeyboardInterrupt):
            run.finetune()
        run.finetune(resume_from_checkpoint=True)
        run.safety_finetune()
    else:
        run.finetune()
        with pytest.raises(KeyboardInterrupt):
            run.safety_finetune()
        run.safety_finetune(resume_from_checkpoint=True)
    trace = run.tracker.trace
    assert trace.records() == [Record("noisy", 0), Record("noisy", 12), Record("safety", 0), Record("safety", 6)]
    np.testing.assert_array_equal(trace.losses(), whole.tracker.trace.losses())


def test_the_sessions_are_not_guessed(noisy, safety, make_args, collator):
    """By its rows, this safety set would be the noisy session, and the tracked rows are not those of `noisy`."""
    anchored = Dataset.from_list(safety.to_list() + noisy.to_list())
    run = run_of(noisy, anchored, make_args(), collator)
    run.finetune()
    run.safety_finetune()
    assert [entry["session"] for entry in run.tracker.trace.manifest["sessions"]] == ["noisy", "safety"]
    assert [record.session for record in run.tracker.trace.records()] == ["noisy", "noisy", "safety", "safety"]
    named = run_of(noisy, safety, make_args("named"), collator, tracker=ForgetTracker(random_rows(9, seed=5)))
    named.finetune()
    assert named.tracker.trace.records() == [Record("noisy", 0), Record("noisy", 12)]


def test_filter_settings_outside_filter_config_are_named(noisy, safety, make_args):
    run = ForgetFilter(tiny_llama, noisy, safety, make_args(), threshold=0.5)
    with pytest.raises(TypeError, match=r"`filter_config=FilterConfig\(threshold=0\.5\)`"):
        run.finetune()


def test_encoded_rows_are_kept_once(noisy, safety, make_args, collator, tmp_path, monkeypatch):
    """Trainer and trace use the arrays of the rows, also in a run that continues the trace."""
    rows, read = encode_rows(noisy), []
    original = session_rows.encode_collated
    monkeypatch.setattr(session_rows, "encode_collated", lambda *args: read.append(args[0]) or original(*args))
    for name in ("first", "again"):
        tracker = ForgetTracker(trace_dir=tmp_path / "trace")
        run = run_of(EncodedDataset(rows), safety, make_args(name), collator, tracker=tracker)
        run.finetune()
        kept = run.tracker.trace.rows
        assert run.noisy.rows is rows and kept.tokens is rows.tokens and kept.loss_mask is rows.loss_mask
        assert len(read) == 1  # the training set is read once to find and check its rows
        read.clear()
