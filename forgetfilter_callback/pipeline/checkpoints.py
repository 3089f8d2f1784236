"""Records of models that are there already, without training: of one, or of two to compare."""

from __future__ import annotations

import os
from functools import partial

import torch
from accelerate import PartialState
from filelock import FileLock
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoded_rows import EncodedRows
from ..errors import TraceError
from ..scoring.token_losses import window_scores
from ..trace.records import Record, has_states
from ..trace.trace import Trace
from ..utils.distributed import gather_from_all, rank_and_world_size, run_on_main
from ..utils.model_state import preserve_state
from ..utils.paths import absolute_path_or_hub_id


# What each checkpoint's record is called in the trace, as if the tracker had been there.
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
    """Records the losses of `rows` under checkpoints, into a trace as [`ForgetTracker`] makes it.

    Under `torchrun` the rows are shared out over the processes, and the main process writes.

    Args:
        folder (`str` or `Path`):
            Of the trace. One that is there already, of the same rows, gets the new records.
        rows ([`EncodedRows`]):
            The noisy set.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            It was encoded with.
        checkpoints (`dict[str, str]`):
            Hub ids or folders of models or PEFT adapters: `"before"` (M1, which has learnt the rows), `"after"` (M2, after
            safety finetuning), `"base"` (M0, for relative forgetting).
        max_length, batch_tokens:
            As in [`ForgetTracker`].
        disable_tqdm (`bool`, defaults to `False`):
            Whether to hide the progress bars.

    Raises:
        TraceError: if the trace in `folder` is of other rows, or is a tracker's; if a model cannot be loaded.
    """
    # Joins the other processes, if there are any; on a machine without an accelerator it has to be told so.
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    name = tokenizer.name_or_path
    first = next(iter(checkpoints.values()))
    model: PreTrainedModel | None = _load(first, device)  # before anything is written
    locks: list[FileLock | None] = []  # of the main process

    def create_or_find() -> None:
        locks.append(Trace.lock(folder))
        if not Trace.exists(folder):
            Trace.create(folder, rows, absolute_path_or_hub_id(first), absolute_path_or_hub_id(name), max_length)

    try:
        run_on_main(create_or_find)
        trace = Trace.open(folder)
        if trace.rows.fingerprint != rows.fingerprint:
            raise TraceError(f"The trace in {folder} is of other rows, or of another tokenizer. Choose another folder.")
        if trace.manifest["sessions"]:
            raise TraceError(f"The trace in {folder} is of sessions that were tracked. Choose another folder.")
        without_base = all(gather_from_all(trace.base_record is None))
        begins_with = checkpoints.get("base", checkpoints.get("before") if without_base else None)
        if begins_with is not None:
            run_on_main(partial(trace.note_model, absolute_path_or_hub_id(begins_with), absolute_path_or_hub_id(name)))
        for role, checkpoint in checkpoints.items():
            if model is None:
                model = _load(checkpoint, device)
            _record(trace, role, model, batch_tokens, disable_tqdm)
            model = None  # the next one may not fit beside it
    finally:
        for lock in locks:
            if lock is not None:
                lock.release()
    return trace


def _record(trace: Trace, role: str, model: PreTrainedModel, batch_tokens: int | None, disable_tqdm: bool) -> None:
    with preserve_state(model):
        scores = window_scores(
            model,
            trace.rows,
            batch_tokens,
            disable_tqdm=disable_tqdm or rank_and_world_size()[0] > 0,
            description=role,
            with_states=has_states(RECORD_OF[role]),
        )
        run_on_main(partial(trace.append, RECORD_OF[role], scores), drain=scores)


def _load(checkpoint: str, device: torch.device) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", trust_remote_code=False).to(device)
    except (OSError, ValueError) as error:
        raise TraceError(f"The model {checkpoint!r} cannot be loaded: {str(error).splitlines()[0]}") from error
