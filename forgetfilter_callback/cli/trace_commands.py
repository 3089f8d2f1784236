"""The commands that read a trace: `filter`, `report`, `show` and `doctor`. They load neither a model nor torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.audit_labels import as_labels
from ..errors import TraceError
from ..filtering.config import FilterConfig
from ..pipeline.output_record import FILTER_OUTPUTS
from ..utils.optional_packages import requires_extra
from .advice import NOTEBOOK_LOCK, WAIT_OR_END, how_to_finish, is_measurable, what_is_missing
from .app import (
    BAD_INPUT,
    JsonOption,
    after_interrupt,
    as_dict,
    exit_codes,
    exit_if_not_separable,
    print_result,
    what_is_written,
)
from .columns import SourceColumnOption, find_rows, find_source_column, read_columns
from .messages import say
from .next_step import after_filter, after_looking
from .option_names import ALL_FILTER_OPTIONS, PAGE_FILTER_OPTIONS
from .options import options_from


if TYPE_CHECKING:
    from ..data.decode import Decoder
    from ..filtering.result import FilterResult
    from ..trace.trace import Trace


TraceArgument = Annotated[Path, typer.Argument(metavar="TRACE", help="Output folder of a run, or of a trace.")]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="Hub id or folder.", show_default="the one that the trace names", rich_help_panel="Rows"
    ),
]
NoisyOption = Annotated[
    str | None,
    typer.Option(
        metavar="ROWS", help="The noisy set.", show_default="the file that the trace names", rich_help_panel="Rows"
    ),
]


@options_from(FilterConfig, "filter_settings", ALL_FILTER_OPTIONS)
def filter_command(
    *,
    trace: TraceArgument,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for kept.jsonl, removed.jsonl and card.md.")],
    filter_settings: dict[str, Any],
    source_column: SourceColumnOption = None,
    noisy: NoisyOption = None,
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Split the rows into kept and removed rows. No model is needed.

    Example:

        forgetfilter filter out --fraction 0.05 --output filtered
    """
    row_options = {"noisy": noisy, "tokenizer": tokenizer, "source-column": source_column}
    with exit_codes(), after_interrupt(what_is_written(output / name for name in FILTER_OUTPUTS)):
        filter_config = FilterConfig(**filter_settings)
        opened = open_trace(trace)
        from ..pipeline.outputs import filter_rows

        source, loaded_tokenizer = find_rows(opened, noisy, tokenizer)
        column = find_source_column(opened, noisy, source_column)
        result = filter_rows(opened, output, filter_config, source, loaded_tokenizer, column)
        _name_differing_verdicts(result, opened, filter_config)
        next_step = after_filter(result, opened, trace, output, filter_settings, row_options)
        print_result(result, output, as_json, next_step)
        exit_if_not_separable(result)


def _name_differing_verdicts(result: FilterResult, trace: Trace, config: FilterConfig) -> None:
    from ..filtering.differing_verdicts import differing_verdicts
    from ..review.verdicts import review_folder, trace_verdicts

    if config.reviewed is None:
        differing = differing_verdicts(result, trace_verdicts(trace), review_folder(trace))
        if differing is not None:
            say(f"forgetfilter: {differing}", err=True)


@options_from(FilterConfig, "filter_settings", PAGE_FILTER_OPTIONS)
def report(
    *,
    trace: TraceArgument,
    output: Annotated[Path, typer.Option(metavar="FILE", help="HTML file to write.")] = Path(
        "forgetfilter-report.html"
    ),
    filter_settings: dict[str, Any],
    audit_column: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="True for unsafe rows, to audit the ranking.", rich_help_panel="Rows"),
    ] = None,
    source_column: SourceColumnOption = None,
    noisy: NoisyOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Write a page that shows what would be removed, and lets you decide.

    Example:

        forgetfilter report out --output report.html
    """
    row_options = {"noisy": noisy, "tokenizer": tokenizer, "source-column": source_column}
    with exit_codes(), after_interrupt(what_is_written([output])):
        filter_config = FilterConfig(**filter_settings)
        opened = open_trace(trace)
        from ..reports.review_page import write_review_page
        from ..reports.summary import page_summary

        source_column = find_source_column(opened, noisy, source_column)
        names = [name for name in (audit_column, source_column) if name is not None]
        columns = dict(zip(names, read_columns(opened, noisy, tokenizer, names), strict=True)) if names else {}
        unsafe = None if audit_column is None else as_labels(columns[audit_column], f"The column {audit_column!r}")
        sources = None if source_column is None else columns[source_column]
        result = write_review_page(opened, output, trace_decoder(opened, tokenizer), filter_config, unsafe, sources)
        _name_differing_verdicts(result, opened, filter_config)
        say(f"{page_summary(result)} Open {output} in a browser.")
        say(f"Next: {after_looking(opened, trace, filter_settings, row_options)}")


@options_from(FilterConfig, "filter_settings", ALL_FILTER_OPTIONS)
def show(
    *,
    trace: TraceArgument,
    filter_settings: dict[str, Any],
    head: Annotated[int, typer.Option(min=0, metavar="N", help="Most forgotten rows to list.")] = 10,
    source_column: SourceColumnOption = None,
    noisy: NoisyOption = None,
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the most forgotten rows in the terminal.

    Example:

        forgetfilter show out --head 20
    """
    row_options = {"noisy": noisy, "tokenizer": tokenizer, "source-column": source_column}
    with exit_codes():
        filter_config = FilterConfig(**filter_settings)
        opened = open_trace(trace)
        with requires_extra("cli", "`forgetfilter show`"):
            from rich.console import Console

        from ..filtering.by_source import with_source_counts
        from ..filtering.find_forgotten import find_forgotten
        from ..reports.terminal import show as show_trace

        result = find_forgotten(opened, filter_config)
        column = find_source_column(opened, noisy, source_column)
        if column is not None:
            (sources,) = read_columns(opened, noisy, tokenizer, [column])
            result = with_source_counts(result, opened, sources, reviewed=filter_config.reviewed)
        if as_json:
            typer.echo(json.dumps(as_dict(result)))
            return
        has_tokenizer = tokenizer is not None or opened.manifest["tokenizer"] is not None
        decoder = trace_decoder(opened, tokenizer) if has_tokenizer else None
        show_trace(opened, result, Console(), decoder, head)
        say(f"Next: {after_looking(opened, trace, filter_settings, row_options)}")


def doctor(trace: TraceArgument, as_json: JsonOption = False) -> None:
    """Check whether a trace is complete and its files are intact.

    Example:

        forgetfilter doctor out

    The exit code is 2 if something is wrong.
    """
    with exit_codes():
        from ..trace.trace import Trace
        from ..trace.validate_trace import validate_trace

        folder = trace_folder(trace)
        if not Trace.exists(folder):
            Trace.open(folder)  # raises an error that says so
        problems, notes = validate_trace(folder)
        missing = None if problems else what_is_missing(Trace.open(folder))
        if as_json:
            typer.echo(json.dumps({"problems": problems, "notes": notes + ([] if missing is None else [missing])}))
            raise typer.Exit(BAD_INPUT if problems else 0)
        for text in problems + notes:
            say(text)
        if problems:
            say(f"{trace} has problems.")
            raise typer.Exit(BAD_INPUT)
        say(
            f"{trace} is complete, and its files are intact." if missing is None else f"The files are intact. {missing}"
        )


def open_trace(path: Path) -> Trace:
    """Open a trace from which forgetting can be measured."""
    from ..trace.trace import Trace

    trace = Trace.open(trace_folder(path))
    advice = how_to_finish(trace)
    if advice is not None and not is_measurable(trace):
        raise TraceError(advice)
    if advice is not None:
        say(f"forgetfilter: {advice}", err=True)
    return trace


def trace_folder(path: Path) -> Path:
    """The folder of the trace in `path`. Raises a [`TraceError`] if a process has just started to write it."""
    from ..trace.lock_folder import is_locked
    from ..trace.trace import Trace
    from ..trace.trace_folder import find_trace_folder

    folder = find_trace_folder(path)
    if not Trace.exists(folder) and is_locked(folder):
        raise TraceError(
            f"The run in {path} is still going on in another process, and it has no records yet. {WAIT_OR_END} "
            f"{NOTEBOOK_LOCK}"
        )
    return folder


def trace_decoder(trace: Trace, tokenizer: str | None) -> Decoder:
    from ..data.decode import load_decoder
    from ..trace.source_files import find_tokenizer

    return load_decoder(tokenizer if tokenizer is not None else find_tokenizer(trace))
