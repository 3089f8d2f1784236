"""The forward pass: few logits at a time, and mean hidden states."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import VOCABULARY, random_rows, reference_losses, rows_with_common_prefixes, tiny_llama
from tiny_models import NOT_REUSING_MODELS, REUSING_MODELS, scaled_logits, unusual_trunk

from forgetfilter_callback import encode_rows
from forgetfilter_callback.scoring import forward_pass as forward_module
from forgetfilter_callback.scoring.token_losses import token_losses, window_scores
from forgetfilter_callback.utils.model_state import preserve_state


@pytest.mark.parametrize("reuse_prefixes", [True, False])
def test_logits_of_a_batch_are_bounded(reuse_prefixes, monkeypatch):
    rng = np.random.default_rng(0)
    start = rng.integers(5, VOCABULARY, 20).tolist()
    rows = []
    for _ in range(60):
        tokens = start + rng.integers(5, VOCABULARY, 8).tolist()
        rows.append({"input_ids": tokens, "labels": [-100] * 20 + tokens[20:]})
    monkeypatch.setattr(forward_module, "_LOGITS_PER_PASS", 64 * VOCABULARY)
    model, sizes = tiny_llama(), []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    token_losses(model, encode_rows(rows), batch_tokens=256, reuse_prefixes=reuse_prefixes, disable_tqdm=True)
    assert sum(sizes) > 400 and max(sizes) <= 64


MODELS = [*REUSING_MODELS, *NOT_REUSING_MODELS, scaled_logits, unusual_trunk]


@pytest.mark.parametrize("make_model", MODELS, ids=lambda f: f.__name__)
def test_predictions_of_one_row_are_sliced(make_model, monkeypatch):
    monkeypatch.setattr(forward_module, "_LOGITS_PER_PASS", 3 * VOCABULARY)
    monkeypatch.setattr(forward_module, "_FLOAT32_LOGITS_ON_CPU", 2 * VOCABULARY)
    model, rows = make_model().eval(), random_rows(5)
    sizes, attributes = [], {name: set(vars(module)) for name, module in model.named_modules()}
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    losses = token_losses(model, encode_rows(rows), disable_tqdm=True)
    assert max(sizes) == 3
    np.testing.assert_allclose(losses, reference_losses(model, rows), rtol=1e-5, atol=1e-6)
    for name, module in model.named_modules():
        assert set(vars(module)) == attributes[name]
        assert not module._forward_hooks or module is model.get_output_embeddings()


def test_the_trunk_runs_once_per_batch(monkeypatch):
    monkeypatch.setattr(forward_module, "_LOGITS_PER_PASS", 3 * VOCABULARY)
    model, trunk_runs, head_runs = tiny_llama(), [], []
    model.model.layers[0].register_forward_hook(lambda *args: trunk_runs.append(1))
    model.lm_head.register_forward_hook(lambda *args: head_runs.append(1))
    tokens = list(range(5, 45))
    token_losses(model, encode_rows([{"input_ids": tokens, "labels": tokens}]), disable_tqdm=True)
    assert (len(trunk_runs), len(head_runs)) == (1, 13)


PEAK_MEMORY = """
from pathlib import Path
from helpers import tiny_llama
from forgetfilter_callback import encode_rows
from forgetfilter_callback.scoring.token_losses import token_losses

def resident_mb(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024

model = tiny_llama(vocab_size=131_072, hidden_size=64, num_hidden_layers=1, max_position_embeddings=2048)
rows = lambda length: encode_rows([{"input_ids": list(range(5, 5 + length))}], disable_tqdm=True)
token_losses(model, rows(8), disable_tqdm=True)  # the first pass loads libraries
Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
before = resident_mb("VmRSS")
token_losses(model, rows(2048), disable_tqdm=True)
print(resident_mb("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_long_row_with_a_large_vocabulary():
    """Full logits in float32 would take 1,024 MB. `benchmarks/gpu.py` measures a row of 32,768 tokens."""
    process = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert float(process.stdout.split()[-1]) < 256


def test_a_model_without_an_output_head_is_scored_from_full_logits():
    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_llama()
            self.config = self.inner.config

        def get_output_embeddings(self):
            return None

        def forward(self, **inputs):
            return self.inner(**inputs)

    rows = random_rows(9)
    losses = token_losses(Hidden().eval(), encode_rows(rows), disable_tqdm=True)
    np.testing.assert_allclose(losses, reference_losses(tiny_llama(), rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reuse_prefixes", [True, False])
@pytest.mark.parametrize("size", [512, 8])
def test_states_are_mean_hidden_states(size, reuse_prefixes, monkeypatch):
    monkeypatch.setattr(forward_module, "STATE_SIZE", size)
    forward_module._projection.cache_clear()
    dataset = rows_with_common_prefixes()
    without_loss = {"input_ids": [9, 8, 7], "labels": [-100] * 3}
    rows = encode_rows([*dataset, without_loss], disable_tqdm=True)
    model = tiny_llama()
    with preserve_state(model):
        (scored,) = window_scores(model, rows, 64, reuse_prefixes, disable_tqdm=True, with_states=True)
    expected = np.zeros((len(rows), 32), np.float32)
    for index, row in enumerate(dataset):
        with torch.no_grad():
            hidden = model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[-1][0]
        places = [place - 1 for place in range(1, len(row["labels"])) if row["labels"][place] != -100]
        expected[index] = hidden[places].mean(0).numpy()
    if size < 32:
        matrix = np.random.default_rng(0).standard_normal((32, size), dtype=np.float32) / np.sqrt(size)
        expected = expected @ matrix
    forward_module._projection.cache_clear()
    assert scored.states.dtype == np.float16
    np.testing.assert_allclose(scored.states, expected, rtol=2e-3, atol=2e-3)
    assert not scored.states[-1].any()


@pytest.mark.parametrize("reuse_prefixes", [True, False])
def test_states_that_are_not_numbers_do_not_spread_to_other_rows(reuse_prefixes):
    rng = np.random.default_rng(0)
    dataset = [{"input_ids": rng.integers(5, 100, 9).tolist()} for _ in range(6)]
    dataset[2]["input_ids"][4] = 120  # no other row has this token
    model, rows = tiny_llama(), encode_rows(dataset, disable_tqdm=True)
    (expected,) = window_scores(model, rows, None, reuse_prefixes, disable_tqdm=True, with_states=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[120] = float("nan")
    (scored,) = window_scores(model, rows, None, reuse_prefixes, disable_tqdm=True, with_states=True)
    others = np.arange(6) != 2
    np.testing.assert_allclose(scored.states[others], expected.states[others], rtol=2e-3, atol=2e-3)
    assert np.isnan(scored.states[2]).all()
