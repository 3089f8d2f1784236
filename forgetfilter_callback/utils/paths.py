"""Resolve names that may be local paths or Hub ids."""

from __future__ import annotations

from pathlib import Path


def absolute_path_or_hub_id(name: str) -> str:
    """Return the absolute path of an existing file or folder, and any other name (a Hub id) unchanged.

    An absolute path stays valid when a trace is read from another working directory.
    """
    return str(Path(name).absolute()) if name and Path(name).exists() else name
