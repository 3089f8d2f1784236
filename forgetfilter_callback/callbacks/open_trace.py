"""Open or create the trace of a tracker when its first session begins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments

from ..data.as_rows import as_rows, each_row
from ..data.audit_labels import as_labels
from ..data.blank_completions import describe_blank_completions
from ..data.decode import decode
from ..data.encoded_rows import EncodedRows
from ..data.tokenizers import unwrap_tokenizer
from ..errors import DataError, TraceError, UnsupportedDatasetError
from ..scoring.model_capabilities import check_is_causal, describe_left_padding
from ..trace.trace import Trace
from ..utils.counted import counted, counted_of
from ..utils.distributed import run_on_main
from ..utils.paths import absolute_path_or_hub_id
from ..utils.row_numbers import describe_rows
from .session_rows import encode_noisy_rows, is_sft_config, scoring_max_length, sft_encoding_options
from .sessions import SessionArgument, count_overlap


logger = get_logger(__name__)

_PREPARED_ROWS = (
    "The row numbers are those of the set that SFTTrainer has prepared (`trainer.train_dataset`): it can lack rows, and "
    "`shuffle_dataset` changes their order."
)


def open_trace(
    folder: Path,
    noisy: Any,
    session: SessionArgument,
    max_length: int | None,
    *,
    continue_trace: bool,
    resumed_step: int,
    args: TrainingArguments,
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    train_dataloader: torch.utils.data.DataLoader,
) -> tuple[Trace, EncodedRows | None]:
    """Open the trace in `folder`, or create it.

    Args:
        folder (`Path`):
            The folder of the trace.
        noisy, session, max_length:
            As in [`ForgetTracker`].
        continue_trace (`bool`):
            Whether an existing trace is opened without checking its rows, if `noisy` is not given.
        resumed_step (`int`):
            The step at which the run resumes; 0 for a new run.
        args, model, processing_class, train_dataloader:
            Of the trainer.

    Returns:
        `tuple`: the trace, and the tracked rows in the order in which they were given. `None` if they are those of an
        existing trace only.

    Raises:
        ScoringError: if the model is not a causal language model.
        TraceError: if the trace in `folder` belongs to other rows, if the noisy set is unknown, or if a resumed run has no
            trace.
    """
    check_is_causal(model)
    exists = run_on_main(partial(Trace.exists, folder))
    if resumed_step > 0 and not exists:
        raise TraceError(
            f"This run resumes at step {resumed_step}, but there is no trace in {folder}. A new trace would lack the first "
            "record of the session. Pass the folder of the trace that the run started with: "
            "`ForgetTracker(trace_dir=...)`. By default, it is `_forgetfilter` in the output folder of the noisy session. "
            "If there is none, start the session again, or train without the tracker."
        )
    if continue_trace and noisy is None and exists:
        return Trace.open(folder), None
    if noisy is None and session == "safety":
        raise TraceError(
            "ForgetTracker(session='safety') does not know the noisy set. Pass its rows, `ForgetTracker(noisy, "
            "session='safety')`, or the folder of the trace of the noisy session as `trace_dir`."
        )
    scored_length = scoring_max_length(model, args, max_length)
    rows = encode_noisy_rows(noisy, session, args, model, processing_class, train_dataloader, scored_length)
    encoding = sft_encoding_options(args, processing_class)
    if rows.truncated:
        side = "left" if encoding.get("keep_end", False) else "right"
        logger.warning(
            f"{counted_of(rows.truncated, len(rows), 'row', 'were')} truncated on the {side}, to {scored_length} tokens. "
            "The truncated tokens are not scored."
        )
    numbering = f" {_PREPARED_ROWS}" if noisy is None and is_sft_config(args) else ""
    without_loss = np.flatnonzero(np.diff(rows.loss_offsets) == 0)
    if len(without_loss):
        logger.warning(
            f"{counted_of(len(without_loss), len(rows), 'row', 'have')} no token that contributes to the loss "
            f"({describe_rows(without_loss)}). Their forgetting is NaN, and they are kept. Check their labels and "
            f"max_length.{numbering}"
        )
    tokenizer = unwrap_tokenizer(processing_class)
    blank_completions = describe_blank_completions(rows, tokenizer) if tokenizer is not None else None
    if blank_completions is not None:
        blank_completions += numbering
    for description in (rows.describe_padding(), describe_left_padding(model, rows), blank_completions):
        if description is not None:
            logger.warning(description)
    template = encoding.get("chat_template") or ("" if tokenizer is None else tokenizer.chat_template)
    if tokenizer is not None and _contains_date(tokenizer, str(template), rows):
        logger.warning(
            "The chat template prints today's date (`strftime_now`). Rows that are prepared on another day are other rows: "
            "training cannot be resumed with them, and they cannot be filtered. Write a date into the template."
        )
    names = model_and_tokenizer_names(model, tokenizer)

    def create_manifest() -> dict[str, Any] | None:
        if Trace.exists(folder):
            return None
        return Trace.create(folder, rows, *names, scored_length, encoding).manifest

    manifest = run_on_main(create_manifest)
    if manifest is not None:
        return Trace(folder, rows, manifest), rows
    trace = Trace.open(folder)
    overlap = count_overlap(rows, trace.rows)
    if not overlap == len(rows) == len(trace.rows):  # in any order
        raise TraceError(
            f"The trace in {folder} belongs to another dataset or tokenizer: "
            f"{counted_of(overlap, len(rows), 'row', 'are')} among its {counted(len(trace.rows), 'row')} (its "
            f"tokenizer is {trace.manifest['tokenizer']!r}; max_length and chat template must be the same too). If this is "
            f"the safety session of that trace, new or resumed, use `ForgetTracker(trace_dir={str(folder)!r})`. Otherwise "
            "choose another `trace_dir` or `output_dir`."
        )
    return trace, rows


def _contains_date(tokenizer: PreTrainedTokenizerBase, template: str, rows: EncodedRows) -> bool:
    """Whether one of the first rows contains today's date in a format of the chat template."""
    dates = [datetime.now().strftime(each) for each in re.findall(r"""strftime_now\(\s*['"]([^'"]+)""", template)]
    texts = [decode(tokenizer, rows.sample(row)[0].tolist()) for row in range(min(len(rows), 10))] if dates else []
    return any(date in text for date in dates for text in texts)


def read_audit_labels(noisy: Any, audit_column: str) -> np.ndarray:
    """The audit labels of `noisy`: shape `(samples,)`, bool.

    Raises:
        EncodingError: if `noisy` is a stream, is not a table of rows, or has no rows.
        DataError: if a row has no such column, or no audit label in it. See [`as_labels`].
        ValueError: if there are no rows.
    """
    if noisy is None:
        raise ValueError(f"audit_column={audit_column!r} must be a column of `noisy`, but no rows were given.")
    noisy = as_rows(noisy, "`noisy`")
    if isinstance(noisy, torch.utils.data.IterableDataset):
        raise UnsupportedDatasetError(
            f"audit_column={audit_column!r} needs the rows in a fixed order, but `noisy` is a stream "
            f"({type(noisy).__name__}). Pass a map-style dataset or a list of rows."
        )
    labels = []
    for index, row in enumerate(each_row(noisy)):
        if not isinstance(row, Mapping) or audit_column not in row:
            has = f"has {sorted(row)}" if isinstance(row, Mapping) else f"is {type(row).__name__}"
            raise DataError(f"audit_column={audit_column!r} must be a column of `noisy`, but row {index} {has}.")
        labels.append(row[audit_column])
    return as_labels(labels, f"The column {audit_column!r}")


def model_and_tokenizer_names(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[str, str | None]:
    """Names of the model and its tokenizer for the manifest: Hub ids or absolute paths."""
    tokenizer_name = absolute_path_or_hub_id(tokenizer.name_or_path) if tokenizer is not None else None
    return absolute_path_or_hub_id(model.config.name_or_path or ""), tokenizer_name
