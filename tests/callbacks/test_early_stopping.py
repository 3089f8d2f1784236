"""Safety finetuning stops when the ranking of the samples no longer changes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from helpers import random_rows, reference_means, tiny_llama
from transformers import Trainer, TrainerCallback

from forgetfilter_callback import ForgetTracker, Trace, encode_rows
from forgetfilter_callback.callbacks import early_stopping
from forgetfilter_callback.callbacks import tracker as tracker_module
from forgetfilter_callback.callbacks.early_stopping import RankingMonitor
from forgetfilter_callback.errors import TraceError
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


def ranking(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(24).astype(float)


@pytest.mark.parametrize(
    ("seeds", "spread", "stops_at"),
    [
        # Checks after 4, 6, 8, 12, 16 and 24 steps.
        ([0, 1, 0, 1, 2, 3], 1.0, 12),  # 8 agrees with 4, and 12 with 6; 6 has no check at half its step
        ([0, 1, 2, 1, 2, 1], 1.0, 16),  # 12 agrees with 6, and 16 with 8; consecutive checks never agree
        ([0, 1, 0, 2, 0, 3], 1.0, None),  # 8 agrees with 4, and 16 with 8, but no two consecutive checks do
        ([0, 1, 2, 3, 4, 5], 1.0, None),
        ([1] * 6, 0.001, None),  # always the same ranking, but almost nothing is forgotten
    ],
)
def test_the_safety_session_stops_when_the_ranking_is_stable(
    seeds, spread, stops_at, noisy, safety, make_args, collator, monkeypatch, caplog
):
    """The losses at each check are simulated; training is real."""
    caplog.set_level(logging.INFO, logger="forgetfilter_callback")
    model = tiny_llama()
    tracker = ForgetTracker(noisy, stop_early=True)
    checks = iter(seeds)

    def simulated_losses(model, rows, *args, **kwargs):
        values = spread * ranking(next(checks))[: len(rows)]
        return np.repeat(values, np.diff(rows.loss_offsets)).astype(np.float32)

    monkeypatch.setattr(tracker_module, "token_losses", simulated_losses)
    monkeypatch.setattr(RankingMonitor, "__init__", before_is_zero)
    args = make_args(max_steps=25)
    trainer = Trainer(model, args, train_dataset=safety, data_collator=collator, callbacks=[tracker])
    trainer.train()
    assert trainer.state.global_step == (stops_at or 25)
    assert [record.step for record in tracker.trace.records()] == [0, stops_at or 25]
    message = f"The ranking of forgetting is stable. The safety session stops at step {stops_at} of 25."
    logged = [(entry.levelname, entry.getMessage().removeprefix("[RANK 0] ")) for entry in caplog.records]
    logged = [entry for entry in logged if "is stable" in entry[1]]
    assert logged == ([("INFO", message)] if stops_at is not None else [])
    np.testing.assert_allclose(tracker.trace.losses()[-1], reference_means(model.eval(), noisy), rtol=1e-5)


def before_is_zero(self, trace, step, __init__=RankingMonitor.__init__):
    __init__(self, trace, step)
    self._losses_before[:] = 0


def test_no_check_before_the_learning_rate_has_warmed_up(noisy, safety, make_args, collator):
    tracker = ForgetTracker(noisy, stop_early=True)
    args = make_args(max_steps=15, warmup_steps=7)
    Trainer(tiny_llama(), args, train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
    checks = json.loads((tracker.trace.folder / "early_stopping.json").read_text())
    assert [check["step"] for check in checks] == [4, 6]  # after steps 11 and 13


@pytest.mark.parametrize(("count", "expected_count"), [(24, 20), (210, 21)])
def test_monitored_samples_depend_on_their_ids_only(make_args, collator, count, expected_count):
    rows = random_rows(count, seed=4)
    monitored = []
    for order in (np.arange(count), np.random.default_rng(0).permutation(count)):
        tracker = ForgetTracker(rows.select(order), trace_dir=make_args(f"order-{order[0]}").output_dir)
        args = make_args(max_steps=1)
        Trainer(tiny_llama(), args, train_dataset=random_rows(4), data_collator=collator, callbacks=[tracker]).train()
        monitor = RankingMonitor(tracker.trace, 0)
        monitored.append(set(monitor.rows.ids.to_pylist()))
        expected = reference_means(tiny_llama(), rows)
        place = {sample: index for index, sample in enumerate(encode_rows(rows).ids.to_pylist())}
        np.testing.assert_allclose(
            monitor._losses_before,
            [expected[place[sample]] for sample in monitor.rows.ids.to_pylist()],
            rtol=1e-5,
        )
    assert len(monitored[0]) == expected_count and monitored[0] == monitored[1]


def test_at_most_128_samples_are_monitored():
    monitored = early_stopping.monitored_samples
    assert (monitored(12), monitored(1270), monitored(1290), monitored(10**6)) == (12, 127, 128, 128)


def test_an_interrupted_safety_session_does_not_stop_the_next_session(noisy, safety, make_args, collator):
    tracker = ForgetTracker(noisy, stop_early=True, trace_dir=make_args("t").output_dir)
    monitors = []

    class Interrupted(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            monitors.append(tracker._ranking_monitor)
            if args.max_steps == 7 and state.global_step == 5:
                raise KeyboardInterrupt

    callbacks = [tracker, Interrupted()]
    with pytest.raises(KeyboardInterrupt):
        Trainer(
            tiny_llama(), make_args(max_steps=7), train_dataset=safety, data_collator=collator, callbacks=callbacks
        ).train()
    assert len(monitors) == 5 and None not in monitors
    args = make_args("noisy")
    Trainer(tiny_llama(), args, train_dataset=noisy, data_collator=collator, callbacks=callbacks).train()
    assert tracker.trace.records()[0].session != "safety" and monitors[5:] == [None] * 12


def test_ranking_checks_continue_after_resuming(noisy, safety, make_args, collator):
    def run(folder, **kwargs):
        tracker = ForgetTracker(noisy, stop_early=True, trace_dir=make_args(folder).output_dir + "-trace")
        args = make_args(folder, max_steps=17, save_strategy="steps", save_steps=8)
        model = tiny_llama()
        trainer = Trainer(model, args, train_dataset=safety, data_collator=collator, callbacks=[tracker])
        trainer.train(**kwargs)
        return (tracker.trace.folder / "early_stopping.json").read_text()

    whole = run("out")
    assert [check["step"] for check in json.loads(whole)] == [4, 6, 8, 12, 16]  # the last check is past the checkpoint
    assert run("out", resume_from_checkpoint=make_args("out").output_dir + "/checkpoint-8") == whole
    superseded = Path(make_args("out").output_dir + "-trace") / "superseded"
    assert [file.read_text() for file in superseded.rglob("early_stopping.json")] == [whole]


def test_a_session_that_starts_again_keeps_its_old_checks(noisy, safety, make_args, collator):
    folder = Path(make_args("trace").output_dir)
    old = []
    for seed in range(3):
        tracker = ForgetTracker(noisy, stop_early=True, trace_dir=folder)
        args = make_args(max_steps=5)
        Trainer(tiny_llama(seed), args, train_dataset=safety, data_collator=collator, callbacks=[tracker]).train()
        old.append((folder / "early_stopping.json").read_text())
    assert len(set(old)) == 3
    kept = {file.read_text() for file in (folder / "superseded").rglob("early_stopping.json")}
    assert kept == set(old[:2])


@pytest.mark.parametrize("not_finite", [np.inf, np.nan])
def test_a_sample_without_a_finite_loss_does_not_keep_the_session_running(not_finite, tmp_path):
    rows = encode_rows(random_rows(24), disable_tqdm=True)
    losses = np.ones(rows.loss_offsets[-1], np.float32)
    smallest_id = int(np.argmin(rows.ids.to_pylist()))
    losses[rows.loss_offsets[smallest_id]] = not_finite
    trace = Trace.create(tmp_path / "trace", rows, "a model", None, None)
    trace.append(Record("safety", 0), [Scores(losses)])
    monitor = RankingMonitor(trace, 0)
    assert len(monitor.rows) == 20
    losses = np.repeat(ranking(1)[:20], np.diff(monitor.rows.loss_offsets)).astype(np.float32)
    assert [monitor.check(step, losses) for step in (4, 6, 8, 12)] == [False, False, False, True]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'[{"step": 4, "spearman": nu',
        b"\xff",
        b"null",
        b"[7]",
        b'{"step": 4}',
        b'[{"step": 4, "spearman": null}]',
        b'[{"step": "4", "spearman": null, "forgetting": [1.0]}]',
        b'[{"step": 4, "spearman": "high", "forgetting": [1.0]}]',
        b'[{"step": 4, "spearman": null, "forgetting": 1.0}]',
        b'[{"step": 4, "spearman": null, "forgetting": ["much"]}]',
    ],
    ids=str,
)
def test_damaged_checks_are_refused_with_a_sentence(content, tmp_path):
    rows = encode_rows(random_rows(24), disable_tqdm=True)
    trace = Trace.create(tmp_path / "trace", rows, "a model", None, None)
    trace.append(Record("safety", 0), [Scores(np.ones(rows.loss_offsets[-1], np.float32))])
    file = trace.folder / "early_stopping.json"
    file.write_bytes(content)
    with pytest.raises(TraceError) as error:
        RankingMonitor(trace, 8)
    assert str(error.value).startswith(f"{file} is damaged (") and "Move it to another folder" in str(error.value)
    assert file.read_bytes() == content
    file.unlink()
    assert not RankingMonitor(trace, 8).check(4, np.ones(RankingMonitor(trace, 8).rows.loss_offsets[-1], np.float32))


@pytest.mark.parametrize(("samples", "warnings"), [(19, 1), (20, 0)])
def test_too_few_samples_to_stop_early_are_reported_once(samples, warnings, safety, make_args, collator, caplog):
    rows = random_rows(samples, seed=1)
    tracker = ForgetTracker(rows, session="safety", stop_early=True)
    trainer = Trainer(
        tiny_llama(), make_args(max_steps=13), train_dataset=safety, data_collator=collator, callbacks=[tracker]
    )
    trainer.train()
    message = "`stop_early` has no effect: 19 of 19 rows have a finite loss, and a ranking of fewer than 20"
    assert caplog.text.count(message) == warnings
