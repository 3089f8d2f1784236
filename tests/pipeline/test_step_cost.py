"""What a run costs, from a few short steps of training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import call, run_options, texts, tiny_llama

from forgetfilter_callback import RunConfig, Trace
from forgetfilter_callback.pipeline import step_cost
from forgetfilter_callback.pipeline.run import load_inputs
from forgetfilter_callback.pipeline.step_cost import TensorBytes, measure_steps


def test_living_tensors_are_counted_once():
    model = torch.nn.Linear(10, 20, bias=False)
    with TensorBytes(model) as tensors:
        weights = 4 * 10 * 20
        assert tensors.peak == weights
        first = torch.zeros(1000)
        views = [first.view(10, 100), model.weight.t(), first.add_(1)]
        assert tensors.peak == weights + 4 * 1000
        del first, views
        torch.zeros(300)
        assert tensors.peak == weights + 4 * 1000
        second = torch.zeros(2000)
        assert tensors.peak == weights + 4 * 2000
        del second
    del tensors  # a storage that outlives the count is not an error
    model(torch.zeros(1, 10))


def test_tensors_of_a_backward_pass_are_counted():
    values = torch.ones(1000, requires_grad=True)
    with TensorBytes(torch.nn.Identity()) as tensors:
        exponential = values.exp()  # saved for the backward pass
        loss = exponential.sum()
        del exponential
        loss.backward()
    saved, gradient_of_exponential, gradient = 4 * 1000, 4 * 1000, 4 * 1000
    assert saved + gradient <= tensors.peak <= saved + gradient_of_exponential + gradient + 64


@pytest.mark.parametrize("rows", [1, 3])
def test_the_peak_of_a_long_row_is_extended_from_shorter_ones(rows, files, tmp_path, monkeypatch):
    config = RunConfig(*(str(files[name]) for name in ("model", "noisy", "safety")), output=str(tmp_path / "out"))
    inputs = load_inputs(config)
    measured = measure_steps(config, inputs, rows, 48).peak_bytes
    monkeypatch.setattr(step_cost, "MEASURED_TOKENS", 16)
    assert measure_steps(config, inputs, rows, 48).peak_bytes == pytest.approx(measured, rel=0.1)
    weights = sum(4 * parameter.numel() for parameter in tiny_llama().parameters())
    assert measured > weights + rows * 48 * 128 * 4  # with the logits
    assert not (tmp_path / "out").exists()


def test_four_rows_a_step_train_the_same_model_however_they_are_batched(files, tmp_path):
    Dataset.from_list(texts(10, seed=1)).to_json(tmp_path / "noisy.jsonl")
    losses = []
    for name, batch in (("default", []), ("batches", ["--training", "per_device_train_batch_size=4"])):
        arguments = run_options({**files, "noisy": tmp_path / "noisy.jsonl"}, tmp_path / name)
        result = call("run", *arguments, *batch, "--lora", "lora_dropout=0.0", "--fraction", 0.25, "--dtype", "float32")
        assert result.exit_code == 0, result.output
        losses.append(Trace.open(tmp_path / name / "_forgetfilter").losses())
    assert losses[0].shape == losses[1].shape and abs(losses[0][1] - losses[0][0]).max() > 0.1
    np.testing.assert_allclose(*losses, rtol=1e-3)
