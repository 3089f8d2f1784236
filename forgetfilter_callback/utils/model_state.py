"""The state of a model: leaving it as it was found, and knowing it again."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft.import_utils import is_bnb_4bit_available
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig


_OF_EVERY_MODULE = set(vars(nn.Module()))
_LARGEST_COPIED = 2**20  # elements of a buffer


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Evaluates `model` inside, and leaves it and all random generators exactly as they were.

    Restored are the attributes of every module (its training mode among them), its buffers (dynamic RoPE replaces them when
    it sees long rows, LongRoPE overwrites them; the contents of those of up to a million elements, for larger ones may be
    the weights, as GPTQ keeps them), which parameters are trained (PEFT changes that where
    adapters are switched off and on), and the generators of Python, NumPy and torch (CPU and the model's device).
    """
    modules = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    contents = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.numel() <= _LARGEST_COPIED]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator is not None else "cuda"
    devices = [device.index for device in {p.device for p in model.parameters()} if device.type == kind]
    try:
        with torch.random.fork_rng(devices=devices, device_type=kind):
            model.eval()
            for module in _packed_when_evaluated(model):
                module.training = True
            yield
    finally:
        for module, attributes, buffers in modules:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, content in contents:
                buffer.copy_(content)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # some keep their whole weights for a backward pass that does not come
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _packed_when_evaluated(model: nn.Module) -> list[nn.Module]:
    """bitsandbytes' 4-bit layers: on CPUs with AVX512-BF16 the first forward pass in evaluation mode packs their weights for
    good, and gradients are zero ever after (seen in bitsandbytes 0.50). They compute the same in training mode."""
    if not is_bnb_4bit_available():
        return []
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def is_sharded(model: nn.Module) -> bool:
    """Whether each process has a part of every weight (FSDP2), so that all must go through a forward pass together."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def why_unsupported(model: nn.Module) -> str | None:
    """Why a process cannot score rows of its own with `model`; `None` if it can (alone, or together with the others)."""
    meshes = [parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)]
    if any(mesh.ndim > 1 for mesh in meshes) or (meshes and not is_sharded(model)):
        return "weights are spread by tensor parallelism, or over a mesh of several dimensions (hybrid sharding)"
    kind = PartialState().distributed_type
    whole = kind == DistributedType.NO or kind.value.startswith("MULTI_")  # on each process, on whatever accelerator
    if whole or (kind == DistributedType.FSDP and is_sharded(model)):
        return None
    return f"weights are sharded by {kind.value}"


@torch.no_grad()
def model_digest(model: nn.Module) -> str | None:
    """A hash of what the losses of `model` depend on: weights, buffers, settings, which adapters are active.

    It reads every byte of the weights, so it costs about as much as saving them.

    Returns:
        `str`, or `None` where something else may change losses (hooks, a `forward` that has been wrapped, as under
        autocast) or where weights cannot be read as plain tensors (offloaded, sharded, some quantised ones).
    """
    config: PreTrainedConfig = model.config
    digest = hashlib.blake2b(digest_size=16)
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    digest.update(f"{config.to_json_string()} {config._attn_implementation} {allow_tf32}".encode())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
        settings = {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
        tensors += [(f"{name}.{key}", value) for key, value in settings.items() if isinstance(value, torch.Tensor)]
        plain = {
            key: repr(value)
            for key, value in sorted(settings.items())
            if isinstance(value, int | float | str | list | tuple | dict)
        }
        if any("tensor(" in value for value in plain.values()):
            return None
        digest.update(f"{name} {type(module)} {plain}".encode())
    for name, tensor in tensors:
        if type(tensor) not in (nn.Parameter, torch.Tensor) or tensor.is_meta:
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
