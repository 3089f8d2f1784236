"""Preserve a model's state during scoring, and hash its weights."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from accelerate.utils import is_compiled_module
from peft.import_utils import is_bnb_4bit_available
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig

from .parallelism import shares_weights


# Attributes that every module has; a module's other attributes are its settings.
_MODULE_ATTRIBUTES = set(vars(nn.Module()))
# Larger buffers, in elements, are not copied.
_MAX_COPIED_BUFFER = 2**20


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode, and restore it and all random generators when the block ends.

    The following are restored:

    - The attributes of every module, including its training mode.
    - The buffers of every module. Dynamic RoPE replaces its buffers when it sees long rows. LongRoPE overwrites them.
      Contents are restored for buffers of up to 2**20 elements only: larger ones may hold the weights, as in GPTQ.
    - `requires_grad` of every parameter, which PEFT changes when adapters are disabled and enabled.
    - The random generators of Python, NumPy and torch (CPU and the model's device).

    Inside the block, compiled modules run without their compiled code.
    """
    saved_modules = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    saved_contents = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.numel() <= _MAX_COPIED_BUFFER]
    saved_requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator()
    device_type = accelerator.type if accelerator is not None else "cuda"
    devices = [device.index for device in {p.device for p in model.parameters()} if device.type == device_type]
    try:
        with torch.random.fork_rng(devices=devices, device_type=device_type), _without_compiled_code(model):
            model.eval()
            for module in _eval_unsafe_modules(model):
                module.training = True
            yield
    finally:
        for module, attributes, buffers in saved_modules:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, content in saved_contents:
                buffer.copy_(content)
        for parameter, requires_grad in saved_requires_grad:
            parameter.requires_grad_(requires_grad)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # some keep gathered weights for a backward pass, which scoring never runs
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _without_compiled_code(model: nn.Module) -> Iterator[None]:
    """Run modules that `torch.compile` has compiled as if it had not.

    Scoring adds hooks to modules and reads batches of many shapes, and torch would compile the model again for each of them.
    After a few times it gives up, and training runs without compiled code too.
    """
    if not any(is_compiled_module(module) or module._compiled_call_impl is not None for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _eval_unsafe_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that must stay in training mode: the 4-bit layers of bitsandbytes.

    On CPUs with AVX512-BF16, their first forward pass in evaluation mode packs the weights permanently, and all later
    gradients are zero (seen in bitsandbytes 0.50). Their output is the same in training mode.
    """
    if not is_bnb_4bit_available():
        return []
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


@torch.no_grad()
def model_digest(model: nn.Module) -> str | None:
    """Hash everything that the losses of `model` depend on: weights, buffers, settings and active adapters.

    This reads every byte of the weights, so it costs about as much as saving them.

    Returns:
        `str`: the hash, or `None` if no reliable hash is possible. This is the case if hooks or a wrapped `forward` may
        change the losses, or if weights are not plain tensors (offloaded, sharded or, for some methods, quantized).
        accelerate wraps `forward` for mixed precision, and SFTTrainer for its own loss. PEFT and transformers hook the
        embeddings for gradient checkpointing.
    """
    if shares_weights(model):
        return None
    config = cast(PreTrainedConfig, model.config)
    digest = hashlib.blake2b(digest_size=16)
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    digest.update(f"{config.to_json_string()} {config._attn_implementation} {allow_tf32}".encode())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
        settings = {key: value for key, value in vars(module).items() if key not in _MODULE_ATTRIBUTES}
        tensors += [(f"{name}.{key}", value) for key, value in settings.items() if isinstance(value, torch.Tensor)]
        plain_settings = {
            key: repr(value)
            for key, value in sorted(settings.items())
            if isinstance(value, int | float | str | list | tuple | dict)
        }
        if any("tensor(" in value for value in plain_settings.values()):
            return None
        digest.update(f"{name} {type(module)} {plain_settings}".encode())
    for name, tensor in tensors:
        if type(tensor) not in (nn.Parameter, torch.Tensor) or tensor.is_meta:
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
