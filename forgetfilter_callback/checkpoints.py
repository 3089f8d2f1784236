"""Records of models that are there already, without training: of one, or of two to compare."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from filelock import FileLock
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .encoding import EncodedRows
from .files import whole_name
from .model_state import untouched
from .processes import gathered, main_process_does, process
from .recorder import has_states
from .scoring import window_scores
from .trace import TRACE_FOLDER, Record, Trace
from .trace_files import TraceError


# What each checkpoint's record is called in the trace, as if the tracker had been there.
RECORD_OF = {"base": Record("S1", 0), "before": Record("S1+", 0), "after": Record("S1+", 1)}


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
            Trace.create(folder, rows, whole_name(first), whole_name(name), max_length)

    try:
        main_process_does(create_or_find)
        trace = Trace.open(folder)
        if trace.rows.fingerprint != rows.fingerprint:
            raise TraceError(f"The trace in {folder} is of other rows, or of another tokenizer. Choose another folder.")
        if trace.manifest["sessions"]:
            raise TraceError(f"The trace in {folder} is of sessions that were tracked. Choose another folder.")
        without_base = all(gathered(trace.base_record is None))
        begins_with = checkpoints.get("base", checkpoints.get("before") if without_base else None)
        if begins_with is not None:
            main_process_does(partial(trace.note_model, whole_name(begins_with), whole_name(name)))
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
    with untouched(model):
        scores = window_scores(
            model,
            trace.rows,
            batch_tokens,
            disable_tqdm=disable_tqdm or process()[0] > 0,
            description=role,
            with_states=has_states(RECORD_OF[role]),
        )
        main_process_does(partial(trace.append, RECORD_OF[role], scores), meanwhile=scores)


def _load(checkpoint: str, device: torch.device) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", trust_remote_code=False).to(device)
    except (OSError, ValueError) as error:
        raise TraceError(f"The model {checkpoint!r} cannot be loaded: {str(error).splitlines()[0]}") from error


def trace_folder(path: str | os.PathLike[str]) -> Path:
    """The trace in `path`: itself, or where a run's output folder has it."""
    inside = Path(path) / TRACE_FOLDER
    return inside if Trace.exists(inside) and not Trace.exists(path) else Path(path)
