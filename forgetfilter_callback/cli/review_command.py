"""`forgetfilter review`."""

from __future__ import annotations

import os
import socket
import sys
import webbrowser
from typing import Annotated

import typer

from .app import exit_codes
from .columns import SourceColumnOption, find_source_column, read_columns
from .messages import say
from .next_step import command_to_filter
from .trace_commands import NoisyOption, TokenizerOption, TraceArgument, open_trace, trace_decoder


def review(
    trace: TraceArgument,
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, metavar="PORT", help="0 chooses a free port.", rich_help_panel="Page"),
    ] = 0,
    reviewer: Annotated[str | None, typer.Option(metavar="NAME", help="Stored with each verdict.")] = None,
    round_size: Annotated[int, typer.Option(min=1, metavar="N", help="Rows between two rankings.")] = 10,
    random_fraction: Annotated[
        float,
        typer.Option(metavar="FRACTION", help="Rows drawn at random, for estimates."),
    ] = 0.1,
    browser: Annotated[bool, typer.Option(metavar="", help="Open a browser.", rich_help_panel="Page")] = True,
    source_column: SourceColumnOption = None,
    noisy: NoisyOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Review rows in a browser. The ranking learns from your verdicts.

    Example:

        forgetfilter review out --reviewer Ada
    """
    row_options = {"noisy": noisy, "tokenizer": tokenizer, "source-column": source_column}
    with exit_codes():
        from ..reports.review_server.serve import review_server
        from ..review.stop_advice import stop_advice
        from ..review.verdicts import review_folder

        opened = open_trace(trace)
        decoder = trace_decoder(opened, tokenizer)
        column = find_source_column(opened, noisy, source_column)
        sources = None if column is None else read_columns(opened, noisy, tokenizer, [column])[0]
        to_filter = command_to_filter(opened, trace, {"reviewed": review_folder(opened)}, row_options)
        with review_server(opened, decoder, to_filter, port, reviewer, round_size, random_fraction, sources) as running:
            typer.echo(f"Review rows at {running.address}")
            tunnel = f"ssh -L {running.port}:127.0.0.1:{running.port} {socket.gethostname()}"
            typer.echo(f"If this machine is remote, first run this on your own computer: {tunnel}")
            typer.echo("Every verdict is stored at once. Press Ctrl-C to end.")
            if browser and _has_display():
                webbrowser.open(running.address)
            running.server.serve_forever()  # until Ctrl-C
            typer.echo()
            estimate, advice = running.queue.estimate(), stop_advice(running.queue)
            say(str(estimate))
            say(advice.reason if advice.is_enough else f"{advice.reason} To go on, type the same command again.")
            if estimate.unsafe_found:
                say(f"{'Next' if advice.is_enough else 'To filter by the verdicts so far'}: {to_filter}")


def _has_display() -> bool:
    """Whether a browser can open a window. Otherwise Python would start a text browser in this terminal."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
