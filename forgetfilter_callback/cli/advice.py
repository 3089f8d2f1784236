"""What to type so that an unfinished trace becomes complete."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..trace.trace import Trace


def is_measurable(trace: Trace) -> bool:
    """Whether a trace holds the first and a later record of the safety session."""
    steps = [record.step for record in trace.records() if record.session == "safety"]
    return 0 in steps and len(steps) > 1


def how_to_finish(trace: Trace) -> str | None:
    """What is missing in a trace that `forgetfilter run` or `forgetfilter score` has not completed, and what to type.

    Returns `None` for complete traces, and for those that a Python program has recorded, which has to continue.
    """
    run_folder = trace.folder.parent
    config = run_folder / "config.yaml"
    if config.is_file():
        if (run_folder / "kept.jsonl").exists():
            return None
        command = shlex.join(["forgetfilter", "run", "--config", str(config), "--output", str(run_folder), "--resume"])
        return f"The run in {run_folder} has not finished. Continue it: {command}"
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
