"""[`plan`]: estimate the cost of a run before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainingArguments

from ..data.encoded_rows import EncodedRows
from ..utils.counted import counted
from ..utils.distributed import rank_and_world_size
from .run import RunInputs, load_inputs
from .run_config import RunConfig
from .step_cost import MEASURED_TOKENS, StepCost, measure_steps


# Rows are reported as long if they have this many times the tokens of all other rows, and are at most 1 % of the rows.
LONG_ROW_RATIO = 1.5


@dataclass(frozen=True)
class Plan:
    """The estimated cost of a run.

    Attributes:
        samples, safety_samples (`int`): Number of rows.
        tokens, safety_tokens (`int`): Number of their tokens.
        steps, safety_steps (`int`): Optimizer steps of both sessions.
        records (`int`): Number of forward passes over the noisy set.
        extra_fraction (`float`): Cost of the safety session and the records, as a fraction of the noisy session. The refit
            is not included.
        batch_rows (`int`): Rows of the largest batch on one device.
        longest_row (`int`): Tokens of the longest row in this batch. All of its rows are padded to this length.
        logits_bytes (`int`): Size of the logits of this batch in float32.
        long_rows (`int`): Number of rows that are at least 1.5 times as long as all others; 0 if there are none.
        other_rows (`int`): Tokens of the longest other row.
        gradient_checkpointing (`bool`): Whether the run uses gradient checkpointing.
        processes (`int`): Number of processes that train together.
        peak_bytes (`int`, *optional*): Size of all tensors at the peak of training on the largest batch. Above 256
            tokens a row, it is extended from shorter rows. `None` if there are several processes, or if memory ran out.
        seconds (`float`, *optional*): Time of both sessions with their records and, with `refit`, of the last finetuning,
            measured on a few rows. `None` if there are several processes, or if memory ran out.
    """

    samples: int
    safety_samples: int
    tokens: int
    safety_tokens: int
    steps: int
    safety_steps: int
    records: int
    extra_fraction: float
    batch_rows: int
    longest_row: int
    logits_bytes: int
    long_rows: int
    other_rows: int
    gradient_checkpointing: bool
    processes: int
    peak_bytes: int | None
    seconds: float | None

    def __str__(self) -> str:
        return "\n".join([" ".join(self._describe_time()), " ".join(self._describe_memory())])

    def _describe_time(self) -> Iterator[str]:
        if self.processes > 1:
            yield (
                "Time and memory are measured with one process only. If the model and its training fit on one device, run "
                "`--dry-run` without `torchrun` for them."
            )
        elif self.seconds is None:
            yield "Training does not fit into the memory of this machine: it ran out in the few steps that measure the cost."
        else:
            duration = (
                f"{self.seconds / 3600:.1f} hours" if self.seconds >= 5400 else f"{self.seconds / 60:.1f} minutes"
            )
            yield f"On this machine, the whole run takes about {duration}, measured on a few rows."
        yield (
            f"Noisy finetuning: {counted(self.steps, 'step')} over {counted(self.samples, 'row')} "
            f"({counted(self.tokens, 'token')} per epoch). Safety finetuning: {counted(self.safety_steps, 'step')} over "
            f"{counted(self.safety_samples, 'row')}. Up to {counted(self.records, 'record')}. Safety finetuning "
            f"and the records add at most {self.extra_fraction:.0%} to the cost of noisy finetuning."
        )

    def _describe_memory(self) -> Iterator[str]:
        logits = f"logits take {_size(self.logits_bytes)} in float32"
        if self.batch_rows == 1:
            yield f"The longest row has {counted(self.longest_row, 'token')}. Its {logits}."
        else:
            yield (
                f"The longest row has {counted(self.longest_row, 'token')}. A batch is padded to its longest row, so the "
                f"largest one has {self.batch_rows} x {self.longest_row:,} = {self.batch_rows * self.longest_row:,} tokens. "
                f"Its {logits}."
            )
        if self.peak_bytes is not None:
            shorter = (
                f", extended from rows of up to {MEASURED_TOKENS} tokens" if self.longest_row > MEASURED_TOKENS else ""
            )
            yield (
                f"The tensors of training on it take about {_size(self.peak_bytes)}{shorter}. Python and its libraries need "
                "about 0.6 GB more. On a CPU, the tensors can take up to twice as much, because PyTorch keeps memory that "
                "it has freed."
            )
        if self.long_rows:
            are, them = ("is", "it") if self.long_rows == 1 else ("are", "them")
            yield (
                f"{counted(self.long_rows, 'row')} {are} at least {LONG_ROW_RATIO} times as long as all others: "
                f"`--max-length {self.other_rows}` truncates {them}, and the largest batch then has "
                f"{self.batch_rows * self.other_rows:,} tokens."
            )
        if not self.gradient_checkpointing:
            yield "`--training gradient_checkpointing=true` needs less memory and more time."
        if self.batch_rows > 1:
            yield "A smaller `per_device_train_batch_size` with more `gradient_accumulation_steps` needs less memory too."


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def plan(config: RunConfig) -> Plan:
    """Estimate the cost of [`run`]. With one process, it loads the model and trains it for a few short steps.

    Raises:
        ForgetFilterError, ValueError: as [`run`].
    """
    inputs = load_inputs(config)
    noisy, safety = inputs.noisy, inputs.safety
    steps, safety_steps = _steps(inputs.args, len(noisy)), _steps(inputs.safety_args, len(safety))
    # The model after noisy finetuning, the model after safety finetuning, and the base model.
    records = 2 + config.record_base
    if config.record_steps is not None:
        for session_steps in (steps, safety_steps):
            every = config.record_steps if config.record_steps >= 1 else config.record_steps * session_steps
            records += math.ceil(session_steps / every) - 1
    passes = 2 if config.use_lora else 3  # a training step, in forward passes
    trained = passes * _epochs(inputs.args, steps, len(noisy)) * len(noisy.tokens)
    extra = passes * _epochs(inputs.safety_args, safety_steps, len(safety)) * len(safety.tokens)
    extra += records * len(noisy.tokens)
    batch_rows, longest_row = max(
        map(_largest_batch, (noisy, safety), (inputs.args, inputs.safety_args)), key=math.prod
    )
    peak_bytes = seconds = None
    processes = rank_and_world_size()[1]
    cost = _measured(config, inputs, batch_rows, longest_row) if processes == 1 else None
    if cost is not None:
        trained_tokens = _epochs(inputs.args, steps, len(noisy)) * len(noisy.tokens) * (2 if config.refit else 1)
        trained_tokens += _epochs(inputs.safety_args, safety_steps, len(safety)) * len(safety.tokens)
        peak_bytes = cost.peak_bytes
        seconds = cost.training_seconds * trained_tokens + cost.record_seconds * records * len(noisy.tokens)
    long_rows, other_rows = _long_rows(np.concatenate([np.diff(noisy.offsets), np.diff(safety.offsets)]))
    return Plan(
        samples=len(noisy),
        safety_samples=len(safety),
        tokens=len(noisy.tokens),
        safety_tokens=len(safety.tokens),
        steps=steps,
        safety_steps=safety_steps,
        records=records,
        extra_fraction=extra / trained,
        batch_rows=batch_rows,
        longest_row=longest_row,
        logits_bytes=4 * batch_rows * longest_row * len(inputs.tokenizer),
        long_rows=long_rows,
        other_rows=other_rows,
        gradient_checkpointing=bool(inputs.args.gradient_checkpointing),
        processes=processes,
        peak_bytes=peak_bytes,
        seconds=seconds,
    )


def _measured(config: RunConfig, inputs: RunInputs, batch_rows: int, longest_row: int) -> StepCost | None:
    """[`measure_steps`], or `None` if memory runs out."""
    try:
        return measure_steps(config, inputs, batch_rows, longest_row)
    except RuntimeError as error:
        if should_reduce_batch_size(error):  # of an accelerator, or of a CPU, for which torch has no class of errors
            return None
        raise


def _largest_batch(rows: EncodedRows, args: TrainingArguments) -> tuple[int, int]:
    """The number of rows of the largest batch on one device, and the number of tokens that they are padded to."""
    return min(args.per_device_train_batch_size, len(rows)), int(np.diff(rows.offsets).max())


def _long_rows(lengths: np.ndarray) -> tuple[int, int]:
    """The number of rows that are much longer than all others, or 0, and the tokens of the longest other row."""
    longest_first = np.maximum(np.sort(lengths)[::-1], 2)  # the smallest `max_length`
    most = max(1, len(lengths) // 100)
    ratios = longest_first[:most] / longest_first[1 : most + 1]
    count = int(ratios.argmax()) + 1 if ratios.max() >= LONG_ROW_RATIO else 0
    return count, int(longest_first[count])


def _steps_per_epoch(args: TrainingArguments, rows: int) -> int:
    batches = rows / (args.train_batch_size * args.world_size)
    whole_batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return max(math.ceil(whole_batches / args.gradient_accumulation_steps), 1)


def _steps(args: TrainingArguments, rows: int) -> int:
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * _steps_per_epoch(args, rows))


def _epochs(args: TrainingArguments, steps: int, rows: int) -> float:
    return steps / _steps_per_epoch(args, rows) if args.max_steps > 0 else args.num_train_epochs
