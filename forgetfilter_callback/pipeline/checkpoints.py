"""[`score_checkpoints`]: record models that are already finetuned, without training."""

from __future__ import annotations

import os
from functools import partial
from typing import cast

import torch
from accelerate import PartialState
from filelock import FileLock
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoded_rows import EncodedRows
from ..errors import TraceError
from ..scoring.token_losses import window_scores
from ..trace.records import Record
from ..trace.trace import Trace
from ..utils.distributed import gather_from_all, rank_and_world_size, run_on_main
from ..utils.model_state import preserve_state
from ..utils.paths import absolute_path_or_hub_id


# The record that each checkpoint gets, as in a tracked run.
RECORD_OF = {"base": Record("noisy", 0), "before": Record("safety", 0), "after": Record("safety", 1)}


def score_checkpoints(
    folder: str | os.PathLike[str],
    rows: EncodedRows,
    tokenizer: PreTrainedTokenizerBase,
    checkpoints: dict[str, str],
    max_length: int | None = None,
    batch_tokens: int | None = None,
    disable_tqdm: bool = False,
) -> Trace:
    """Record the losses of `rows` under checkpoints, into the same trace that [`ForgetTracker`] writes.

    Under `torchrun`, the rows are split over the processes, and the main process writes.

    Args:
        folder (`str` or `Path`):
            Folder of the trace. An existing trace of the same rows gets the new records.
        rows ([`EncodedRows`]):
            The noisy set.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer that `rows` were encoded with.
        checkpoints (`dict[str, str]`):
            Hub ids or folders of models or PEFT adapters: `"before"` (the model that has learned the rows), `"after"` (the
            same after safety finetuning) and, for relative forgetting, `"base"` (the base model).
        max_length, batch_tokens:
            As in [`ForgetTracker`].
        disable_tqdm (`bool`, defaults to `False`):
            Whether to hide progress bars.

    Returns:
        [`Trace`]

    Raises:
        TraceError: if the trace in `folder` belongs to other rows or to a tracked run, or if a model cannot be loaded.
    """
    # Initializes torch.distributed under torchrun. Without an accelerator, `cpu=True` must be passed.
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    tokenizer_name = absolute_path_or_hub_id(tokenizer.name_or_path)
    first_checkpoint = next(iter(checkpoints.values()))
    model: PreTrainedModel | None = _load(first_checkpoint, device)  # fails before anything is written
    locks: list[FileLock | None] = []  # of the main process

    def open_or_create() -> None:
        locks.append(Trace.lock(folder))
        if not Trace.exists(folder):
            Trace.create(folder, rows, absolute_path_or_hub_id(first_checkpoint), tokenizer_name, max_length)

    try:
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
        has_no_base = all(gather_from_all(trace.base_record is None))
        start_model = checkpoints.get("base", checkpoints.get("before") if has_no_base else None)
        if start_model is not None:
            run_on_main(partial(trace.set_model, absolute_path_or_hub_id(start_model), tokenizer_name))
        for role, checkpoint in checkpoints.items():
            if model is None:
                model = _load(checkpoint, device)
            _record(trace, role, model, batch_tokens, disable_tqdm)
            model = None  # two models may not fit into memory
    finally:
        for lock in locks:
            if lock is not None:
                lock.release()
    return trace


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
        run_on_main(partial(trace.append, record, scores), drain=scores)


def _load(checkpoint: str, device: torch.device) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", trust_remote_code=False)
        return cast(nn.Module, model).to(device)  # type: ignore[return-value] # the decorated `to` hides its types
    except (OSError, ValueError) as error:
        raise TraceError(f"The model {checkpoint!r} cannot be loaded: {str(error).splitlines()[0]}") from error
