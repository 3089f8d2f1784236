"""Accept a trace or its folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .trace import TRACE_FOLDER, Trace


TraceOrFolder = Trace | str | os.PathLike[str]


def as_trace(trace: Any) -> Trace:
    """Return a trace, which may be given as its folder, or as the output folder of a run with a trace.

    Raises:
        TypeError: if `trace` is anything else.
        TraceError: as in [`Trace.open`].
    """
    if isinstance(trace, Trace):
        return trace
    if isinstance(trace, str | os.PathLike):
        return Trace.open(find_trace_folder(trace))
    raise TypeError(
        f"`trace` must be a Trace or its folder, but it is {type(trace).__name__}. The trace of a tracker is "
        "`tracker.trace`."
    )


def find_trace_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a trace: `path` itself, or the trace inside the output folder `path` of a run."""
    inside = Path(path) / TRACE_FOLDER
    return inside if inside.is_dir() and not Trace.exists(path) else Path(path)
