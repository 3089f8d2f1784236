"""All commands of `forgetfilter`."""

from __future__ import annotations

from . import (  # importing them adds the commands to the app
    export_command,
    review_command,
    run_commands,
    trace_commands,
)
from .app import app


__all__ = ["app", "export_command", "review_command", "run_commands", "trace_commands"]
