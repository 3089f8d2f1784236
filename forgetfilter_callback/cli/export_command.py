"""`forgetfilter export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..filtering.config import FilterConfig
from .app import after_interrupt, exit_codes, silence_libraries, what_is_written
from .columns import find_rows
from .messages import say
from .option_names import ALL_FILTER_OPTIONS
from .options import options_from
from .trace_commands import (
    NoisyOption,
    TokenizerOption,
    TraceArgument,
    open_trace,
)


@options_from(FilterConfig, "filter_settings", ALL_FILTER_OPTIONS)
def export(
    *,
    trace: TraceArgument,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write.", show_default="forgetfilter-rows.FORMAT")
    ] = None,
    file_format: Annotated[
        Literal["jsonl", "parquet"], typer.Option("--format", metavar="FORMAT", help="jsonl or parquet.")
    ] = "jsonl",
    filter_settings: dict[str, Any],
    noisy: NoisyOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Write all rows with losses, forgetting and verdicts to a file.

    Example:

        forgetfilter export out --output rows.jsonl

    Without filter options, the rows that `forgetfilter run` removed count as removed.
    """
    output = output if output is not None else Path(f"forgetfilter-rows.{file_format}")
    with exit_codes(), after_interrupt(what_is_written([output])):
        filter_config = FilterConfig(**filter_settings) if filter_settings else None
        opened = open_trace(trace)
        from ..pipeline.export import export_rows

        source, loaded_tokenizer = find_rows(opened, noisy, tokenizer)
        if file_format == "parquet":
            silence_libraries()
        removed = export_rows(opened, output, file_format, filter_config, source, loaded_tokenizer)
        say(f"Wrote {len(opened.rows)} rows to {output}. {removed}")
