"""TODO"""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc
from transformers import (
    PreTrainedTokenizerBase,
)

from ..data.encoded_rows import EncodedRows
from ..data.tokenizers import load_tokenizer, model_context_length
from ..errors import DataError
from .run_config import RunConfig


def _refuse_overlap(noisy: EncodedRows, safety: EncodedRows) -> None:
    shared = pc.is_in(safety.ids, value_set=noisy.ids).true_count
    if shared:
        raise DataError(
            f"{shared} of the {len(safety)} safe rows are in the noisy set too, so they cannot be forgotten. Take them "
            "out of one of the two."
        )


def refuse_own_input(source: str, output: Path) -> None:
    """The kept rows of an earlier run must not be overwritten by those of this one, which are fewer."""
    if Path(source).resolve() in [(output / f"{name}.jsonl").resolve() for name in ("kept", "removed")]:
        raise DataError(f"{source} would be overwritten by what is left of it. Name another --output.")


def _tokenizer_and_length(config: RunConfig) -> tuple[PreTrainedTokenizerBase, int | None]:
    """The model's tokenizer, and how long a row may be."""
    tokenizer = load_tokenizer(config.model)
    return tokenizer, config.max_length if config.max_length is not None else model_context_length(config.model)
