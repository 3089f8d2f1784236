"""How messages are printed."""

from __future__ import annotations

import logging
import shutil
import sys
import textwrap
from typing import TextIO

import typer

from ..utils.sanitize_text import sanitize
from .option_names import with_option_names


def say(message: str, *, err: bool = False) -> None:
    """Print a message without control characters. In a terminal, its lines end between words."""
    typer.echo(fitted(sanitize(message), sys.stderr if err else sys.stdout), err=err)


def fitted(message: str, stream: TextIO) -> str:
    """A message whose lines fit into the terminal that `stream` writes to; elsewhere unchanged.

    Paths are not cut. A command at the end has a line of its own without line breaks, so that it can be copied.
    """
    width = shutil.get_terminal_size().columns
    if not stream.isatty() or len(message) <= width:
        return message
    text, found, command = message.partition(": forgetfilter ")
    lines = textwrap.wrap(f"{text}:" if found else text, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, f"forgetfilter {command}"] if found else lines)


class LogFormatter(logging.Formatter):
    """Fits log messages into the terminal, with options in place of arguments, and without the prefix that accelerate gives
    those of the main process.
    """

    def format(self, record: logging.LogRecord) -> str:
        return fitted(with_option_names(super().format(record).removeprefix("[RANK 0] ")), sys.stderr)
