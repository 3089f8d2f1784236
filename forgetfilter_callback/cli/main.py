"""Entry point of the `forgetfilter` command."""

from __future__ import annotations

import atexit
import sys

from ..utils.optional_packages import requires_extra


def main() -> None:
    """Run the command line, or say which packages it needs."""
    try:
        with requires_extra("cli", "The command line"):
            from .commands import app
    except ImportError as error:
        sys.exit(f"forgetfilter: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    atexit.register(_leave_process_group)
    app()


def _leave_process_group() -> None:
    """Leave the process group of `torchrun`. Otherwise one of its threads can abort the process after its work is done."""
    distributed = sys.modules.get("torch.distributed")  # not imported for this: it takes seconds
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
