"""Entry point of the `forgetfilter` command."""

from __future__ import annotations

import sys

from ..utils.optional_packages import requires_extra


def main() -> None:
    """Run the command line, or say which packages it needs."""
    try:
        with requires_extra("cli", "The command line"):
            from .commands import app
    except ImportError as error:
        sys.exit(f"forgetfilter: {error}")
    app()
