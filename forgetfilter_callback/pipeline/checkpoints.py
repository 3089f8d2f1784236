"""[`score_checkpoints`]: record models that are already finetuned, without training."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import cast

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoded_rows import EncodedRows
from ..data.load_rows import encode_source, load_rows, warn_about_rows
from ..data.output_lines import file_digest
from ..data.source_paths import cannot_be_loaded
from ..data.tokenizers import check_decoder_only, load_tokenizer, model_context_length
from ..errors import TraceError
from ..scoring.model_capabilities import describe_left_padding
from ..scoring.token_losses import window_scores
from ..trace.records import BASE_RECORD, Record
from ..trace.schema import WITHOUT_STATES, has_column
from ..trace.trace import Trace
from ..utils.argument_checks import check_max_length, check_minimum
from ..utils.distributed import gather_from_all, rank_and_world_size, run_on_main
from ..utils.model_state import preserve_state
from ..utils.paths import absolute_path_or_hub_id
from .locked_output import locked_output


logger = get_logger(__name__)

# The record that each checkpoint gets, as in a tracked run.
RECORD_OF = {"base": BASE_RECORD, "before": Record("safety", 0), "after": Record("safety", 1)}


def score_checkpoints(
    folder: str | os.PathLike[str],
    rows: EncodedRows,
    tokenizer: PreTrainedTokenizerBase,
    checkpoints: dict[str, str],
    batch_tokens: int | None = None,
    disable_tqdm: bool = False,
) -> Trace:
    """Record the losses of `rows` under checkpoints, into the same trace that [`ForgetTracker`] writes.

    Under `torchrun`, the rows are split over the processes, and the main process writes.

    Args:
        folder (`str` or `Path`):
            Folder of the trace. An existing trace of the same rows gets the new records.
        rows ([`EncodedRows`]):
            The noisy set, as [`encode_rows`] returns it. The trace also stores how the rows were encoded.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer that `rows` were encoded with.
        checkpoints (`dict[str, str]`):
            Hub ids or folders of models or PEFT adapters: `"before"` (the model that has learned the rows), `"after"` (the
            same after safety finetuning) and, for relative forgetting, `"base"` (the base model).
        batch_tokens (`int`, *optional*):
            As in [`ForgetTracker`].
        disable_tqdm (`bool`, defaults to `False`):
            Whether to hide progress bars.

    Returns:
        [`Trace`]

    Raises:
        DataError: if a model has an encoder, or if its configuration cannot be loaded.
        TraceError: if the trace in `folder` belongs to other rows or to a tracked run, or if a model cannot be loaded.
        TypeError: if `rows` or `tokenizer` is something else. Nothing is loaded then.
        ValueError: if `checkpoints` or `batch_tokens` is not valid. Nothing is loaded then.
    """
    _check_arguments(checkpoints, batch_tokens)
    if not isinstance(rows, EncodedRows):
        raise TypeError(
            f"`rows` must be EncodedRows, but it is {type(rows).__name__}. Pass `encode_rows(rows, tokenizer)`."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"`tokenizer` must be a `PreTrainedTokenizerBase`, but it is {type(tokenizer).__name__}. Pass the tokenizer "
            "that the rows were encoded with."
        )
    device = _start_processes()
    tokenizer_name = absolute_path_or_hub_id(tokenizer.name_or_path)
    first_checkpoint = next(iter(checkpoints.values()))
    model: PreTrainedModel | None = _load(first_checkpoint, device)  # fails before anything is written
    left_padding = describe_left_padding(cast(nn.Module, model), rows)
    if left_padding is not None:
        logger.warning(left_padding)

    def open_or_create() -> None:
        if not Trace.exists(folder):
            model_name = absolute_path_or_hub_id(first_checkpoint)
            Trace.create(folder, rows, model_name, tokenizer_name, rows.max_length, rows.encoding)

    compared = [absolute_path_or_hub_id(checkpoints[role]) for role in ("before", "after") if role in checkpoints]
    if len(compared) == 2 and len(set(compared)) == 1:
        logger.warning(
            f"The models before and after safety finetuning are both {compared[0]}, so no row will be forgotten."
        )
    with locked_output(Path(folder), Path(folder)):
        run_on_main(open_or_create)
        trace = Trace.open(folder)
        if trace.rows.fingerprint != rows.fingerprint:
            raise TraceError(
                f"The trace in {folder} contains other rows, or its rows were encoded with another tokenizer. "
                "Choose another folder."
            )
        if trace.manifest["sessions"]:
            raise TraceError(
                f"The trace in {folder} was recorded during training, not from checkpoints, so it cannot be "
                "continued here. Choose another folder."
            )
        has_no_base = all(gather_from_all(BASE_RECORD not in trace.records()))
        start_model = checkpoints.get("base", checkpoints.get("before") if has_no_base else None)
        if start_model is not None:
            run_on_main(partial(trace.set_model, absolute_path_or_hub_id(start_model), tokenizer_name))
        for role, checkpoint in checkpoints.items():
            if model is None:
                model = _load(checkpoint, device)
            _record(trace, role, model, batch_tokens, disable_tqdm)
            model = None  # two models may not fit into memory
    return trace


def score_source(
    folder: str | os.PathLike[str],
    source: str,
    checkpoints: dict[str, str],
    tokenizer: str | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
) -> Trace:
    """Load rows and record their losses with [`score_checkpoints`], as `forgetfilter score` does it.

    Args:
        source (`str`):
            The rows, as [`load_rows`] takes them. Under `torchrun`, only the main process reads them.
        tokenizer (`str`, *optional*):
            Hub id or folder. Defaults to the tokenizer of the first checkpoint.
        max_length (`int`, *optional*):
            Rows with more tokens are truncated on the right. Defaults to the context of the first checkpoint.
        folder, checkpoints, batch_tokens:
            As in [`score_checkpoints`].

    Raises:
        ForgetFilterError, ValueError: if the rows cannot be loaded or encoded, or as [`score_checkpoints`].
    """
    _check_arguments(checkpoints, batch_tokens)
    check_max_length(max_length)
    first = next(iter(checkpoints.values()))
    _start_processes()

    def load_on_main() -> tuple[PreTrainedTokenizerBase, str | None, EncodedRows]:
        loaded_tokenizer = load_tokenizer(tokenizer if tokenizer is not None else first)
        length = max_length if max_length is not None else model_context_length(first)
        digest = file_digest(source)
        rows = encode_source(source, load_rows(source), loaded_tokenizer, length)
        warn_about_rows(source, rows, loaded_tokenizer)
        return loaded_tokenizer, digest, rows

    loaded_tokenizer, digest, rows = run_on_main(load_on_main)
    trace = score_checkpoints(folder, rows, loaded_tokenizer, checkpoints, batch_tokens=batch_tokens)
    run_on_main(partial(trace.set_source, absolute_path_or_hub_id(source), digest, rows.truncated))
    return trace


def _check_arguments(checkpoints: dict[str, str], batch_tokens: int | None) -> None:
    known = "'before', 'after' or 'base'"
    if not isinstance(checkpoints, dict) or not checkpoints or not checkpoints.keys() <= RECORD_OF.keys():
        given = ", ".join(map(repr, checkpoints)) if isinstance(checkpoints, dict) else type(checkpoints).__name__
        raise ValueError(f"`checkpoints` must map {known} to models, but it has {given or 'no models'}.")
    for role, checkpoint in checkpoints.items():
        if not isinstance(checkpoint, str):
            raise ValueError(
                f"checkpoints[{role!r}] must be a Hub id or a folder as text, but it is {type(checkpoint).__name__}."
            )
    check_minimum("batch_tokens", batch_tokens, 1)


def _start_processes() -> torch.device:
    """Connect the processes of `torchrun`, if any, and return the device of this process."""
    return PartialState(cpu=not torch.accelerator.is_available()).device  # without an accelerator, it must be told so


def _record(trace: Trace, role: str, model: PreTrainedModel, batch_tokens: int | None, disable_tqdm: bool) -> None:
    record = RECORD_OF[role]
    with preserve_state(model):
        scores = window_scores(
            model,
            trace.rows,
            batch_tokens,
            disable_tqdm=disable_tqdm or rank_and_world_size()[0] > 0,
            description=f"Scoring {role}",
            with_states=record.has_states,
        )

        def append() -> None:
            replaces = record in trace.records()
            trace.append(record, scores)
            if record.has_states and not has_column(trace.folder / "records" / record.file_name, "state"):
                logger.warning(WITHOUT_STATES)
            if replaces:
                logger.warning(
                    f"The trace already had a record of the model {role!r}. It was replaced, and is kept in "
                    f"{trace.folder / 'superseded'}."
                )

        run_on_main(append, drain=scores)


def _load(checkpoint: str, device: torch.device) -> PreTrainedModel:
    check_decoder_only(checkpoint)
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", trust_remote_code=False)
        return cast(nn.Module, model).to(device)  # type: ignore[return-value] # the decorated `to` hides its types
    except (OSError, ValueError) as error:
        raise TraceError(cannot_be_loaded(checkpoint, error)) from error
