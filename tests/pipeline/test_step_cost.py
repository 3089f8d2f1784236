"""What a run costs, from a few short steps of training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import call, run_options, texts
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from forgetfilter_callback import RunConfig, Trace
from forgetfilter_callback.pipeline import step_cost
from forgetfilter_callback.pipeline.run import load_inputs
from forgetfilter_callback.pipeline.step_cost import TensorBytes, measure_steps


def test_living_tensors_are_counted_once():
    model = torch.nn.Linear(10, 20, bias=False)
    with TensorBytes(model) as tensors:
        weights = 4 * 10 * 20
        assert max(tensors.living) == weights
        first = torch.zeros(1000)
        views = [first.view(10, 100), model.weight.t(), first.add_(1)]
        assert max(tensors.living) == weights + 4 * 1000
        del first, views
        torch.zeros(300)
        assert max(tensors.living) == weights + 4 * 1000
        second = torch.zeros(2000)
        assert max(tensors.living) == weights + 4 * 2000
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
    assert saved + gradient <= max(tensors.living) <= saved + gradient_of_exponential + gradient + 64


# Full finetuning peaks in the optimizer for short rows. With dropout, GPT-2's attention is quadratic on a CPU.
@pytest.mark.parametrize(
    ("kind", "rows", "settings"),
    [
        ("llama", 1, {}),
        ("llama", 3, {}),
        ("llama", 1, {"use_lora": False}),
        ("llama", 1, {"use_lora": False, "training": {"gradient_accumulation_steps": 1}}),
        ("gpt2", 1, {"use_lora": False}),
        ("gpt2", 2, {}),
    ],
)
def test_the_peak_of_a_long_row_is_extended_from_shorter_ones(
    kind, rows, settings, files, byte_tokenizer, tmp_path, monkeypatch
):
    if kind == "gpt2":
        gpt2 = GPT2Config(vocab_size=len(byte_tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256)
        GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "model")
        byte_tokenizer.save_pretrained(tmp_path / "model")
        files = {**files, "model": tmp_path / "model"}
    given = [str(files[name]) for name in ("model", "noisy", "safety")]
    config = RunConfig(*given, output=str(tmp_path / "out"), **settings)
    inputs = load_inputs(config)
    measured = measure_steps(config, inputs, rows, 200).peak_bytes
    monkeypatch.setattr(step_cost, "MEASURED_TOKENS", 32)
    assert measure_steps(config, inputs, rows, 200).peak_bytes == pytest.approx(measured, rel=0.01)
    weights = sum(4 * each.numel() for each in AutoModelForCausalLM.from_pretrained(files["model"]).parameters())
    assert measured > weights + rows * 200 * len(byte_tokenizer) * 4  # with the logits
    assert not (tmp_path / "out").exists()


def test_a_peak_is_extended_although_longer_rows_run_more_operations(files, byte_tokenizer, tmp_path, monkeypatch):
    """Without its kernels, Mamba has a loop over the tokens."""
    mamba = MambaConfig(vocab_size=len(byte_tokenizer), hidden_size=32, state_size=4, num_hidden_layers=2)
    MambaForCausalLM(mamba).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    given = (str(tmp_path / "model"), str(files["noisy"]), str(files["safety"]))
    config = RunConfig(*given, output=str(tmp_path / "out"), use_lora=False)
    inputs = load_inputs(config)
    measured = measure_steps(config, inputs, 1, 200).peak_bytes
    monkeypatch.setattr(step_cost, "MEASURED_TOKENS", 32)
    assert measure_steps(config, inputs, 1, 200).peak_bytes == pytest.approx(measured, rel=0.1)


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
