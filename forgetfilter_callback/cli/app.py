"""What all commands share: the app, exit codes and how results are printed.

Exit codes: 0 success, 1 failure, 2 wrong usage or unusable input, 3 not separable (nothing was removed), 130 Ctrl-C.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ForgetFilterError
from ..utils.atomic_files import file_version
from .messages import LogFormatter, say
from .option_names import with_option_names


if TYPE_CHECKING:  # torch and transformers are imported in the commands, so that `--help` is fast
    from ..filtering.result import FilterResult


FAILED, BAD_INPUT, NOT_SEPARABLE, INTERRUPTED = 1, 2, 3, 130
NOTHING_WRITTEN = "No file was written."
JsonOption = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object and nothing else.")]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


def print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"forgetfilter-callback {version('forgetfilter-callback')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, metavar="", help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Find unsafe finetuning data by how fast a model forgets it.

    Example:

        forgetfilter run --model base-model --noisy noisy.jsonl \\
            --safety safety.jsonl --output out
        forgetfilter review out
        forgetfilter filter out --reviewed out/_forgetfilter/review \\
            --output reviewed
    """
    for stream in (sys.stdout, sys.stderr):  # do not fail on terminals that cannot show φ
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Without a network, huggingface_hub would print a dozen lines about its retries before the error.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter())
    logging.basicConfig(handlers=[handler])
    logging.getLogger("forgetfilter_callback").setLevel(logging.INFO)


@contextmanager
def exit_codes(kept: str = "") -> Iterator[None]:
    """Print errors in one line, without a traceback, and exit with their code.

    Args:
        kept (`str`, defaults to `""`):
            A sentence that says what the command leaves behind after Ctrl-C.
    """
    try:
        with after_interrupt(lambda: kept):
            yield
    except ValueError as error:  # all errors about inputs and settings
        say(f"forgetfilter: {with_option_names(str(error))}", err=True)
        raise typer.Exit(BAD_INPUT) from error
    except Exception as error:
        # Typer ends the command in silence if what reads its output has ended, such as `head`.
        if isinstance(error, typer.Exit | typer.Abort | typer.BadParameter | BrokenPipeError):
            raise
        say(f"forgetfilter: {type(error).__name__}: {with_option_names(str(error))}", err=True)
        raise typer.Exit(FAILED) from error


@contextmanager
def after_interrupt(describe: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C, print what `describe` returns and exit. Of several processes, the main one prints it."""
    try:
        yield
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":
            typer.echo(err=True)  # ends the line of a progress bar
            try:
                description = describe()
            except (ForgetFilterError, OSError) as problem:  # such as a trace that cannot be read
                description = with_option_names(str(problem))
            say(f"forgetfilter: Interrupted. {description}".rstrip(), err=True)
        raise typer.Exit(INTERRUPTED) from error


def what_is_written(files: Iterable[Path]) -> Callable[[], str]:
    """Call it before a command writes `files`.

    Returns:
        `Callable`: for [`after_interrupt`]. It says which of them the command has written.
    """
    before = {file: file_version(file) for file in files}

    def describe() -> str:
        written = [str(file) for file, version in before.items() if file_version(file) != version]
        if not written:
            return NOTHING_WRITTEN
        if len(written) < len(before):
            return f"Not all files were written, only {', '.join(written)}. Type the same command again."
        return f"Written: {', '.join(written)}."

    return describe


def silence_libraries() -> None:
    """Hide the progress bars and messages that transformers and datasets print while they load."""
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def as_dict(result: FilterResult) -> dict[str, Any]:
    return {
        **result.counts,
        "measure": result.measure,
        "threshold": result.threshold,
        "method": result.method,
        "reason": result.reason,
        "explanation": result.explanation,
        "fingerprint": result.fingerprint,
        "separable": result.separability.separable,
        **({} if result.estimate is None else {"estimate": asdict(result.estimate)}),
        **({} if result.source_counts is None else {"source_counts": [asdict(each) for each in result.source_counts]}),
    }


def print_result(result: FilterResult, output: Path, as_json: bool, next_step: str) -> None:
    if as_json:
        typer.echo(json.dumps({**as_dict(result), "output": str(output)}))
    else:
        summary = result.summary()
        say(f"{summary[0].upper()}{summary[1:]}.")
        if result.estimate is not None:
            say(result.estimate.errors)
        files = sorted(file.name for file in output.iterdir() if not file.name.startswith("."))
        say(f"Files in {output}: {', '.join(files)}.")
        say(f"Next: {next_step}")


def exit_if_not_separable(result: FilterResult) -> None:
    if result.method == "auto" and not result.separability.separable:
        raise typer.Exit(NOT_SEPARABLE)
