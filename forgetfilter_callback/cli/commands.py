"""All commands of `forgetfilter`."""

from __future__ import annotations

from . import run_commands, trace_commands  # importing them adds the commands to the app
from .app import app


__all__ = ["app", "run_commands", "trace_commands"]
