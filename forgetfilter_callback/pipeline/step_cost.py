"""[`measure_steps`]: the memory and time that training and records need on this machine, from a few short steps."""

from __future__ import annotations

import dataclasses
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PrinterCallback, Trainer

from ..data.encoded_rows import EncodedRows
from ..data.tokenizers import padding_collator
from ..scoring.token_losses import token_losses
from ..utils.model_state import preserve_state
from .load_model import load_model
from .run import RunInputs, training_arguments
from .run_config import RunConfig


# Memory is measured on rows of at most this many tokens. For longer rows it is extended from three lengths up to it.
MEASURED_TOKENS = 256
TIMED_STEPS = 3


@dataclass(frozen=True)
class StepCost:
    """What training and records cost on this machine.

    Attributes:
        peak_bytes (`int`): Bytes of all tensors at the peak of training on the largest batch. For rows of more
            than 256 tokens it is rough, and can be too low, if the model runs other operations on longer rows, as a mixture
            of experts can.
        training_seconds (`float`): Seconds per token of a training step.
        record_seconds (`float`): Seconds per token of a record.
    """

    peak_bytes: int
    training_seconds: float
    record_seconds: float


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of all living tensors, on any device. The memory of kernels and allocators is not seen.

    Args:
        model (`nn.Module`):
            Its weights are counted from the start. Other tensors are counted once an operation has returned them.

    Attributes:
        living (`list[int]`): The number of bytes at the start and after each operation.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self._living = 0
        self._storages: set[int] = set()
        for tensor in (*model.parameters(), *model.buffers()):
            self._add(tensor.untyped_storage())
        self.living = [self._living]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **({} if kwargs is None else kwargs))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        self.living.append(self._living)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._storages:  # views share a storage
            self._storages.add(id(storage))
            self._living += storage.nbytes()
            weakref.finalize(storage, self._remove, id(storage), storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._storages.remove(key)
        self._living -= size


def measure_steps(config: RunConfig, inputs: RunInputs, batch_rows: int, longest_row: int) -> StepCost:
    """Load the model of a run and train it for a few short steps, without writing anything into the output folder.

    Args:
        config ([`RunConfig`]):
            The settings of the run.
        inputs ([`RunInputs`]):
            Its inputs.
        batch_rows, longest_row (`int`):
            Rows of the largest batch, and the tokens that they are padded to.
    """
    model = load_model(config, inputs.args.seed)

    def trainer(rows: Dataset, **settings: Any) -> Trainer:
        quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
        one_epoch = {"max_steps": -1, "num_train_epochs": 1, "dataloader_drop_last": False}
        training = {**config.training, **quiet, **one_epoch, **settings}
        args, _ = training_arguments(dataclasses.replace(config, training=training, output=folder))
        made = Trainer(model, args, train_dataset=rows, data_collator=padding_collator(inputs.tokenizer))
        made.remove_callback(PrinterCallback)
        return made

    def living_bytes(length: int) -> list[int]:
        """The bytes during two steps: optimizers create their state in the first. Each step has up to two batches."""
        tokens = np.resize(inputs.noisy.tokens[:length], length).tolist()
        accumulated = min(inputs.args.gradient_accumulation_steps, 2)
        rows = Dataset.from_list([{"input_ids": tokens, "labels": tokens}] * (2 * accumulated * batch_rows))
        of_batch = {"per_device_train_batch_size": batch_rows, "gradient_accumulation_steps": accumulated}
        measured = trainer(rows, **of_batch)
        with TensorBytes(model) as tensors:
            measured.train()
        return tensors.living

    with tempfile.TemporaryDirectory() as folder:
        peak = _peak_bytes(living_bytes, longest_row)
        rows_per_step = inputs.args.train_batch_size * inputs.args.gradient_accumulation_steps
        typical = _typical_rows(inputs.noisy, TIMED_STEPS * rows_per_step)
        timed = trainer(typical.as_dataset())
        started = time.perf_counter()
        timed.train()
        trained = time.perf_counter()
        with preserve_state(model):
            token_losses(model, typical, disable_tqdm=True)
        scored = time.perf_counter()
    count = len(typical.tokens)
    return StepCost(peak, (trained - started) / count, (scored - trained) / count)


def _peak_bytes(living_bytes: Callable[[int], list[int]], longest_row: int) -> int:
    """The peak on rows of `longest_row` tokens.

    Long rows can peak in another operation than short rows: short ones in the optimizer, long ones in the loss. So the bytes
    after each operation are extended on their own, by a quadratic polynomial because attention can be quadratic.
    """
    if longest_row <= MEASURED_TOKENS:
        return max(living_bytes(longest_row))
    lengths, degree = [MEASURED_TOKENS // 4, MEASURED_TOKENS // 2, MEASURED_TOKENS], 2
    measured = [living_bytes(length) for length in lengths]
    # If other operations run for other lengths, only the peaks can be compared.
    if len({len(living) for living in measured}) > 1:
        measured, degree = [[max(living)] for living in measured], 1
    extended = np.polyval(np.polyfit(lengths, np.array(measured), degree), longest_row)
    return int(max(extended.max(), max(measured[-1])))


def _typical_rows(rows: EncodedRows, count: int) -> EncodedRows:
    """Up to `count` of the rows, evenly spread from the shortest to the longest."""
    shortest_first, count = np.argsort(np.diff(rows.offsets), kind="stable"), min(count, len(rows))
    return rows.select(np.sort(shortest_first[(2 * np.arange(count) + 1) * len(rows) // (2 * count)]))
