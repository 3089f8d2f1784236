"""[`plan`]: estimate the cost of a run before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import TrainingArguments

from ..utils.counted import counted
from .run import load_inputs
from .run_config import RunConfig


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
    """

    samples: int
    safety_samples: int
    tokens: int
    safety_tokens: int
    steps: int
    safety_steps: int
    records: int
    extra_fraction: float

    def __str__(self) -> str:
        return (
            f"Noisy finetuning: {counted(self.steps, 'step')} over {counted(self.samples, 'row')} "
            f"({counted(self.tokens, 'token')} per epoch). Safety finetuning: {counted(self.safety_steps, 'step')} over "
            f"{counted(self.safety_samples, 'row')}. Up to {counted(self.records, 'record')}. Safety finetuning "
            f"and the records cost at most {self.extra_fraction:.0%} of noisy finetuning."
        )


def plan(config: RunConfig) -> Plan:
    """Estimate the cost of [`run`]. Loads the rows and a tokenizer, but no model.

    Raises:
        ForgetFilterError, ValueError: as [`run`].
    """
    inputs = load_inputs(config)
    noisy, safety = inputs.noisy, inputs.safety
    steps, safety_steps = _steps(inputs.args, len(noisy)), _steps(inputs.safety_args, len(safety))
    records = 3  # the base model, the model after noisy finetuning, the model after safety finetuning
    if config.record_steps is not None:
        for session_steps in (steps, safety_steps):
            every = config.record_steps if config.record_steps >= 1 else config.record_steps * session_steps
            records += math.ceil(session_steps / every) - 1
    passes = 2 if config.use_lora else 3  # a training step, in forward passes
    trained = passes * _epochs(inputs.args, steps, len(noisy)) * len(noisy.tokens)
    extra = passes * _epochs(inputs.safety_args, safety_steps, len(safety)) * len(safety.tokens)
    extra += records * len(noisy.tokens)
    return Plan(
        len(noisy), len(safety), len(noisy.tokens), len(safety.tokens), steps, safety_steps, records, extra / trained
    )


def _steps_per_epoch(args: TrainingArguments, rows: int) -> int:
    batches = rows / (args.train_batch_size * args.world_size)
    whole_batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return max(math.ceil(whole_batches / args.gradient_accumulation_steps), 1)


def _steps(args: TrainingArguments, rows: int) -> int:
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * _steps_per_epoch(args, rows))


def _epochs(args: TrainingArguments, steps: int, rows: int) -> float:
    return steps / _steps_per_epoch(args, rows) if args.max_steps > 0 else args.num_train_epochs
