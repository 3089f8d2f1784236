"""[`check_output_file`]: refuse to write an output over the rows, over files of a trace, or over anything from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import DataError
from .trace import Trace


def check_output_file(
    trace: Trace, file: Path, is_earlier_output: Callable[[Path], bool], source: str | None = None
) -> None:
    """Check that a command may write `file`: that it is new, or an output of the same command.

    Args:
        trace ([`Trace`]):
            The trace that the output is made from.
        file (`Path`):
            The file to write.
        is_earlier_output (`Callable`):
            Whether an existing file is an output of the same command.
        source (`str`, *optional*):
            The noisy set. Defaults to the file that the trace names.

    Raises:
        DataError: if it is the noisy set, if it is in the folder of a trace, or if it comes from elsewhere.
    """
    source = source if source is not None else trace.manifest.get("source")
    resolved = file.resolve()
    if source is not None and Path(source).resolve() == resolved:
        raise DataError(f"{file} is the noisy set and would be overwritten. Choose another file.")
    folder = next((parent for parent in resolved.parents if Trace.exists(parent)), None)
    if folder is not None:
        raise DataError(f"{file} is in the folder of a trace, {folder}. Choose a file outside of it.")
    if file.exists() and not (file.is_file() and is_earlier_output(file)):
        raise DataError(
            f"{file} exists, and it is not an earlier output of this command, so it is not overwritten. Choose another "
            "file, or move it."
        )
