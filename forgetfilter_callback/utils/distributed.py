"""Split work between the processes of a `torch.distributed` run, and raise an error of one process on all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch.distributed as dist

from ..errors import BrokenPassError


T = TypeVar("T")


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes: (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def shard_indices(count: int, leaders: list[int] | None = None) -> np.ndarray:
    """Return this process's shard of `range(count)`.

    Shards are contiguous, because neighbouring rows often share a prefix.

    Args:
        count (`int`):
            The number of items.
        leaders (`list[int]`, *optional*):
            A rank for each process, in rank order, as in [`leaders_of_processes`]. Processes with the same leader get
            the same shard. By default, each process gets its own.
    """
    rank, world_size = rank_and_world_size()
    leaders = leaders if leaders is not None else list(range(world_size))
    distinct = sorted(set(leaders))
    return np.array_split(np.arange(count), len(distinct))[distinct.index(leaders[rank])]


def gather_from_all(value: T) -> list[T]:
    """Gather the `value` of every process on every process, in rank order."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    values: list[T] = [value] * world_size
    dist.all_gather_object(values, value)
    return values


def run_on_all(action: Callable[[], T]) -> list[T]:
    """Run `action` on every process, and return the results of all processes in rank order.

    If `action` raises on any process, every process raises the exception of the lowest rank that failed. A
    [`BrokenPassError`] is raised at once, on its own process only.
    """
    if rank_and_world_size()[1] == 1:
        return [action()]
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except BrokenPassError:
        raise  # the other processes wait in the model and not below, so they cannot be told
    except Exception as raised:  # reported to the other processes, which would otherwise wait forever
        error = _sendable(raised)
    outcomes = gather_from_all((result, error))
    for _, rank_error in outcomes:
        if rank_error is not None:
            raise rank_error
    return [rank_result for rank_result, _ in outcomes]  # type: ignore[misc] # no rank failed, so none is missing


def _sendable(error: Exception) -> Exception:
    """Return `error`, or a `RuntimeError` with its message if its class cannot be sent to other processes."""
    is_importable = "<locals>" not in type(error).__qualname__
    try:
        copy.deepcopy(error)  # builds the exception as a receiving process does
    except Exception:  # an exception class may require any arguments, which its message does not give
        is_importable = False
    return error if is_importable else RuntimeError(f"{type(error).__name__}: {error}")


def run_on_main(action: Callable[[], T], drain: Iterable[object] = ()) -> T:
    """Run `action` on the main process only. Every process returns its result or raises its exception.

    Args:
        action (`Callable`):
            The function to run. It may read from `drain`.
        drain (`Iterable`, *optional*):
            An iterator that runs collectives. Every process exhausts it, so that no process waits for another.
    """

    results: list[T | None] = [None]
    rank, world_size = rank_and_world_size()

    def run_and_drain() -> None:
        try:
            if rank == 0:
                results[0] = action()
        finally:
            for _ in drain:
                pass

    run_on_all(run_and_drain)
    if world_size > 1:
        dist.broadcast_object_list(results, src=0)  # gathering would hold one copy per process in memory
    return results[0]  # type: ignore[return-value] # the main process has a result
