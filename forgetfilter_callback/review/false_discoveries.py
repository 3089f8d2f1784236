"""Rows that can be removed without a review, at a given false discovery rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control

from .estimates import unsafe_rows_left
from .review_queue import ReviewQueue


# Without rows drawn at random, it is assumed that one of so many rows is unsafe. It weighs as much as so many draws.
ASSUMED_ROWS = 20


@dataclass(frozen=True, eq=False)
class FalseDiscoveryResult:
    """Rows without a verdict that can be removed.

    Attributes:
        removed (`np.ndarray` of shape `(samples,)`, bool):
            The rows. All `False` if there are too few verdicts.
        safe_drawn (`int`):
            Rows that were drawn at random and found to be safe.
        unsafe_left (`int`):
            About how many of the rows without a known label are unsafe (see [`unsafe_rows_left`]).
        more_needed (`int`, *optional*):
            At least how many more of the rows drawn at random must be safe before any row can be removed, if `unsafe_left`
            is right. `None` if the set has too few rows, and 0 if rows are removed or nothing is left to remove.
    """

    removed: np.ndarray
    safe_drawn: int
    unsafe_left: int
    more_needed: int | None


def removable_rows(queue: ReviewQueue, level: float) -> FalseDiscoveryResult:
    """Find rows that can be removed so that on average at most a fraction `level` of them is benign.

    The fraction counts only rows without a known verdict. So rows that are trained on the same tokens as a row found to
    be unsafe are not tested: they would let benign rows in. Rows that are trained on the same tokens as a row found
    to be safe are tested, but not removed.

    1. The scores are fitted without the verdicts on rows that were drawn at random and found to be safe (the calibration
       rows), so that these rows are treated like the benign rows without a verdict. The ranking takes high-scoring rows out
       of the tested rows only, which makes the p-values larger, not smaller.
    2. The conformal p-value of a tested row is `(1 + c) / (1 + m)`, where `c` of the `m` calibration rows have at least its
       score.
    3. The procedure of Benjamini and Hochberg at `level` selects the rows.

    Source: Bates et al. 2023 (conformal p-values for outliers), Marandon et al. 2024 (AdaDetect, learned scores).

    Args:
        queue ([`ReviewQueue`]):
            The review. Until a row is found to be unsafe, the scores are the default measure.
        level (`float`):
            The false discovery rate, between 0 and 1.

    Returns:
        [`FalseDiscoveryResult`]
    """
    labels = queue.labels
    drawn = {verdict.row for verdict in queue.verdicts if verdict.drawn_from is not None}
    calibration = [row for row in drawn if labels[row] == "safe"]
    scores = queue.fit_scores({row: label for row, label in labels.items() if row not in drawn or label == "unsafe"})
    known = queue.known_labels
    is_tested = ~queue.is_seen
    is_tested[[row for row, label in known.items() if label == "unsafe"]] = False
    tested = np.flatnonzero(is_tested)
    calibration_scores = np.sort(scores[calibration])
    removed = np.zeros(len(scores), dtype=bool)
    unsafe_left = unsafe_rows_left(queue.verdicts, known, len(scores), ASSUMED_ROWS)
    if queue.is_known.all():
        return FalseDiscoveryResult(removed, len(calibration), unsafe_left, 0)
    at_least = len(calibration) - np.searchsorted(calibration_scores, scores[tested], side="left")
    p_values = (1 + at_least) / (1 + len(calibration))
    selected = false_discovery_control(p_values) <= level
    if selected.any():
        removed[tested[selected]] = True
        removed[list(known)] = False
        return FalseDiscoveryResult(removed, len(calibration), unsafe_left, 0)
    needed = _calibration_rows_needed(at_least, unsafe_left, level)
    is_possible = needed <= len(calibration) + len(tested) - unsafe_left
    more_needed = max(needed - len(calibration), 1) if is_possible else None
    return FalseDiscoveryResult(removed, len(calibration), unsafe_left, more_needed)


def _calibration_rows_needed(at_least: np.ndarray, unsafe_left: int, level: float) -> int:
    """At least how many calibration rows there must be before a row is selected.

    The procedure selects `k` rows if the largest of their p-values, `(1 + c) / (1 + m)`, is at most `level * k / tested`. If
    at most `level` of them may be benign, `k` is hardly larger than the number of unsafe rows. Further random draws reduce
    `k` and the number of tested rows by the same factor.

    Args:
        at_least (`np.ndarray` of shape `(tested,)`, integer):
            How many of the calibration rows so far have at least the score of each tested row.
        unsafe_left (`int`):
            The number of unsafe rows among the tested ones.
        level (`float`):
            The false discovery rate.
    """
    tested = len(at_least)
    selected = np.minimum(np.arange(1, tested + 1), unsafe_left)
    return math.ceil(((1 + np.sort(at_least)) * tested / (level * selected)).min()) - 1
