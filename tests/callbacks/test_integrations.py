"""Metrics of each record in the trainer's log, TensorBoard, MLflow and W&B, without losing the trainer's own entries."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import random_rows, texts, tiny_llama
from sklearn.metrics import f1_score, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback

from forgetfilter_callback import ForgetTracker, Trace, encode_rows, find_forgotten
from forgetfilter_callback.callbacks import integrations
from forgetfilter_callback.callbacks.integrations import most_forgotten_rows, summarize_forgetting
from forgetfilter_callback.errors import DataError
from forgetfilter_callback.filtering.thresholds import find_threshold
from forgetfilter_callback.trace.records import Record


@pytest.fixture
def noisy():
    rows = random_rows(24, seed=1)
    return rows.add_column("unsafe", [index % 3 == 0 for index in range(len(rows))])


def train_both(noisy, safety, make_args, collator, tracker, **overrides):
    model, histories = tiny_llama(), []
    for folder, rows in (("noisy", noisy), ("safety", safety)):
        args = make_args(folder, **overrides)
        trainer = Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[tracker])
        trainer.train()
        histories.append(trainer.state.log_history)
    return histories


def test_every_record_is_in_the_log_history(noisy, safety, make_args, collator):
    tracker = ForgetTracker(noisy, record_steps=3)
    tracked = [
        [entry for entry in history if "forgetfilter/loss" in entry]
        for history in train_both(noisy, safety, make_args, collator, tracker)
    ]
    losses, records = tracker.trace.losses(), tracker.trace.records()
    assert [entry["step"] for entry in tracked[0] + tracked[1]] == [record.step for record in records]
    np.testing.assert_allclose([entry["forgetfilter/loss"] for entry in tracked[0] + tracked[1]], losses.mean(1))
    start = len(tracked[0])
    rises = [entry.get("forgetfilter/loss_rise") for entry in tracked[0] + tracked[1]]
    assert rises[: start + 1] == [None] * (start + 1)
    np.testing.assert_allclose(rises[start + 1 :], (losses[start + 1 :] - losses[start]).mean(1), rtol=1e-5)
    assert set(tracked[1][-1]) == {"forgetfilter/loss", "forgetfilter/loss_rise", "epoch", "step"}


def test_forgetting_is_computed_once_at_the_end_of_the_safety_session(noisy, safety, make_args, collator, monkeypatch):
    steps, compute = [], integrations.compute_forgetting
    monkeypatch.setattr(
        integrations,
        "compute_forgetting",
        lambda trace, *args: (steps.append(trace.records()[-1].step), compute(trace, *args))[1],
    )
    tracker = ForgetTracker(noisy, record_steps=2, audit_column="unsafe")
    histories = train_both(noisy, safety, make_args, collator, tracker)
    assert steps == [6]
    monkeypatch.undo()

    assert not any("forgetfilter/forgetting" in entry for entry in histories[0])
    (end,) = (entry for entry in histories[1] if "forgetfilter/forgetting" in entry)
    assert end["step"] == 6
    unsafe, values = np.array(noisy["unsafe"]), tracker.trace.forgetting()
    result = find_forgotten(tracker.trace)
    assert end["forgetfilter/forgetting"] == pytest.approx(values.mean())
    phi = find_threshold(values, "combined").threshold
    assert end["forgetfilter/fraction_above_threshold"] == pytest.approx((values > phi).mean())
    assert end["forgetfilter/auroc"] == pytest.approx(roc_auc_score(unsafe, values))
    assert end["forgetfilter/f1"] == pytest.approx(f1_score(unsafe, result.removed, zero_division=0.0))


class StopAfterTwoSteps(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == 2


@pytest.mark.parametrize("record_steps", [None, 2])
def test_forgetting_is_logged_if_another_callback_stops_training(noisy, safety, make_args, collator, record_steps):
    tracker, model = ForgetTracker(noisy, record_steps=record_steps), tiny_llama()
    for folder, rows in (("noisy", noisy), ("safety", safety)):
        trainer = Trainer(
            model,
            make_args(folder),
            train_dataset=rows,
            data_collator=collator,
            callbacks=[tracker, StopAfterTwoSteps()],
        )
        trainer.train()
    (end,) = (entry for entry in trainer.state.log_history if "forgetfilter/forgetting" in entry)
    assert (end["step"], end["forgetfilter/forgetting"]) == (2, pytest.approx(tracker.trace.forgetting().mean()))


def test_a_resumed_safety_session_logs_the_rise_since_its_start(noisy, safety, make_args, collator, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    train_both(noisy, safety, make_args, collator, ForgetTracker(noisy, trace_dir=tmp_path / "trace"), **settings)
    tracker = ForgetTracker(noisy, session="safety", trace_dir=tmp_path / "trace")
    trainer = Trainer(
        tiny_llama(), make_args("safety", **settings), train_dataset=safety, data_collator=collator, callbacks=[tracker]
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "safety" / "checkpoint-4"))
    rises = {entry["step"]: entry["forgetfilter/loss_rise"] for entry in trainer.state.log_history
             if "forgetfilter/loss_rise" in entry}  # fmt: skip
    losses = tracker.trace.losses()
    assert rises == {6: pytest.approx((losses[-1] - losses[-2]).mean(), rel=1e-5)}


def test_the_f1_metric_is_0_if_nothing_can_be_separated():
    values, unsafe = np.array([0.1, 0.2, 0.3, 1.5, 1.6]), np.array([False, False, False, True, True])
    for nats_per_unit, f1 in ((1.2, 1.0), (0.2, 0.0)):
        figures = summarize_forgetting(values, nats_per_unit, unsafe)
        assert figures["forgetfilter/f1"] == f1 and figures["forgetfilter/auroc"] == 1.0


def test_tensorboard_receives_the_metrics_and_the_trainer_logs(noisy, safety, make_args, collator, tmp_path):
    histories = train_both(noisy, safety, make_args, collator, ForgetTracker(), report_to="tensorboard")
    seen: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((tmp_path / "safety").rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            seen.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    expected = [(entry["step"], entry["forgetfilter/loss"]) for entry in histories[1] if "forgetfilter/loss" in entry]
    assert [tag for tag in seen if "forgetfilter" in tag] != []
    (tag,) = (tag for tag in seen if tag.endswith("forgetfilter/loss"))
    assert [step for step, _ in seen[tag]] == [step for step, _ in expected] == [0, 6]
    np.testing.assert_allclose([value for _, value in seen[tag]], [value for _, value in expected], rtol=1e-5)
    assert len(seen["train/loss"]) == sum("loss" in entry for entry in histories[1]) == 6


def expected_histograms(trace):
    """By tag and step: loss rises at each record of the safety session but the first, and forgetting at its end."""
    losses, records = trace.losses(), trace.records()
    start = records.index(Record("safety", 0))
    rises = {
        ("forgetfilter/loss_rise_histogram", record.step): losses[index] - losses[start]
        for index, record in enumerate(records)
        if record.session == "safety" and record.step
    }
    return rises | {("forgetfilter/forgetting_histogram", records[-1].step): trace.forgetting()}


def test_tensorboard_receives_the_histograms(noisy, safety, make_args, collator, tmp_path):
    tracker = ForgetTracker(record_steps=3)
    histories = train_both(noisy, safety, make_args, collator, tracker, report_to="tensorboard")
    seen = {}
    for file in (tmp_path / "safety").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={"histograms": 0})  # all of them
        events.Reload()
        for tag in events.Tags()["histograms"]:
            seen |= {(tag, event.step): event.histogram_value for event in events.Histograms(tag)}
    expected = expected_histograms(tracker.trace)
    assert len(expected) == 3 and set(seen) == set(expected)
    for key, histogram in seen.items():
        values = expected[key]
        figures = (histogram.num, histogram.min, histogram.max, histogram.sum)
        assert figures == pytest.approx((len(values), values.min(), values.max(), values.sum()), abs=1e-9)
    assert not any("histogram" in name for history in histories for entry in history for name in entry)


def test_a_missing_audit_column_is_refused(noisy):
    with pytest.raises(DataError, match="audit_column='toxic' must be a column of `noisy`, but row 0 has"):
        ForgetTracker(noisy, audit_column="toxic")
    with pytest.raises(ValueError, match="audit_column='unsafe' must be a column of `noisy`, but no rows were given"):
        ForgetTracker(audit_column="unsafe")


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield LABELED


LABELED = {"input_ids": [1, 2], "unsafe": True}


@pytest.mark.parametrize(
    ("noisy", "message"),
    [
        (iter([LABELED]), "`noisy` must be a dataset or a list of rows, but it is list_iterator"),
        ((row for row in [LABELED]), "`noisy` must be a dataset or a list of rows, but it is generator"),
        (Stream(), r"audit_column='unsafe' needs the rows in a fixed order, but `noisy` is a stream \(Stream\)"),
        (Dataset.from_list([LABELED]).to_iterable_dataset(), r"`noisy` is a stream \(IterableDataset\)"),
        ([], "`noisy` has no rows"),
        ([LABELED, {"input_ids": [1]}], r"but row 1 has \['input_ids'\]"),
        ([[1, 2]], "but row 0 is list"),
        (
            [LABELED, LABELED | {"unsafe": "no"}],
            "The column 'unsafe' must hold true/false or numbers .* but row 1 holds 'no'",
        ),
    ],
)
def test_rows_without_audit_labels_are_refused(noisy, message):
    with pytest.raises(ValueError, match=message):
        ForgetTracker(noisy, audit_column="unsafe")


def test_mlflow_receives_the_metrics_and_the_trainer_logs(noisy, safety, make_args, collator, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    histories = train_both(noisy, safety, make_args, collator, ForgetTracker(), report_to="mlflow")
    client = mlflow.MlflowClient()
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    for name in ("forgetfilter/loss", "loss"):
        found = [metric for run in runs for metric in client.get_metric_history(run.info.run_id, name)]
        expected = [(entry["step"], entry[name]) for history in histories for entry in history if name in entry]
        np.testing.assert_allclose(sorted((each.step, each.value) for each in found), sorted(expected))


@pytest.fixture
def wandb_logs(tmp_path, monkeypatch):
    """What is logged to a run that is not sent anywhere."""
    wandb = pytest.importorskip("wandb")
    logged = []
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(dir=tmp_path, mode="offline") as run:
        log = run.log
        monkeypatch.setattr(wandb, "log", lambda figures: (logged.append(figures), log(figures)))
        yield logged


def test_wandb_receives_the_metrics_and_the_trainer_logs(noisy, safety, make_args, collator, wandb_logs):
    logged = wandb_logs
    histories = train_both(noisy, safety, make_args, collator, ForgetTracker(), report_to="wandb")
    ours = [(each["train/global_step"], each["forgetfilter/loss"]) for each in logged if "forgetfilter/loss" in each]
    lines = [entry for history in histories for entry in history]
    assert ours == [(entry["step"], entry["forgetfilter/loss"]) for entry in lines if "forgetfilter/loss" in entry]
    assert sum("train/loss" in each for each in logged) == sum("loss" in entry for entry in lines) > 6


def test_wandb_receives_the_histograms_but_no_texts(noisy, safety, make_args, collator, wandb_logs):
    tracker = ForgetTracker(record_steps=3)
    train_both(noisy, safety, make_args, collator, tracker, report_to="wandb")
    histograms = {
        (name, each["train/global_step"]): value
        for each in wandb_logs
        for name, value in each.items()
        if name.startswith("forgetfilter/") and name.endswith("_histogram")
    }
    expected = expected_histograms(tracker.trace)
    assert len(expected) == 3 and set(histograms) == set(expected)
    for key, histogram in histograms.items():
        assert sum(histogram.histogram) == len(expected[key])
        np.testing.assert_array_equal(histogram.histogram, np.histogram(expected[key], histogram.bins)[0])
    assert not any("forgetfilter/most_forgotten" in each for each in wandb_logs)


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_wandb_receives_a_table_of_the_most_forgotten_rows(make_args, wandb_logs, byte_tokenizer, has_tokenizer):
    noisy_rows = texts(12, seed=1)
    encoded = [encode_rows(rows, byte_tokenizer).as_dataset() for rows in (noisy_rows, texts(8, seed=2))]
    model = tiny_llama(vocab_size=len(byte_tokenizer))
    tracker = ForgetTracker(log_rows=5)
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    for folder, rows in zip(("noisy", "safety"), encoded, strict=True):
        Trainer(
            model,
            make_args(folder, report_to="wandb"),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer if has_tokenizer else None,
            callbacks=[tracker],
        ).train()
    (table,) = (each["forgetfilter/most_forgotten"] for each in wandb_logs if "forgetfilter/most_forgotten" in each)
    values = tracker.trace.forgetting()
    order = np.argsort(-values)[:5].tolist()
    assert table.columns == ["row", "forgetting", "prompt", "completion"]
    assert [row[:2] for row in table.data] == [[row, values[row]] for row in order]
    expected = [[noisy_rows[row]["prompt"], noisy_rows[row]["completion"]] for row in order]
    assert [row[2:] for row in table.data] == (expected if has_tokenizer else [["", ""]] * 5)


def test_the_table_shows_the_last_turn_of_a_row_without_a_prompt(tmp_path, byte_tokenizer):
    rows = encode_rows(
        [{"text": f"<eos>user Why {row}?<eos>assistant No {row}<eos>"} for row in range(3)], byte_tokenizer
    )
    trace = Trace.create(tmp_path / "trace", rows, "tiny", None, None)
    table = most_forgotten_rows(trace, np.arange(3.0), 2, byte_tokenizer)
    assert table == [[2, 2.0, "", "assistant No 2"], [1, 1.0, "", "assistant No 1"]]


def test_a_negative_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="log_rows=-1 must be a whole number of at least 0"):
        ForgetTracker(log_rows=-1)
