"""Whether a trace is complete, what is missing in it, and what to type."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TraceError
from ..pipeline.output_record import CONFIG_FILE, has_checkpoints, has_saved_model, is_recorded
from ..pipeline.run_config import RunConfig
from ..trace.lock_folder import is_locked
from .options import read_yaml


if TYPE_CHECKING:
    from ..trace.trace import Trace


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
        going_on = "is still going on in" if run_folder is not None else "is being recorded by"
        name = f"The run in {run_folder}" if run_folder is not None else f"The trace in {trace.folder}"
        return f"{name} {going_on} another process. Wait until it has finished, then type this command again."
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


def what_is_kept(output: Path) -> str:
    """What `forgetfilter run` or `score` leaves in `output` when Ctrl-C ends it, and how to continue."""
    from ..trace.source_files import find_trace_folder
    from ..trace.trace import Trace

    folder = find_trace_folder(output)
    if not Trace.exists(folder):
        return "There was no record yet, so nothing was kept. Type the same command again."
    return f"The finished records are kept. {how_to_finish(Trace.open(folder)) or 'The trace is complete.'}"


def _run_folder(trace: Trace) -> Path | None:
    """The output folder of the `forgetfilter run` that has recorded `trace`."""
    from ..trace.trace import TRACE_FOLDER

    folder = trace.folder.parent
    is_run = trace.folder.name == TRACE_FOLDER and is_recorded(folder, CONFIG_FILE) and (folder / CONFIG_FILE).is_file()
    return folder if is_run else None


def _is_finished(run_folder: Path) -> bool:
    """Whether `forgetfilter run` has written all its outputs."""
    if not (run_folder / "kept.jsonl").exists():
        return False
    settings = read_yaml(run_folder / CONFIG_FILE, RunConfig)
    return not settings.get("refit", False) or has_saved_model(run_folder)


def _how_to_resume(run_folder: Path) -> str:
    file = str(run_folder / CONFIG_FILE)
    command = shlex.join(["forgetfilter", "run", "--config", file, "--output", str(run_folder), "--resume"])
    if has_checkpoints(run_folder):
        return f"The run in {run_folder} has not finished. Continue it: {command}"
    return (
        f"The run in {run_folder} has not finished, and it has saved no checkpoints. Start it again from the beginning: "
        f"{command}"
    )
