"""Run the command line with `python -m forgetfilter_callback`."""

from .cli.app import app


app()
