"""`python -m forgetfilter_callback`: the command line."""

from .cli import app


app()
