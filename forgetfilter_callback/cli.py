"""The command line: `forgetfilter demo`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Find unsafe finetuning data by how fast a model forgets it."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of an aligned model; by default SmolLM2-135M from its package.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("forgetfilter-demo"),
    seed: Annotated[int, typer.Option(help="Draws the rows and seeds the trainers.")] = 0,
) -> None:
    """Run ForgetFilter end to end: a small aligned model, real questions with biased answers among them."""
    # Imported here, so that `--help` answers at once.
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    from .demo import run_demo

    transformers_logging.set_verbosity_error()
    disable_progress_bars()  # those of writing JSON
    try:
        run_demo(output, model, seed)
    except (OSError, ValueError) as error:
        typer.echo(f"forgetfilter: {error}", err=True)
        raise typer.Exit(1) from error
