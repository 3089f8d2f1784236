"""TODO"""

from __future__ import annotations


def check_record_steps(record_steps: float | None) -> None:
    """A number of steps, or a share below 1."""
    if record_steps is not None and not (0 < record_steps < 1 or (record_steps >= 1 and record_steps % 1 == 0)):
        raise ValueError(f"record_steps={record_steps} is neither a number of steps nor a share below 1.")
