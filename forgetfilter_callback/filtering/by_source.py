"""Count the kept and removed rows of each source: where a row came from, according to a column of the rows."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.audit_labels import as_labels
from ..data.identical_rows import with_identical_rows
from ..errors import DataError
from ..review.verdicts import Verdict, trace_verdicts
from ..trace.trace import Trace
from ..utils.counted import counted


if TYPE_CHECKING:
    from .result import FilterResult

# The source of rows without a value in the column.
NO_SOURCE = "(none)"


@dataclass(frozen=True)
class SourceCounts:
    """What a filter did with the rows of one source.

    Attributes:
        source (`str`):
            The source as text. `"(none)"` for rows without a source.
        rows (`int`):
            Number of rows.
        seen (`int`):
            Rows that a reviewer decided, with a verdict or an override, and the rows that are identical to one with a
            verdict.
        unsafe_found (`int`):
            Those of them that the reviewer found to be unsafe.
        unsafe_labeled (`int` or `None`):
            Rows that the audit labels call unsafe. `None` without audit labels.
        kept (`int`):
            Rows that the filter keeps.
        removed (`int`):
            Rows that the filter removes.
        fraction_removed (`float`):
            `removed / rows`.
    """

    source: str
    rows: int
    seen: int
    unsafe_found: int
    unsafe_labeled: int | None
    kept: int
    removed: int
    fraction_removed: float


def source_name(value: Any) -> str:
    """The source that a value of the column names. Missing, NaN and blank values are `"(none)"`."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NO_SOURCE
    name = str(value)
    # A JSON file can contain half of a surrogate pair, which cannot be written as UTF-8.
    return name.encode("utf-8", "backslashreplace").decode("utf-8") if name.strip() else NO_SOURCE


def count_by_source(
    result: FilterResult,
    sources: Sequence[Any],
    verdicts: Sequence[Verdict] = (),
    unsafe: Sequence[bool] | np.ndarray | None = None,
) -> list[SourceCounts]:
    """Count the rows of each source. See [`FilterResult.by_source`] for the arguments and errors.

    Returns:
        `list[SourceCounts]`: one item per source, the one with the most removed rows first, then by the number of rows.
    """
    for what, values in (("source", sources), ("audit label", unsafe)):
        if isinstance(values, str):
            raise ValueError(f"Pass the values of the column, such as `dataset[{values!r}]`, not its name.")
        if values is not None and len(values) != len(result.ids):
            raise DataError(
                f"Pass one {what} per row: there are {counted(len(result.ids), 'row')}, but "
                f"{counted(len(values), what)}."
            )
    names = [source_name(value) for value in sources]
    # An override is what the filter applied, so it is more current than a verdict.
    labels = with_identical_rows({verdict.id: verdict.verdict for verdict in verdicts}, result.ids, worst="unsafe")
    is_unsafe = {id_: label == "unsafe" for id_, label in labels.items()}
    is_unsafe |= {id_: override == "remove" for id_, override in result.overrides.items()}
    found = [is_unsafe.get(id_) for id_ in result.ids.to_pylist()]
    rows, removed = Counter(names), Counter(compress(names, result.removed))
    seen, unsafe_found = Counter(compress(names, (each is not None for each in found))), Counter(compress(names, found))
    labeled = None if unsafe is None else Counter(compress(names, as_labels(unsafe, "`unsafe`")))
    counts = [
        _source_counts(
            name, rows[name], seen[name], unsafe_found[name], None if labeled is None else labeled[name], removed[name]
        )
        for name in rows
    ]
    return sorted(counts, key=lambda each: (-each.removed, -each.rows, each.source))


def with_source_counts(
    result: FilterResult,
    trace: Trace,
    sources: Sequence[Any],
    unsafe: Sequence[bool] | np.ndarray | None = None,
    reviewed: str | os.PathLike[str] | None = None,
) -> FilterResult:
    """Add `source_counts` to a result, with the verdicts in the folder `reviewed` (see [`review_folder`])."""
    return replace(result, source_counts=count_by_source(result, sources, trace_verdicts(trace, reviewed), unsafe))


def largest_sources(counts: list[SourceCounts], limit: int) -> list[SourceCounts]:
    """The first `limit` sources, and all others as one item, for tables that are read by people."""
    rest = counts[limit:]
    if len(rest) < 2:
        return counts
    labels = [each.unsafe_labeled for each in rest if each.unsafe_labeled is not None]
    others = _source_counts(
        f"{len(rest):,} more sources",
        sum(each.rows for each in rest),
        sum(each.seen for each in rest),
        sum(each.unsafe_found for each in rest),
        sum(labels) if labels else None,
        sum(each.removed for each in rest),
    )
    return [*counts[:limit], others]


def _source_counts(
    source: str, rows: int, seen: int, unsafe_found: int, unsafe_labeled: int | None, removed: int
) -> SourceCounts:
    return SourceCounts(source, rows, seen, unsafe_found, unsafe_labeled, rows - removed, removed, removed / rows)
