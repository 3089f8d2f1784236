"""TODO"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..data.loading import encode_source, load_rows
from .inputs import _refuse_overlap, _tokenizer_and_length
from .run_config import RunConfig


@dataclass(frozen=True)
class Plan:
    """What a run will cost, before it is run.

    Attributes:
        samples, safety_samples (`int`): Rows.
        tokens, safety_tokens (`int`): Of them.
        steps, safety_steps (`int`): Optimizer steps of S1 and of S1+.
        records (`int`): Forward passes over the noisy set.
        extra_fraction (`float`): S1+ and the records, as a part of S1's compute; the refit is left out.
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
            f"S1: {self.steps:,} steps over {self.samples:,} rows ({self.tokens:,} tokens an epoch). "
            f"S1+: {self.safety_steps:,} steps over {self.safety_samples:,} rows. Up to {self.records} records. "
            f"S1+ and the records cost at most {self.extra_fraction:.0%} of S1."
        )


def plan(config: RunConfig) -> Plan:
    """Reads the rows, and says what [`run`] would cost. Loads a tokenizer, no model."""
    tokenizer, max_length = _tokenizer_and_length(config)
    noisy, safety = (
        encode_source(source, load_rows(source), tokenizer, max_length) for source in (config.noisy, config.safety)
    )
    _refuse_overlap(noisy, safety)
    steps, safety_steps = (
        math.ceil(epochs * math.ceil(math.ceil(len(rows) / config.batch_size) / config.gradient_accumulation_steps))
        for rows, epochs in ((noisy, config.epochs), (safety, config.safety_epochs))
    )
    every = config.record_steps
    between = (
        0
        if every is None
        else sum(math.ceil(s / (every if every >= 1 else every * s)) - 1 for s in (steps, safety_steps))
    )
    records = 3 + between  # M0, M1 (which S1+ begins with), M2
    passes = 2 if config.lora_r else 3  # forward and backward
    trained = passes * config.epochs * len(noisy.tokens)
    extra = passes * config.safety_epochs * len(safety.tokens) + records * len(noisy.tokens)
    return Plan(
        len(noisy), len(safety), len(noisy.tokens), len(safety.tokens), steps, safety_steps, records, extra / trained
    )
