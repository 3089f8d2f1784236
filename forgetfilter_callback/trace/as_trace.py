"""Accept a trace or its folder."""

from __future__ import annotations

import os
from typing import Any

from .trace import Trace


TraceOrFolder = Trace | str | os.PathLike[str]


def as_trace(trace: Any) -> Trace:
    """Return a trace, which may be given as a folder that [`Trace.open`] takes.

    Raises:
        TypeError: if `trace` is anything else.
        TraceError: as in [`Trace.open`].
    """
    if isinstance(trace, Trace):
        return trace
    if isinstance(trace, str | os.PathLike):
        return Trace.open(trace)
    raise TypeError(
        f"`trace` must be a Trace or its folder, but it is {type(trace).__name__}. The trace of a tracker is "
        "`tracker.trace`."
    )
