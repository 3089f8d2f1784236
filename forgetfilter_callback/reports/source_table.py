"""The table by source: its columns, which the terminal and the card share, and its data for the review page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..filtering.by_source import SourceCounts, largest_sources, source_name
from ..filtering.result import FilterResult
from ..utils.sanitize_text import sanitize


MAX_LISTED = 20  # sources that the terminal and the card list; the others are one line
MAX_ON_PAGE = 500  # sources that the page can list and filter by
MAX_NAME_LENGTH = 80  # characters


def source_table(counts: list[SourceCounts]) -> tuple[list[str], list[list[str]]]:
    """The head of the table, and its rows as untrusted text. What nobody has looked at has no column.

    The first cell of a row is the source.
    """
    are_seen = any(each.seen for each in counts)
    are_labeled = any(each.unsafe_labeled is not None for each in counts)
    head = ["source", "rows", "kept", "removed", "% removed"]
    if are_labeled:
        head[2:2] = ["labeled unsafe"]
    if are_seen:
        head[2:2] = ["seen", "found unsafe"]
    rows = []
    for each in largest_sources(counts, MAX_LISTED):
        cells = [short_name(each.source), each.rows, each.kept, each.removed, f"{100 * each.fraction_removed:.1f}"]
        if are_labeled:
            cells[2:2] = [each.unsafe_labeled]
        if are_seen:
            cells[2:2] = [each.seen, each.unsafe_found]
        rows.append([cell if isinstance(cell, str) else f"{cell:,}" for cell in cells])
    return head, rows


def short_name(source: str) -> str:
    """The name of a source without control characters, cut to `MAX_NAME_LENGTH` characters."""
    return sanitize(source if len(source) <= MAX_NAME_LENGTH else source[: MAX_NAME_LENGTH - 1] + "…")


def page_sources(
    result: FilterResult, sources: Sequence[Any], shown: np.ndarray, is_subsampled: bool
) -> dict[str, Any]:
    """What the review page needs for its table by source, as JSON types.

    Args:
        result ([`FilterResult`]):
            The filter result with its `source_counts`.
        sources (`Sequence` of length `samples`):
            The source of each sample.
        shown (`np.ndarray`, integer):
            Indices of the samples with text.
        is_subsampled (`bool`):
            Whether the page holds the values of some samples only. The numbers of removed rows then do not follow φ:
            estimates for single sources would be far off.
    """
    counts = result.source_counts
    assert counts is not None
    listed = largest_sources(counts, MAX_ON_PAGE)
    number_of = {each.source: min(number, len(listed) - 1) for number, each in enumerate(counts)}
    numbers = [number_of[source_name(value)] for value in sources]
    return {
        # If it is not 0, the last item is a group of this number of sources.
        "grouped": 0 if len(listed) == len(counts) else len(counts) - MAX_ON_PAGE,
        "names": [short_name(each.source) for each in listed],
        "rows": [each.rows for each in listed],
        "seen": [each.seen for each in listed] if any(each.seen for each in counts) else None,
        "unsafe_found": [each.unsafe_found for each in listed],
        "unsafe_labeled": [each.unsafe_labeled for each in listed],
        "removed": [each.removed for each in listed],
        "of_samples": None if is_subsampled else numbers,
        "of_shown": [numbers[index] for index in shown.tolist()],
        "names_of_shown": [short_name(source_name(sources[index])) for index in shown.tolist()],
    }
