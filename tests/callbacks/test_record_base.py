"""`ForgetTracker(record_base=False)`: 32 rows are recorded under the base model, and all rows under the others."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from helpers import (
    call,
    only_in_one_row,
    random_rows,
    reference_means,
    refused,
    run_both,
    run_options,
    texts,
    tiny_llama,
    tiny_lora,
    without_probability,
)
from transformers import Trainer

from forgetfilter_callback import (
    FilterConfig,
    FilteredTrainer,
    ForgetFilter,
    ForgetTracker,
    RunConfig,
    Trace,
    to_dataset,
)
from forgetfilter_callback.callbacks import recorder
from forgetfilter_callback.callbacks.integrations import LoggingIntegrations
from forgetfilter_callback.data import encoded_rows
from forgetfilter_callback.errors import ForgetFilterError, TraceError
from forgetfilter_callback.review.row_features import row_features
from forgetfilter_callback.scoring.token_losses import token_losses
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.trace.validate_trace import validate_trace
from forgetfilter_callback.utils.counted import counted


# 32 of 50 rows at equal distances, the first and the last among them.
SAMPLE = [int(49 * place / 31) for place in range(32)]
BASE = Record("noisy", 0)


@pytest.fixture
def rows():
    return random_rows(50, seed=1)


@pytest.fixture
def train(make_args, collator):
    def train(model, folder, rows, tracker):
        Trainer(model, make_args(folder), train_dataset=rows, data_collator=collator, callbacks=[tracker]).train()
        return tracker.trace

    return train


@pytest.mark.parametrize("window_tokens", [None, 100], ids=["one window", "many windows"])
def test_only_the_base_record_is_limited(window_tokens, rows, safety, make_args, collator, monkeypatch):
    if window_tokens is not None:
        monkeypatch.setattr(encoded_rows, "WINDOW_TOKENS", window_tokens)
    expected = np.full(50, np.nan)
    expected[SAMPLE] = reference_means(tiny_llama().eval(), rows.select(SAMPLE))
    traces = []
    for record_base in (True, False):
        tracker = ForgetTracker(record_base=record_base, trace_dir=make_args(f"trace-{record_base}").output_dir)
        run_both(tiny_llama(), rows, safety, make_args, collator, tracker)
        traces.append(tracker.trace)
    whole, limited = traces
    assert limited.records() == whole.records() == [BASE, Record("noisy", 26), Record("safety", 0), Record("safety", 6)]
    np.testing.assert_allclose(limited.mean_losses(BASE), expected, rtol=1e-5)
    np.testing.assert_array_equal(limited.losses()[1:], whole.losses()[1:])
    np.testing.assert_array_equal(limited.forgetting("combined"), whole.forgetting("combined"))
    assert (len(list(limited.rows.windows())) > 5) == (window_tokens is not None)


def test_no_row_is_reported_that_was_not_recorded(rows, safety, train, caplog, make_args):
    """One of the recorded rows overflows under every model. 18 rows are not recorded under the base model."""
    row, token = only_in_one_row(rows, safety)
    sample = [row, *(index for index in SAMPLE if index != row)]
    shuffled = rows.select([*sample, *(index for index in range(50) if index not in sample)])
    others = shuffled.select(range(1, 50))
    tracker = ForgetTracker(shuffled, record_base=False)
    model = without_probability(tiny_llama(), token)
    trace = train(model, "noisy", others, tracker)
    assert (
        "The loss of 1 of 32 rows is not finite under the model of this record (noisy session, step 0): row 0 "
        in caplog.text
    )
    assert (
        "The loss of 1 of 50 rows is not finite under the model of this record (noisy session, step 26): row 0 "
        in caplog.text
    )
    train(model, "safety", safety, tracker)
    problems, notes = validate_trace(trace.folder)
    tokens = counted(shuffled[0]["labels"][1:].count(token), "token")
    assert problems == []
    assert [note.partition("parquet")[2] for note in notes] == [
        " holds 32 of 50 rows. For all of them, record with `record_base=True`.",
        *[f": the loss of {tokens} is not finite: the model diverged. The rows are kept."] * 4,
    ]


def test_a_set_of_at_most_32_rows_is_recorded_whole(train):
    trace = train(tiny_llama(), "noisy", random_rows(32, seed=1), ForgetTracker(record_base=False))
    assert trace.base_record == BASE
    assert np.isfinite(trace.mean_losses(BASE)).all()


def test_the_mean_loss_of_few_rows_is_not_logged(rows, train, monkeypatch):
    logged = []
    monkeypatch.setattr(LoggingIntegrations, "log_record", lambda self, trace, record, *args: logged.append(record))
    train(tiny_llama(), "noisy", rows, ForgetTracker(record_base=False))
    assert logged == [Record("noisy", 26)]


def test_the_cost_counts_only_records_of_all_rows(rows, train, caplog):
    with caplog.at_level("INFO", logger="forgetfilter_callback"):
        train(tiny_llama(), "noisy", rows, ForgetTracker(record_base=False))
    assert "Up to 1 record: each measures the losses of 50 rows" in caplog.text


def test_training_is_unchanged(rows, safety, make_args, collator):
    untracked, tracked = tiny_llama(), tiny_llama()
    for folder, part in (("noisy", rows), ("safety", safety)):
        Trainer(untracked, make_args(folder), train_dataset=part, data_collator=collator).train()
    run_both(tracked, rows, safety, make_args, collator, ForgetTracker(record_base=False))
    for name, value in untracked.state_dict().items():
        assert torch.equal(value, tracked.state_dict()[name]), name


def test_32_rows_are_scored(rows, train, monkeypatch):
    scored = []

    def counting(model, chosen, *args, **kwargs):
        scored.append(len(chosen))
        return token_losses(model, chosen, *args, **kwargs)

    def all_rows(*args, description, **kwargs):
        raise AssertionError(f"{description} scores all rows")

    monkeypatch.setattr(recorder, "token_losses", counting)
    monkeypatch.setattr(recorder, "window_scores", all_rows)
    with pytest.raises(AssertionError, match="Recording noisy session, step 26 scores all rows"):
        train(tiny_llama(), "noisy", rows, ForgetTracker(record_base=False))
    assert scored == [32]


def both_sessions(rows, safety, train, tracker):
    model = tiny_llama()
    train(model, "noisy", rows, tracker)
    return train(model, "safety", safety, tracker)


def test_relative_forgetting_is_refused(rows, safety, train, make_args):
    trace = both_sessions(rows, safety, train, ForgetTracker(record_base=False))
    assert trace.base_record is None
    with pytest.raises(TraceError, match=r"needs the losses of all rows under the base model.*`record_base=True`"):
        trace.forgetting("relative")
    with pytest.raises(ValueError, match="measure='relative' needs all rows under the base model"):
        RunConfig("m", "n", "s", "o", record_base=False, filter=FilterConfig("relative"))
    tracker, config = ForgetTracker(record_base=False), FilterConfig("relative")
    with pytest.raises(ValueError, match="measure='relative' needs all rows under the base model"):
        ForgetFilter(tiny_llama, rows, safety, make_args(), tracker=tracker, filter_config=config)


def test_outputs_leave_the_base_model_out(rows, safety, train):
    trace = both_sessions(rows, safety, train, ForgetTracker(record_base=False))
    whole = both_sessions(rows, safety, train, ForgetTracker(trace_dir=trace.folder.parent / "whole"))
    table = to_dataset(trace, rows)
    assert table["forgetfilter_loss_base"] == [None] * 50
    np.testing.assert_allclose(table["forgetfilter_loss_noisy"], trace.losses()[1])
    assert row_features(whole).shape[1] - row_features(trace).shape[1] == 2
    problems, notes = validate_trace(trace.folder)
    assert problems == []
    assert [note.partition(" ")[2] for note in notes] == [
        "holds 32 of 50 rows. For all of them, record with `record_base=True`."
    ]
    axes = trace.plot("loss").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["noisy\n26", "safety\n0", "safety\n6"]
    plt.close("all")


def test_the_refit_must_start_from_the_base_model(rows, safety, train, make_args, collator):
    trace = both_sessions(rows, safety, train, ForgetTracker(record_base=False))

    def refit(model):
        config = FilterConfig(fraction=0.25)
        FilteredTrainer(
            model, make_args("f"), train_dataset=rows, data_collator=collator, forgetting=trace, filter_config=config
        ).train()

    trained = tiny_llama()
    train(trained, "trained", rows, ForgetTracker())
    with pytest.raises(ForgetFilterError, match=r"not the base model of the trace\. On 32 rows its mean loss is"):
        refit(trained)
    refit(tiny_llama())


def test_the_safety_session_must_start_from_the_learned_model(rows, safety, train):
    tracker = ForgetTracker(record_base=False)
    trace = train(tiny_llama(), "noisy", rows, tracker)
    base, learned = (losses[SAMPLE].mean() for losses in trace.losses())
    message = (
        f"mean loss of 32 rows of the noisy set: {base:.3f} nats per token before noisy finetuning, {learned:.3f} after it, "
        f"{base:.3f} now"
    )
    with pytest.raises(TraceError, match=message):
        train(tiny_llama(), "safety", safety, tracker)


def test_the_base_model_below_an_adapter_is_limited_too(rows, safety, train):
    """Without a noisy session, the base model is recorded by disabling the adapter."""
    model = tiny_lora()
    train(model, "noisy", rows, ForgetTracker())
    trace = train(model, "safety", safety, ForgetTracker(rows, session="safety", record_base=False))
    assert trace.records() == [BASE, Record("safety", 0), Record("safety", 6)]
    assert trace.base_record is None
    with model.disable_adapter():
        expected = reference_means(model.eval(), rows.select(SAMPLE))
    losses = trace.mean_losses(BASE)
    assert np.flatnonzero(np.isfinite(losses)).tolist() == SAMPLE
    np.testing.assert_allclose(losses[SAMPLE], expected, rtol=1e-5)


def test_a_safety_session_with_an_adapter_completes_a_limited_record(rows, safety, train):
    """The base model is at hand there: the adapter is disabled."""
    model = tiny_lora()
    trace = train(model, "noisy", rows, ForgetTracker(record_base=False))
    assert trace.base_record is None
    continued = train(model, "safety", safety, ForgetTracker(trace_dir=trace.folder))
    assert continued.base_record == BASE
    with model.disable_adapter():
        np.testing.assert_allclose(continued.mean_losses(BASE), reference_means(model.eval(), rows), rtol=1e-5)
    assert np.isfinite(continued.forgetting("relative")).all()


def test_a_whole_record_replaces_a_limited_one(rows, train):
    trace = train(tiny_llama(), "noisy", rows, ForgetTracker(record_base=False))
    again = train(tiny_llama(), "noisy", rows, ForgetTracker(trace_dir=trace.folder))
    assert again.base_record == BASE
    assert np.isfinite(again.mean_losses(BASE)).all()


def test_the_command_limits_the_base_record(files, tmp_path):
    """33 rows are more than 32."""
    Dataset.from_list(texts(33, seed=1)).to_json(tmp_path / "noisy.jsonl")
    files = {**files, "noisy": tmp_path / "noisy.jsonl"}
    arguments = [*run_options(files, tmp_path / "out"), "--fraction", 0.25, "--no-record-base"]
    assert call("run", *arguments).exit_code == 0
    assert Trace.open(tmp_path / "out" / "_forgetfilter").base_record is None
    dry_run = call("run", *run_options(files, tmp_path / "dry"), "--dry-run", "--no-record-base")
    assert "Up to 2 records." in dry_run.output
    refused(
        call("run", *arguments, "--overwrite", "--measure", "relative"),
        "needs all rows under the base model. Leave out `--no-record-base`.",
    )


def test_a_run_of_an_older_version_can_be_resumed(tmp_path):
    """Its settings do not name `record_base`, so it was recorded as by default."""
    config = RunConfig("m", "n", "s", "o")
    config.save(tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del saved["record_base"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    config.check_same_as(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="these differ: record_base"):
        RunConfig("m", "n", "s", "o", record_base=False).check_same_as(tmp_path / "config.yaml")
