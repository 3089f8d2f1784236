"""Keep files of a trace that are about to be replaced: `superseded/1`, `superseded/2` and so on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..utils.atomic_files import atomic_write


def supersede(folder: Path, moved: Sequence[Path], copied: Sequence[Path]) -> None:
    """Move and copy files of a trace to a new folder in `superseded`.

    Args:
        folder (`Path`):
            The folder of the trace.
        moved (`Sequence[Path]`):
            Files to move, in this order.
        copied (`Sequence[Path]`):
            Files that are about to be replaced. They stay where they are. Those that do not exist are left out.
    """
    copied = [file for file in copied if file.exists()]
    if not moved and not copied:
        return
    superseded = folder / "superseded"
    numbers = [int(earlier.name) for earlier in superseded.glob("*") if earlier.name.isdecimal()]
    target = superseded / str(1 + max(numbers, default=0))
    target.mkdir(parents=True)
    for file in copied:
        with atomic_write(target / file.name) as temporary_file:
            shutil.copyfile(file, temporary_file)
    for file in moved:
        os.replace(file, target / file.name)
