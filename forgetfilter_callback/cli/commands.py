"""All commands of `forgetfilter`, in the order of its help."""

from __future__ import annotations

from .app import app
from .export_command import export
from .review_command import review
from .run_commands import demo, run, score
from .trace_commands import doctor, filter_command, report, show


app.command(rich_help_panel="Start")(demo)
app.command(rich_help_panel="Start")(run)
app.command(rich_help_panel="Start")(score)
app.command(rich_help_panel="Look")(show)
app.command(rich_help_panel="Look")(report)
app.command(rich_help_panel="Look")(review)
app.command(rich_help_panel="Decide", name="filter")(filter_command)
app.command(rich_help_panel="Decide")(export)
app.command(rich_help_panel="Check")(doctor)

__all__ = ["app"]
