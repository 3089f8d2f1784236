"""Name rows in messages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


_MAX_NAMED = 5


def describe_rows(rows: Sequence[int] | np.ndarray) -> str:
    """Describe row numbers: "row 3", "rows 3, 7" or, for more than five, "rows 3, 7, 8, 11, 12 and 9 more"."""
    named = ", ".join(str(row) for row in rows[:_MAX_NAMED])
    more = f" and {len(rows) - _MAX_NAMED} more" if len(rows) > _MAX_NAMED else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {named}{more}"
