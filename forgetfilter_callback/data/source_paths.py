"""Check that files exist before anything is imported that could read them."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError


FILE_EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")


def check_source(source: str) -> None:
    """Check that `source`, as [`load_rows`] takes it, exists and is not empty. Hub ids are not looked up.

    Raises:
        DataError: if it names a file or folder that does not exist, an empty file, or a file of another format.
    """
    path = Path(source)
    if not path.exists() and (path.suffix.lower() in FILE_EXTENSIONS or is_path(source)):
        raise DataError(f"File {source} does not exist.")
    if path.is_file() and path.suffix.lower() not in FILE_EXTENSIONS:
        raise DataError(
            f"{source} has the extension {path.suffix!r}, which is not supported. Convert the file to one of "
            f"{', '.join(FILE_EXTENSIONS)}, and name it so."
        )
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{source} is empty.")


def check_model(name: str, kind: str = "model") -> None:
    """Check that the folder of a model or tokenizer exists. Hub ids are not looked up.

    Raises:
        DataError: if it names a folder that does not exist.
    """
    if is_path(name) and not Path(name).exists():
        raise DataError(f"The {kind} {name!r} cannot be loaded: the folder does not exist.")


def cannot_be_loaded(name: str, error: Exception, kind: str = "model") -> str:
    """The message for a model or tokenizer that transformers cannot load. If no folder has its name, it is a Hub id."""
    place = "" if Path(name).exists() else "There is no such folder. From the Hub: "
    return f"The {kind} {name!r} cannot be loaded. {place}{str(error).splitlines()[0]}"


def is_path(name: str) -> bool:
    """Whether `name` can only be a path, not the Hub id `owner/name`."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or len(Path(name).parts) > 2
