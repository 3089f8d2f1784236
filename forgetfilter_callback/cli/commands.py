"""All commands of `forgetfilter`."""

from __future__ import annotations

from . import review_command, run_commands, trace_commands  # importing them adds the commands to the app
from .app import app


__all__ = ["app", "review_command", "run_commands", "trace_commands"]
