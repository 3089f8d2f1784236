"""Which files of an output folder a command has written. Only these are replaced or deleted.

The record is a JSON file in the folder. It maps the name of a file to its hash, so that a file that somebody has changed
since is recognized. The hash is null from before a file is written until it is hashed, so that a crash does not leave files
that nobody seems to have written. It stays null for the files in `model`, because hashing a large model takes minutes.

The name `(complete)` is not a file. It says that a run has written all its outputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import DataError
from ..utils.atomic_files import file_version, write_json


RECORD_FILE = ".forgetfilter-outputs.json"
CONFIG_FILE = "config.yaml"
FILTER_OUTPUTS = (
    "kept.jsonl",
    "removed.jsonl",
    "card.md",
    "filter_result/filter_result.json",
    "filter_result/values.parquet",
)
MODEL_FOLDER, SESSIONS_FOLDER = "model", "sessions"
COMPLETE = "(complete)"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_ADVICE = "Choose another output folder, or move it."


def check_files_are_ours(output: Path, names: Iterable[str]) -> None:
    """Refuse to replace or delete files of `output` that no command has written, or that were changed since.

    Raises:
        DataError: if there is one.
    """
    record = _read(output)
    for name in names:
        if not os.path.lexists(output / name):
            continue
        if name not in record:
            raise DataError(
                f"{output / name} would be overwritten, but no earlier run or filter has written it. {_ADVICE}"
            )
        if record[name] is not None and record[name] != _digest(output / name):
            raise DataError(
                f"{output / name} would be overwritten, but it was changed after an earlier run or filter had written it. "
                f"{_ADVICE}"
            )


def check_folders_are_ours(output: Path, replaces_model: bool, replaces_sessions: bool) -> None:
    """Refuse to write a model or checkpoints into a folder that contains others, or to delete them.

    Args:
        output (`Path`):
            The output folder of a run.
        replaces_model, replaces_sessions (`bool`):
            Whether the run deletes or writes the folder `model`, and whether it deletes checkpoints.

    Raises:
        DataError: if the folder `model` or `sessions` comes from elsewhere.
    """
    if replaces_model and MODEL_FOLDER not in _read(output):  # otherwise a run has ended while it saved the model
        check_files_are_ours(output, _files(output, MODEL_FOLDER))
    sessions = output / SESSIONS_FOLDER
    is_used = replaces_sessions or any(_checkpoints(output))
    if sessions.exists() and is_used and SESSIONS_FOLDER not in _read(output):
        raise DataError(f"{sessions} would be overwritten, but no earlier run has created it. {_ADVICE}")


@contextmanager
def recorded(output: Path, names: Iterable[str]) -> Iterator[None]:
    """Record files that the block writes to `output`. If the block raises, only those are recorded that it has written.

    Ctrl-C can end the block between two files. It can also come while the files are hashed. The record then holds null.
    """
    before, names = _read(output), list(names)
    versions = {name: file_version(output / name) for name in names}
    _write(output, {**before, **dict.fromkeys(names)})
    try:
        yield
    except BaseException:
        written = [name for name in names if file_version(output / name) != versions[name]]
        _write(output, {**before, **dict.fromkeys(written)})
        raise
    _write(output, {**before, **{name: _digest(output / name) for name in names}})


def record_folder(output: Path, folder: str) -> None:
    """Record the folder `model` or `sessions`, before anything is written to it."""
    _write(output, {**_read(output), folder: None})


def record_saved_model(output: Path) -> None:
    """Record the files in the folder `model`, once they are written, instead of the folder."""
    record = {**_read(output), **dict.fromkeys(_files(output, MODEL_FOLDER))}
    record.pop(MODEL_FOLDER, None)
    _write(output, record)


def is_recorded(output: Path, name: str) -> bool:
    """Whether an earlier run has written the file `name`, or files in the folder `name`."""
    return any(file == name or file.startswith(f"{name}/") for file in _read(output))


def has_saved_model(output: Path) -> bool:
    """Whether an earlier run has saved its model completely."""
    return MODEL_FOLDER not in _read(output) and is_recorded(output, MODEL_FOLDER)


def record_completion(output: Path, is_complete: bool) -> None:
    """Record whether a run has written all its outputs."""
    record = _read(output)
    record.pop(COMPLETE, None)
    _write(output, {**record, COMPLETE: None} if is_complete else record)


def is_complete(output: Path) -> bool:
    """Whether a run has written all its outputs, and they are still there."""
    record = _read(output)
    model = [name for name in record if name.startswith(f"{MODEL_FOLDER}/")]
    return COMPLETE in record and all((output / name).is_file() for name in (CONFIG_FILE, *FILTER_OUTPUTS, *model))


def has_checkpoints(output: Path) -> bool:
    """Whether a run has saved a checkpoint of any session."""
    return any(_checkpoints(output))


def delete_recorded(output: Path) -> None:
    """Delete the outputs of a filter, the model and the checkpoints that the record names. Other files are kept.

    Call [`check_files_are_ours`] first.
    """
    record = _read(output)
    # Names of the record are looked up, never followed: a record from elsewhere could name any file of this machine.
    for name in (*FILTER_OUTPUTS, *_files(output, MODEL_FOLDER)):
        if name in record or (MODEL_FOLDER in record and name.startswith(f"{MODEL_FOLDER}/")):
            (output / name).unlink(missing_ok=True)
    if SESSIONS_FOLDER in record:
        for folder in [*_checkpoints(output), output / SESSIONS_FOLDER / "filtered" / "_forgetfilter-result"]:
            shutil.rmtree(folder, ignore_errors=True)
    for name in ("filter_result", MODEL_FOLDER, SESSIONS_FOLDER):
        _remove_empty_folders(output / name)
    _write(output, {name: digest for name, digest in record.items() if os.path.lexists(output / name)})


def _remove_empty_folders(folder: Path) -> None:
    """Remove `folder` and the folders in it, except those that contain a file."""
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # it is not empty
                path.rmdir()


def _read(output: Path) -> dict[str, str | None]:
    file = output / RECORD_FILE
    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}. Choose another output folder.") from error
    if not isinstance(record, dict):
        raise DataError(f"{file} contains no record of outputs. Choose another output folder.")
    return record


def _write(output: Path, record: dict[str, str | None]) -> None:
    if record:
        write_json(record, output / RECORD_FILE)
    else:
        (output / RECORD_FILE).unlink(missing_ok=True)


def _files(output: Path, folder: str) -> list[str]:
    return [path.relative_to(output).as_posix() for path in sorted((output / folder).rglob("*")) if not path.is_dir()]


def _checkpoints(output: Path) -> Iterator[Path]:
    return (path for path in (output / SESSIONS_FOLDER).glob("*/checkpoint-*") if _CHECKPOINT.fullmatch(path.name))


def _digest(file: Path) -> str:
    if not file.is_file():
        raise DataError(f"{file} would be overwritten, but it is not a file. {_ADVICE}")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()
