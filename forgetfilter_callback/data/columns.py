"""Read one column of loaded rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError


def column_values(rows: Sequence[Mapping[str, Any]], column: str) -> list[Any]:
    """Return the value of a column in each row, or `None` where a row has none.

    Args:
        rows (`Dataset` or `JsonRows`):
            The rows, as [`load_rows`] returns them.
        column (`str`):
            The name of the column.

    Raises:
        DataError: if no row has a value in this column.
    """
    values = [row.get(column) for row in rows]
    if all(value is None for value in values):
        raise DataError(
            f"The rows have no column {column!r}, or it is empty in all of them. The first row has the columns "
            f"{', '.join(rows[0])}."
        )
    return values
