"""Check that files exist before anything is imported that could read them."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError


FILE_EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")
HUB_TIMEOUT = 20.0  # seconds
_MODEL_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json")  # one of them is in each folder


def check_source(source: str) -> None:
    """Check that `source`, as [`load_rows`] takes it, exists and is not empty. Hub ids are not looked up.

    Raises:
        DataError: if it names a file or folder that does not exist, an empty file, or a file of another format.
    """
    path = Path(source)
    if not path.exists() and (path.suffix.lower() in FILE_EXTENSIONS or is_path(source)):
        raise DataError(f"The file {path.absolute()} does not exist.")
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
        raise DataError(f"The {kind} {name!r} cannot be loaded: the folder {Path(name).absolute()} does not exist.")


def check_hub_model(name: str, kind: str = "model") -> None:
    """Ask the Hub for a model or tokenizer that is neither a folder nor in the cache, so that a missing one fails at once.

    transformers tries for a minute if the Hub cannot be reached. It decides about other errors, such as those of a mirror
    that has the files only.

    Raises:
        DataError: if it is not on the Hub, or if the Hub cannot be reached.
    """
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    if Path(name).exists():
        return
    try:
        files = [try_to_load_from_cache(name, file) for file in _MODEL_FILES]
        if not any(isinstance(file, str) for file in files):
            model_info(name, timeout=HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise DataError(
            f"The {kind} {name!r} cannot be loaded. There is no such folder, and the Hub has no such model, or it is "
            "private. Check the name, or log in with `hf auth login`."
        ) from error
    except (HfHubHTTPError, HFValidationError):
        return
    except Exception as error:  # the errors of a network depend on the version of huggingface_hub
        said = cannot_be_loaded(name, error, kind).rstrip(".")
        raise DataError(
            f"{said}. It is not in the cache either. Without a network, pass the folder of a {kind}, such as "
            "forgetfilter-demo/base-model, which `forgetfilter demo` leaves."
        ) from error


def cannot_be_loaded(name: str, error: Exception, kind: str = "model") -> str:
    """The message for a model or tokenizer that transformers cannot load. If no folder has its name, it is a Hub id."""
    place = "" if Path(name).exists() else "There is no such folder. From the Hub: "
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"The {kind} {name!r} cannot be loaded. {place}{reason}"


def is_path(name: str) -> bool:
    """Whether `name` can only be a path, not the Hub id `owner/name`."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or len(Path(name).parts) > 2
