"""Detect how the weights of a model are divided among processes, and which processes must score together."""

from __future__ import annotations

from typing import cast

import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState, is_initialized
from accelerate.utils import DistributedType, is_compiled_module
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DeviceMesh, DTensor

from .distributed import gather_from_all, rank_and_world_size


# Names of mesh dimensions in accelerate and transformers: along the first, processes get different batches; along the
# others, they get the same batch.
_DATA_DIMENSIONS = {"fsdp", "dp", "dp_replicate", "dp_shard", "dp_shard_cp"}
_MODEL_DIMENSIONS = {"tp", "ep"}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers that Trainer passes to callbacks: FSDP1's and that of `torch.compile(model)`."""
    if isinstance(model, FullyShardedDataParallel):
        model = model.module
    return cast(nn.Module, model._orig_mod) if is_compiled_module(model) else model


def shares_weights(model: nn.Module) -> bool:
    """Return whether a forward pass needs weights of other processes, so that they must run it together.

    This is the case under FSDP, DeepSpeed ZeRO-3 and tensor parallelism.
    """
    sharded = isinstance(model, FullyShardedDataParallel) or _zero_stage() == 3
    return sharded or has_fsdp2_modules(model) or bool(_meshes(model))


def has_fsdp2_modules(model: nn.Module) -> bool:
    """Return whether weights are sharded by FSDP2 (`fully_shard`)."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def need_equal_inputs(model: nn.Module) -> bool:
    """Return whether several processes must run `model` on the same inputs, because each computes a part of every layer."""
    return any(_dimensions_of_equal_inputs(model, mesh) for mesh in _meshes(model))


def leaders_of_processes(model: nn.Module) -> list[int]:
    """Return a rank for each process, in rank order: the lowest rank of those that must run `model` on the same inputs.

    Without tensor parallelism, each process is its own leader.
    """
    if not need_equal_inputs(model):
        return list(range(rank_and_world_size()[1]))
    groups = [mesh.get_group(name) for mesh in _meshes(model) for name in _dimensions_of_equal_inputs(model, mesh)]
    return gather_from_all(min(member for group in groups for member in dist.get_process_group_ranks(group)))


def why_unsupported(model: nn.Module) -> str | None:
    """Return why the processes of this run cannot score rows with `model`, or `None` if they can."""
    for mesh in _meshes(model):
        if mesh.ndim > 1 and mesh.mesh_dim_names is None:
            return "weights are divided over a mesh of several dimensions without names (`mesh_dim_names`)"
        unknown = {name for name in _dimensions_of_equal_inputs(model, mesh) if name not in ("tp", 0)}
        if unknown:
            return f"weights are divided over the mesh dimension {', '.join(sorted(map(str, unknown)))!r}"
    parallelism = AcceleratorState().parallelism_config if is_initialized() else None
    if parallelism is not None and {"cp", "sp"} & set(parallelism.non_dp_dim_names):
        return "sequences are split over processes by context or sequence parallelism (`parallelism_config`)"
    distributed_type = PartialState().distributed_type
    if distributed_type == DistributedType.DEEPSPEED:
        config = AcceleratorState().deepspeed_plugin.deepspeed_config
        if config.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
            return "weights are split by DeepSpeed's automatic tensor parallelism (`autotp_size`)"
        return None
    # "MULTI_GPU", "MULTI_CPU" and so on: data parallelism, or weights that transformers has divided at load time.
    if distributed_type == DistributedType.NO or distributed_type.value.startswith("MULTI_"):
        return None
    if distributed_type == DistributedType.FSDP and shares_weights(model):
        return None
    return f"weights are sharded by {distributed_type.value}"


def _zero_stage() -> int:
    """The stage of DeepSpeed ZeRO, or 0 without DeepSpeed."""
    if not is_initialized() or PartialState().distributed_type != DistributedType.DEEPSPEED:
        return 0
    return AcceleratorState().deepspeed_plugin.zero_stage


def _meshes(model: nn.Module) -> set[DeviceMesh]:
    """The meshes over which weights are divided by FSDP2 or tensor parallelism."""
    return {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}


def _dimensions_of_equal_inputs(model: nn.Module, mesh: DeviceMesh) -> list[str | int]:
    """The dimensions of `mesh` along which all processes need the same inputs, by name or (without names) by index."""
    only_fsdp2 = mesh.ndim == 1 and has_fsdp2_modules(model)
    if mesh.mesh_dim_names is None:
        return [] if only_fsdp2 else [0]
    if only_fsdp2 and mesh.mesh_dim_names[0] not in _MODEL_DIMENSIONS:
        return []
    return [name for name in mesh.mesh_dim_names if name not in _DATA_DIMENSIONS]
