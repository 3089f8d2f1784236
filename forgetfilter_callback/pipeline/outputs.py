"""TODO"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from transformers import (
    PreTrainedTokenizerBase,
)

from ..data.json_lines import file_digest, source_lines
from ..data.loading import encode_source, load_rows
from ..errors import DecisionError
from ..filtering.find_forgotten import find_forgotten
from ..filtering.result import FilterResult
from ..filtering.review_decision import load_review
from ..measures.names import DEFAULT_MEASURE, Measure
from ..reports.card import dataset_card
from ..thresholds import Threshold
from ..trace.source import load_trace_tokenizer, source_path
from ..trace.trace import Trace
from ..utils.atomic_files import atomic_write, write_lines, write_text
from .inputs import refuse_own_input


def filter_rows(
    trace: Trace,
    output: str | Path,
    source: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    measure: Measure | None = None,
    threshold: Threshold = "auto",
    fraction: float | None = None,
    decision: str | Path | None = None,
    step: int | None = None,
) -> FilterResult:
    """Parts rows by a trace into kept and removed ones, and writes them.

    Args:
        trace ([`Trace`]):
            With records of S1+.
        output (`str` or `Path`):
            Where [`write_filter_outputs`] writes.
        source (`str`, *optional*):
            The noisy set, as [`load_rows`] takes it; by default that which the trace was made of, if it says where it lies.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            By default that of the trace.
        measure, threshold, share, decision:
            As in [`FilteredTrainer`].
        step (`int`, *optional*):
            As in [`find_forgotten`].

    Raises:
        DataError: if the trace does not say where its rows lie.
        ValueError: if more than 1 % of the rows are not those of the trace.
    """
    overrides = None
    if decision is not None:
        if step is not None:
            raise DecisionError("A decision is on the last record of S1+: give `decision` or `step`.")
        review = load_review(decision, trace, measure, threshold, fraction)
        measure, overrides = review.measure, review.overrides
        threshold = review.threshold if review.threshold is not None else math.inf
    source = source if source is not None else source_path(trace)
    refuse_own_input(source, Path(output))
    digest = file_digest(source)
    rows = load_rows(source)
    tokenizer = tokenizer if tokenizer is not None else load_trace_tokenizer(trace)
    encoded = encode_source(source, rows, tokenizer, trace.manifest["max_length"], **trace.manifest["encoding"])
    result = find_forgotten(trace, measure or DEFAULT_MEASURE, threshold, fraction, step, encoded.ids, overrides)
    write_filter_outputs(Path(output), source_lines(source, rows, digest), result, trace)
    return result


def write_filter_outputs(output: Path, lines: Iterable[str], result: FilterResult, trace: Trace) -> None:
    """Writes `kept.jsonl` and `removed.jsonl` (`lines`, a row each), `card.md`, and `decision/` (values and account): none
    of them if one cannot be written."""
    output.mkdir(parents=True, exist_ok=True)
    lines = [*lines]
    with ExitStack() as parts:
        for name, which in (("kept", ~result.removed), ("removed", result.removed)):
            write_lines(itertools.compress(lines, which), parts.enter_context(atomic_write(output / f"{name}.jsonl")))
        write_text(dataset_card(result, trace), parts.enter_context(atomic_write(output / "card.md")))
        result.save(output / "decision")
