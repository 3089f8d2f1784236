"""TODO"""

from __future__ import annotations

from pathlib import Path


def absolute_path_or_hub_id(name: str) -> str:
    """A file or folder with its whole path, so that it is found from elsewhere; or a Hub id."""
    return str(Path(name).absolute()) if name and Path(name).exists() else name
