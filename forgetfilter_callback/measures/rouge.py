"""TODO"""

from __future__ import annotations

import numpy as np
from rouge_score.rouge_scorer import RougeScorer


def rouge_forgetting(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Drop of ROUGE-1, R_0 − R_t, of shape `(samples,)`, −1..1 (Zhao et al. 2024, Algorithm 1)."""
    return before - after


def rouge1(completions: list[str], references: list[str]) -> np.ndarray:
    """ROUGE-1 F-measure with stemming of each completion against its reference.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, 0..1; NaN where the reference is empty.
    """
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    return np.array(
        [
            scorer.score(reference, completion)["rouge1"].fmeasure if reference.strip() else np.nan
            for completion, reference in zip(completions, references, strict=True)
        ]
    )
