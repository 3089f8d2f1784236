"""The verdicts that a filter does not follow."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..review.verdicts import Verdict
from ..utils.counted import counted
from .result import FilterResult


def differing_verdicts(result: FilterResult, verdicts: Sequence[Verdict], folder: Path) -> str | None:
    """Say how many verdicts differ from a filter result: unsafe rows that it keeps, and safe rows that it removes.

    Args:
        result ([`FilterResult`]):
            The filter result.
        verdicts (`Sequence[Verdict]`):
            All verdicts on the trace. The last one on a row counts. Those copied from an identical row do not.
        folder (`Path`):
            Their folder.

    Returns:
        `str`, or `None` if no verdict differs.
    """
    if not verdicts:
        return None
    is_removed = dict(zip(result.ids.to_pylist(), result.removed.tolist(), strict=True))
    labels = {verdict.id: verdict.verdict for verdict in verdicts if verdict.identical_to is None}
    differing = sum(is_removed.get(id_) == (label == "safe") for id_, label in labels.items())
    if not differing:
        return None
    return (
        f"The filter differs from {differing} of {counted(len(labels), 'verdict')} in {folder}. To decide by the verdicts, "
        f"pass `--reviewed {shlex.quote(str(folder))}`."
    )
