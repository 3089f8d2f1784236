"""`forgetfilter score`: records of two checkpoints."""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest
from helpers import call, tiny_llama
from peft import PeftModel

from forgetfilter_callback import Trace, encode_rows
from forgetfilter_callback.data.load_rows import load_rows
from forgetfilter_callback.measures.common import mean_losses
from forgetfilter_callback.pipeline import checkpoints
from forgetfilter_callback.scoring.token_losses import token_losses
from forgetfilter_callback.trace.records import Record
from forgetfilter_callback.utils.model_state import preserve_state


def test_score_compares_two_checkpoints(files, tmp_path, byte_tokenizer):
    after = tiny_llama(seed=1, vocab_size=len(byte_tokenizer))
    after.save_pretrained(tmp_path / "after")
    first = call(
        "score", "--noisy", files["noisy"], "--before", files["model"], "--output", tmp_path / "trace", "--json"
    )
    assert first.exit_code == 0, first.output
    result = call("score", "--noisy", files["noisy"], "--after", tmp_path / "after", "--tokenizer", files["model"],
                  "--output", tmp_path / "trace")  # fmt: skip
    assert result.exit_code == 0 and result.stdout.endswith(f"Next: forgetfilter review {tmp_path / 'trace'}\n")
    trace = Trace.open(tmp_path / "trace")
    assert trace.records() == [Record("safety", 0), Record("safety", 1)]
    assert trace.manifest["model"] == str(files["model"])  # not the model scored last
    with preserve_state(after):
        rows = encode_rows(load_rows(files["noisy"]), byte_tokenizer, disable_tqdm=True)
        expected = mean_losses(token_losses(after, rows, disable_tqdm=True), rows.loss_offsets)
    np.testing.assert_allclose(trace.losses()[1], expected, rtol=1e-5)
    assert json.loads(first.stdout)["mean_loss"] == {"before": pytest.approx(trace.losses()[0].mean())}
    filtered = call("filter", tmp_path / "trace", "--fraction", 0.5, "--output", tmp_path / "filtered", "--json")
    assert filtered.exit_code == 0 and json.loads(filtered.stdout)["removed"] == 6  # the trace knows where the rows are


def test_score_loads_one_model_at_a_time_and_releases_its_lock(files, tmp_path, monkeypatch):
    """Two models may not fit into memory, and a failed load must release the folder."""
    loaded, load = [], checkpoints._load

    def load_one(checkpoint, device):
        gc.collect()
        assert not [model for model in loaded if model() is not None]
        model = load(checkpoint, device)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(checkpoints, "_load", load_one)
    arguments = (
        "score",
        "--noisy",
        files["noisy"],
        "--before",
        files["model"],
        "--output",
        tmp_path / "trace",
        "--after",
    )
    (tmp_path / "nothing").mkdir()
    result = call(*arguments, tmp_path / "nothing")
    assert result.exit_code == 2 and "cannot be loaded" in result.output
    lock = Trace.lock(tmp_path / "trace")
    assert lock.lock_counter == 1  # the lock was free
    lock.release()
    result = call(*arguments, files["model"])
    assert result.exit_code == 0, result.output
    assert len(loaded) == 3 and Trace.open(tmp_path / "trace").manifest["model"] == str(files["model"])


def test_the_same_model_before_and_after_is_named(files, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(files["model"].parent)
    models = ("--before", files["model"], "--after", f"./{files['model'].name}")
    assert call("score", "--noisy", files["noisy"], *models, "--output", tmp_path / "trace").exit_code == 0
    assert f"are both {files['model']}, so no row will be forgotten" in caplog.text


def test_score_of_an_adapter(finished, files, tmp_path, byte_tokenizer):
    adapter = finished[0] / "model"
    result = call("score", "--noisy", files["noisy"], "--before", adapter, "--output", tmp_path / "trace")
    assert result.exit_code == 0, result.output
    model = PeftModel.from_pretrained(tiny_llama(vocab_size=len(byte_tokenizer)), adapter)
    rows = encode_rows(load_rows(files["noisy"]), byte_tokenizer, disable_tqdm=True)
    with preserve_state(model):
        expected, plain = token_losses(model, rows, disable_tqdm=True), None
        with model.disable_adapter():
            plain = token_losses(model, rows, disable_tqdm=True)
    losses = Trace.open(tmp_path / "trace").token_losses(Record("safety", 0))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert not np.allclose(losses, plain, rtol=1e-2)


def test_score_refuses_a_tracked_trace_and_a_missing_model(finished, files, tmp_path):
    trace = finished[0] / "_forgetfilter"
    mixed = call("score", "--noisy", files["noisy"], "--before", files["model"], "--output", trace)
    assert mixed.exit_code == 2 and "was recorded during training" in mixed.output
    missing = call("score", "--noisy", files["noisy"], "--before", tmp_path / "none", "--tokenizer", files["model"],
                   "--max-length", 60, "--output", tmp_path / "scored")  # fmt: skip
    assert missing.exit_code == 2 and "cannot be loaded" in missing.output and not Trace.exists(tmp_path / "scored")
