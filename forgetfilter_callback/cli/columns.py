"""Columns of the rows that a command shows beside the trace: audit labels and sources."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.columns import column_values
from ..data.source_paths import check_source, is_path
from .app import silence_libraries
from .messages import say


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..trace.trace import Trace


SourceColumnOption = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN",
        help="Source of a row, for counts by source.",
        show_default="as in the run",
        rich_help_panel="Rows",
    ),
]


def read_columns(trace: Trace, noisy: str | None, tokenizer: str | None, columns: list[str]) -> list[list[Any]]:
    """Read columns of the rows, in the order of the trace. Rows are encoded again only if their file has changed."""
    from ..trace.source_files import find_source, is_unchanged, match_rows

    source = noisy if noisy is not None else find_source(trace)
    check_source(source)
    if is_unchanged(trace, source):
        from ..data.json_rows import read_text_file

        unchanged = read_text_file(Path(source))
        return [column_values(unchanged, column) for column in columns]
    from ..data.load_rows import load_rows

    silence_libraries()
    rows = load_rows(source)
    values = [column_values(rows, column) for column in columns]
    order = match_rows(trace, rows, encoding_tokenizer(trace, tokenizer)).tolist()
    return [[each[row] for row in order] for each in values]


def find_source_column(trace: Trace, noisy: str | None, given: str | None) -> str | None:
    """The given column or, if the rows can be read without encoding them, the one that `forgetfilter run` was given."""
    from ..trace.source_files import is_unchanged

    column: str | None = trace.manifest.get("source_column")
    if given is not None or column is None:
        return given
    source = noisy if noisy is not None else trace.manifest["source"]
    if is_unchanged(trace, source):
        return column
    reason = (
        f"only a JSON or CSV file that has not changed is read without being asked, and {source} is another file. To read "
        f"it, pass --source-column {shlex.quote(column)}."
    )
    if is_path(source) and not Path(source).exists():
        reason = f"{source} does not exist. Pass the rows from where they are now (--noisy)."
    say(f"forgetfilter: there is no table by source, because {reason}", err=True)
    return None


def find_rows(trace: Trace, noisy: str | None, tokenizer: str | None) -> tuple[str, PreTrainedTokenizerBase | None]:
    """The source of the rows, and the tokenizer to encode them again, or `None` if their file has not changed."""
    from ..trace.source_files import find_source, is_unchanged

    source = noisy if noisy is not None else find_source(trace)
    check_source(source)
    return source, None if is_unchanged(trace, source) else encoding_tokenizer(trace, tokenizer)


def encoding_tokenizer(trace: Trace, name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer, to encode rows again."""
    from ..data.tokenizers import load_tokenizer
    from ..trace.source_files import load_trace_tokenizer

    silence_libraries()
    return load_tokenizer(name) if name is not None else load_trace_tokenizer(trace)
