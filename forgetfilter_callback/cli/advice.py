"""Whether a trace is complete, what is missing in it, and what to type."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TraceError
from ..pipeline.output_record import CONFIG_FILE, MODEL_FOLDER, has_checkpoints, has_saved_model, is_recorded
from ..trace.lock_folder import is_locked
from .options import load_yaml


if TYPE_CHECKING:
    from ..trace.trace import Trace

WAIT_OR_END = "Wait until it has finished, or end it. Then type this command again."
NOTEBOOK_LOCK = (
    "A notebook in which training was interrupted locks the trace until it trains again or its kernel is restarted."
)


def is_measurable(trace: Trace) -> bool:
    """Whether a trace holds the first and a later record of the safety session."""
    steps = [record.step for record in trace.records() if record.session == "safety"]
    return 0 in steps and len(steps) > 1


def how_to_finish(trace: Trace) -> str | None:
    """Say that another process records into a trace, or what `forgetfilter run` or `score` has not completed in it.

    Returns `None` for complete traces, and for those that a Python program has recorded, which has to continue.
    """
    run_folder = _run_folder(trace)
    if is_locked(trace.folder):
        if run_folder is not None:
            return f"The run in {run_folder} is still going on in another process. {WAIT_OR_END}"
        return f"The trace in {trace.folder} is being recorded by another process. {WAIT_OR_END} {NOTEBOOK_LOCK}"
    if run_folder is not None:
        return None if _is_finished(run_folder) else _how_to_resume(run_folder)
    if trace.manifest["sessions"] or is_measurable(trace):
        return None
    steps = [record.step for record in trace.records() if record.session == "safety"]
    missing = [role for role, step in (("before", 0), ("after", 1)) if step not in steps]
    noisy = trace.manifest.get("source", "FILE")
    models = [part for role in missing for part in (f"--{role}", "MODEL")]
    command = shlex.join(["forgetfilter", "score", "--noisy", noisy, *models, "--output", str(trace.folder)])
    return (
        f"The trace in {trace.folder} has no record of the model {' and of the model '.join(missing)} safety finetuning. "
        f"Record it: {command}"
    )


def what_is_missing(trace: Trace) -> str | None:
    """As [`how_to_finish`], also for traces that a Python program has recorded. `None` if the trace is complete."""
    advice = how_to_finish(trace)
    if advice is not None:
        return advice
    try:
        trace.first_and_last()
    except TraceError as error:
        return str(error)
    if _run_folder(trace) is not None:  # a finished run can only have been stopped early on purpose
        return None
    for entry in trace.manifest["sessions"]:
        steps = [record.step for record in trace.records() if record.session == entry["session"]]
        last = max(steps, default=0)
        if last < entry["max_steps"]:
            return (
                f"The {entry['session']} session ended at step {last} of {entry['max_steps']}. If it was not stopped early "
                "on purpose, resume it from its last checkpoint."
            )
    return None


def what_is_kept(trace_folder: Path) -> Callable[[], str]:
    """Call it before `forgetfilter run` or `score` begins to record.

    Returns:
        `Callable`: for [`after_interrupt`]. It says which records are kept, and how to continue.
    """
    from ..pipeline.locked_output import record_versions
    from ..trace.trace import Trace

    before = record_versions(trace_folder)

    def describe() -> str:
        # Without a new record, the settings on disk are those of the run before, if there was one.
        if record_versions(trace_folder) == before:
            kept = "There was no new record yet." if before else "There was no record yet, so nothing was kept."
            return f"{kept} Type the same command again."
        return f"The finished records are kept. {how_to_finish(Trace.open(trace_folder)) or 'The trace is complete.'}"

    return describe


def _run_folder(trace: Trace) -> Path | None:
    """The output folder of the `forgetfilter run` that has recorded `trace`."""
    from ..trace.trace_folder import TRACE_FOLDER

    folder = trace.folder.parent
    is_run = trace.folder.name == TRACE_FOLDER and is_recorded(folder, CONFIG_FILE) and (folder / CONFIG_FILE).is_file()
    return folder if is_run else None


def _is_finished(run_folder: Path) -> bool:
    """Whether `forgetfilter run` has written all its outputs."""
    if not (run_folder / "kept.jsonl").exists():
        return False
    return not _refits(run_folder) or has_saved_model(run_folder)


def _refits(run_folder: Path) -> bool:
    """Whether `forgetfilter run` finetunes on the kept rows. Its settings may come from another version, or be damaged."""
    try:
        settings = load_yaml(run_folder / CONFIG_FILE)
    except ValueError:
        settings = None
    return bool(settings.get("refit")) if isinstance(settings, dict) else is_recorded(run_folder, MODEL_FOLDER)


def _how_to_resume(run_folder: Path) -> str:
    file = str(run_folder / CONFIG_FILE)
    command = shlex.join(["forgetfilter", "run", "--config", file, "--output", str(run_folder), "--resume"])
    if has_checkpoints(run_folder):
        return f"The run in {run_folder} has not finished. Continue it: {command}"
    return (
        f"The run in {run_folder} has not finished. It has no checkpoint (a run saves them with --training "
        f"save_strategy=epoch), so this command trains from the beginning: {command}"
    )
