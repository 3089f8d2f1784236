"""The state of a model: leaving it as it was found, and knowing it again."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROW = 4096
_OWN_ATTRIBUTES = set(vars(nn.Module()))


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluates `model` inside, and leaves it and all random generators exactly as they were.

    Restored are the training mode of every module, its buffers and plain numbers (dynamic RoPE replaces its buffers when
    it sees long rows), which parameters are trained (PEFT changes that where adapters are switched off and on), and the
    generators of Python, NumPy and torch (CPU and the model's device).
    """
    modules = list(model.modules())
    buffers = [dict(module._buffers) for module in modules]
    # `training` is one of the plain numbers
    numbers = [
        {k: v for k, v in vars(module).items() if isinstance(v, int | float | torch.Tensor)} for module in modules
    ]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device.index for device in {p.device for p in model.parameters()} if device.type == "cuda"]
    try:
        with torch.random.fork_rng(devices=devices):
            model.eval()
            yield
    finally:
        for module, module_buffers, module_numbers in zip(modules, buffers, numbers, strict=True):
            module._buffers.update(module_buffers)
            vars(module).update(module_numbers)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@torch.no_grad()
def model_digest(model: nn.Module) -> str | None:
    """A hash of what the losses of `model` depend on: weights, buffers, settings, which adapters are active.

    It reads every weight once. Two models that differ in one bit have different digests but by a chance of some 2⁻⁶⁴.

    Returns:
        `str`, or `None` where weights cannot be read as plain tensors (offloaded, sharded, some quantised ones).
    """
    config: PreTrainedConfig = model.config
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{config.to_json_string()} {config._attn_implementation}".encode())
    for name, module in model.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if key not in _OWN_ATTRIBUTES and isinstance(value, int | float | str | list | tuple | dict)
        }
        digest.update(f"{name} {type(module)} {sorted(settings.items(), key=lambda item: item[0])}".encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if type(tensor) not in (nn.Parameter, torch.Tensor) or tensor.is_meta or tensor.is_complex():
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
        whole = len(bits) // _ROW * _ROW
        rows = bits[:whole].view(-1, _ROW)
        # Sums of rows and of columns, on the tensor's device: a change of places shows too.
        for sums in (rows.sum(0, dtype=torch.int64), rows.sum(1, dtype=torch.int64), bits[whole:].to(torch.int64)):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()
