"""`preserve_state` restores modes, buffers, counters and random generators."""

from __future__ import annotations

import numpy as np
import torch
from helpers import tiny_llama
from tiny_models import longrope

from forgetfilter_callback.utils.model_state import preserve_state


def test_preserve_state_restores_modes_buffers_and_generators():
    model = tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    with preserve_state(model):
        torch.rand(7)
        np.random.rand(7)
        model(input_ids=torch.arange(5, 105)[None])
        assert model.model.rotary_emb.max_seq_len_cached == 100  # it grew inside
    assert [module.training for module in model.modules()] == modes
    assert model.model.rotary_emb.max_seq_len_cached == 64
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert (torch.rand(1), np.random.rand()) == expected


def test_preserve_state_restores_grown_dynamic_rope():
    model = tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    model(input_ids=torch.arange(5, 85)[None])
    frequencies = model.model.rotary_emb.inv_freq.clone()
    with preserve_state(model):
        model(input_ids=torch.arange(5, 105)[None])
        assert model.model.rotary_emb.max_seq_len_cached == 100
    assert model.model.rotary_emb.max_seq_len_cached == 80
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_preserve_state_restores_longrope_buffers():
    model = longrope()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    attributes = set(vars(model.model.rotary_emb))
    with preserve_state(model):
        model(input_ids=torch.arange(5, 45)[None])
        assert any(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert set(vars(model.model.rotary_emb)) == attributes


def test_weights_in_buffers_are_not_copied(monkeypatch):
    """GPTQ stores weights in buffers; copying them would be a second model."""
    model, cloned, clone = tiny_llama(), [], torch.Tensor.clone
    model.model.register_buffer("qweight", torch.zeros(2**20 + 1))
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda self, **kwargs: cloned.append(self.numel()) or clone(self, **kwargs)
    )
    with preserve_state(model):
        pass
    assert cloned and max(cloned) < 2**20  # the RoPE buffers are


def test_counters_in_buffers_are_restored():
    class Counting(torch.nn.Linear):
        def forward(self, x):
            self.seen += 1
            return super().forward(x)

    model = tiny_llama()
    model.lm_head = Counting(32, 128, bias=False)
    model.lm_head.register_buffer("seen", torch.zeros(1))
    with preserve_state(model), torch.no_grad():
        model(input_ids=torch.tensor([[5, 6]]))
    assert model.lm_head.seen.item() == 0
