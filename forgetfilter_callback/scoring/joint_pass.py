"""A forward pass that processes run together because each holds a part of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..errors import BrokenPassError
from ..utils.distributed import gather_from_all, rank_and_world_size
from ..utils.parallelism import has_fsdp2_modules, need_equal_inputs, shares_weights


T = TypeVar("T")


class FailedElsewhereError(Exception):
    """This process has finished a forward pass, but another one ran out of memory in it."""


def run_jointly(model: nn.Module, run: Callable[[], T], can_fail: bool) -> T:
    """Run a forward pass of `model`, and keep the processes that share its weights in step if one runs out of memory.

    A process that fails in the middle of a pass leaves the others waiting for its part of the weights. Under FSDP2, it
    sends the parts of the remaining layers before it reports the error. Elsewhere there is no way to do this, so it
    raises an error that ends it at once, and its launcher (`torchrun`, `accelerate launch`) ends the others.

    Args:
        model (`nn.Module`):
            The model.
        run (`Callable`):
            The forward pass.
        can_fail (`bool`):
            Whether the processes agree after the pass whether one of them ran out of memory.

    Raises:
        torch.OutOfMemoryError: if this process ran out of memory.
        FailedElsewhereError: if only other processes ran out of memory.
        BrokenPassError: if the processes cannot be kept in step.
    """
    if not shares_weights(model):
        return run()
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    gathered: list[nn.Module] = []
    hooks = [unit.register_forward_pre_hook(lambda module, args: gathered.append(module)) for unit in units]
    out_of_memory: torch.OutOfMemoryError | None = None
    can_recover = can_fail and has_fsdp2_modules(model) and not need_equal_inputs(model)
    try:
        result = run()
    except Exception as error:
        if not can_recover or not isinstance(error, torch.OutOfMemoryError):
            raise BrokenPassError(_describe(error)) from error
        out_of_memory = torch.OutOfMemoryError(str(error))  # without the traceback, which keeps tensors alive
    finally:
        for hook in hooks:
            hook.remove()
    if out_of_memory is not None:
        clear_device_cache()
        for unit in units:  # in the order in which they run
            if unit not in gathered:
                unit.unshard()
                unit.reshard()
    if can_recover and any(gather_from_all(out_of_memory is not None)):
        for unit in units:
            unit.reshard()
        raise out_of_memory if out_of_memory is not None else FailedElsewhereError
    return result


def _describe(error: Exception) -> str:
    rank, _ = rank_and_world_size()
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"Scoring does not fit into the memory of process {rank}. The processes share the weights, so a smaller batch "
            f"cannot be tried. Lower `batch_tokens` of the `ForgetTracker`, or `max_length`. ({error})"
        )
    return f"Process {rank} failed while it scored rows with weights that other processes share: {error!r}"
