"""Where a trace is."""

from __future__ import annotations

import os
from pathlib import Path


# `Trainer.push_to_hub` skips names that begin with "_". The trace contains the user's rows, which must not be published.
TRACE_FOLDER = "_forgetfilter"


def find_trace_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a trace: `path` itself, or the trace inside the output folder `path` of a run."""
    inside = Path(path) / TRACE_FOLDER
    return inside if inside.is_dir() and not has_trace(path) else Path(path)


def has_trace(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` itself is the folder of a trace."""
    return (Path(folder) / "manifest.json").is_file()
