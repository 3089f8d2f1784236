"""Estimate what the records of a session cost, in training steps."""

from __future__ import annotations

import math

from transformers import PreTrainedModel, TrainerState, TrainingArguments

from ..data.encoded_rows import EncodedRows
from ..scoring.packing import needed_lengths
from ..utils.counted import counted
from .early_stopping import is_check_step, monitored_samples


def record_every(record_steps: int | float | None, state: TrainerState) -> int | None:
    """Number of steps between two records, or `None` for records at the beginning and at the end only."""
    if record_steps is None:
        return None
    return int(record_steps if record_steps >= 1 else math.ceil(record_steps * state.max_steps))


def describe_cost(
    args: TrainingArguments,
    state: TrainerState,
    model: PreTrainedModel,
    rows: EncodedRows,
    training_rows: EncodedRows | None,
    every: int | None,
    stop_early: bool,
    base_sampled: bool,
) -> str:
    """Sentences with the number of records of a session and their cost. It does not include generation (`rouge1=True`).

    Args:
        args, state, model:
            Of the trainer.
        rows ([`EncodedRows`]):
            The tracked rows.
        training_rows ([`EncodedRows`], *optional*):
            The rows the session trains on. If they are unknown, the cost is not compared with training steps.
        every (`int`, *optional*):
            Steps between two records; `None` for a record at the beginning and at the end only.
        stop_early (`bool`):
            Whether the session checks for early stopping.
        base_sampled (`bool`):
            Whether the first record holds only a few rows. It is not counted.
    """
    records = 2 if every is None else 1 + math.ceil(state.max_steps / every)
    records -= base_sampled
    tokens_per_record = sum(int(needed_lengths(window).sum()) for window in rows.windows())
    text = (
        f"Up to {counted(records, 'record')}: each measures the losses of {counted(len(rows), 'row')} "
        f"(up to {counted(tokens_per_record, 'token')})."
    )
    tokens = records * tokens_per_record
    if stop_early:
        monitored = monitored_samples(len(rows))
        checks = sum(map(is_check_step, range(1, state.max_steps - args.get_warmup_steps(state.max_steps))))
        text += f" Up to {counted(checks, 'check')} for early stopping: each measures {counted(monitored, 'row')}."
        tokens += checks * math.ceil(tokens_per_record * monitored / len(rows))
    if training_rows is None:
        return text
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens_per_step = samples_per_step * len(training_rows.tokens) / len(training_rows)
    # A backward pass costs two forward passes, or one if nearly all weights are frozen (adapters).
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    passes = 3 if trainable > 0.5 * sum(p.numel() for p in model.parameters()) else 2
    steps = math.ceil(tokens / (passes * tokens_per_step))
    session = f"the session has {state.max_steps:,}"
    return f"{text} This takes at most as long as {counted(steps, 'training step')} ({session})."
