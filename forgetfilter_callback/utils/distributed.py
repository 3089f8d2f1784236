"""Several processes (torch.distributed): who does what, and that all of them learn of a failure instead of waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch.distributed as dist


T = TypeVar("T")


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) unless a process group has been set up."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def shard_indices(count: int) -> np.ndarray:
    """Which of `count` things are this process's: a stretch of them, since neighbours may have much in common."""
    rank, size = rank_and_world_size()
    return np.array_split(np.arange(count), size)[rank]


def gather_from_all(mine: T) -> list[T]:
    """What every process has, in their order, on all of them."""
    _, size = rank_and_world_size()
    if size == 1:
        return [mine]
    everything: list[T] = [mine] * size
    dist.all_gather_object(everything, mine)
    return everything


def run_on_all(action: Callable[[], T]) -> list[T]:
    """Runs `action` on every process. All get all results, or raise the first process's exception together."""
    if rank_and_world_size()[1] == 1:
        return [action()]
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as raised:  # the others must hear of it: they would wait for ever
        error = raised
    outcomes = gather_from_all((result, error))
    for _, its_error in outcomes:
        if its_error is not None:
            raise its_error
    return [its_result for its_result, _ in outcomes]  # type: ignore[misc] # what `action` gave


def run_on_main(action: Callable[[], T], drain: Iterable[object] = ()) -> T:
    """Runs `action` on the main process only; its result, or its exception, reaches all of them.

    Args:
        action (`Callable`):
            What to do; it may draw from `drain`.
        drain (`Iterable`, *optional*):
            An iterator that all processes have to exhaust together, as its values are gathered from all.
    """

    def act() -> T | None:
        try:
            return action() if rank_and_world_size()[0] == 0 else None
        finally:
            for _ in drain:
                pass

    return run_on_all(act)[0]  # type: ignore[return-value] # the main process's
