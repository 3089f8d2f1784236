"""Resolve and shorten names that may be local paths or Hub ids."""

from __future__ import annotations

import re
from pathlib import Path, PurePath


def absolute_path_or_hub_id(name: str) -> str:
    """Return the absolute path of an existing file or folder, and any other name (a Hub id) unchanged.

    An absolute path stays valid when a trace is read from another working directory.
    """
    return str(Path(name).absolute()) if name and Path(name).exists() else name


def short_model_name(name: str) -> str:
    """The name of a model for people.

    It is the Hub id of a folder in the Hub's cache, and the last folder of any other path. Folders that are named after a
    hash are left out, and checkpoints have the name of their run before them. Names with at most one slash are unchanged.
    """
    cached = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]", name)
    if cached is not None:
        return cached[1].replace("--", "/")
    path = PurePath(name)
    if not path.is_absolute() and len(path.parts) <= 2:
        return name
    parts = [part for part in path.parts if not re.fullmatch(r"[0-9a-f]{12,}", part)]
    return "/".join(parts[-2:] if parts[-1].startswith("checkpoint-") else parts[-1:])
