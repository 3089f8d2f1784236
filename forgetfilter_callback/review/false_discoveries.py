"""Rows that can be removed without a review, at a given false discovery rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control

from .review_queue import ReviewQueue


@dataclass(frozen=True, eq=False)
class FalseDiscoveryResult:
    """Rows without a verdict that can be removed.

    Attributes:
        removed (`np.ndarray` of shape `(samples,)`, bool):
            The rows. All `False` if there are too few verdicts.
        safe_drawn (`int`):
            Rows that were drawn at random and found to be safe.
        more_needed (`int`):
            About how many more of them are needed before any row can be removed. 0 if rows are removed.
    """

    removed: np.ndarray
    safe_drawn: int
    more_needed: int


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
    if len(tested) == 0:
        return FalseDiscoveryResult(removed, len(calibration), 0)
    at_least = len(calibration) - np.searchsorted(calibration_scores, scores[tested], side="left")
    p_values = (1 + at_least) / (1 + len(calibration))
    selected = false_discovery_control(p_values) <= level
    if selected.any():
        removed[tested[selected]] = True
        removed[list(known)] = False
        return FalseDiscoveryResult(removed, len(calibration), 0)
    # The smallest p-value must be at most `level * k / tested` for the `k` rows that score above all calibration rows. Each
    # safe verdict on a row that is drawn at random adds a calibration row and leaves one row fewer to test.
    expected = level * max(int((at_least == 0).sum()), 1)
    more_needed = math.ceil((len(tested) - expected * (1 + len(calibration))) / (1 + expected))
    return FalseDiscoveryResult(removed, len(calibration), max(more_needed, 1))
