"""The verdicts that a filter does not follow."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..review.verdicts import Verdict
from ..utils.counted import counted
from .result import FilterResult


def count_differing_verdicts(result: FilterResult, verdicts: Sequence[Verdict]) -> tuple[int, int]:
    """Count the verdicts that differ from a filter result: unsafe rows that it keeps, and safe rows that it removes.

    Verdicts that were copied from an identical row do not count.

    Returns:
        `tuple[int, int]`: how many differ, and the number of rows with a verdict.
    """
    is_removed = dict(zip(result.ids.to_pylist(), result.removed.tolist(), strict=True))
    labels = {verdict.id: verdict.verdict for verdict in verdicts if verdict.identical_to is None}
    return sum(is_removed.get(id_) == (label == "safe") for id_, label in labels.items()), len(labels)


def differing_verdicts(result: FilterResult, verdicts: Sequence[Verdict], folder: Path) -> str | None:
    """Say how many verdicts differ from a filter result (see [`count_differing_verdicts`]).

    Args:
        result ([`FilterResult`]):
            The filter result.
        verdicts (`Sequence[Verdict]`):
            All verdicts on the trace. The last one on a row counts.
        folder (`Path`):
            Their folder.

    Returns:
        `str`, or `None` if no verdict differs.
    """
    differing, total = count_differing_verdicts(result, verdicts)
    if not differing:
        return None
    return (
        f"The filter differs from {differing} of {counted(total, 'verdict')} in {folder}. To decide by the verdicts, pass "
        f"`--reviewed {shlex.quote(str(folder))}` instead."
    )
