"""ROUGE forgetting: the drop of ROUGE-1 of greedy completions, the measure of the paper."""

from __future__ import annotations

import numpy as np

from ..utils.optional_packages import requires_extra


def rouge_forgetting(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Computes the drop of each sample's ROUGE-1 during safety finetuning.

    Formula: `before - after`.

    Use it to reproduce the paper. It works on data that the model reproduces from memory, and it is slow: every record
    generates one completion per sample.

    Source: Zhao et al. 2024, Algorithm 1.

    Args:
        before (`np.ndarray` of shape `(samples,)`, float64):
            ROUGE-1 at the start of safety finetuning, between 0 and 1 (see [`rouge1`]).
        after (`np.ndarray` of shape `(samples,)`, float64):
            ROUGE-1 at a later step.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, between -1 and 1. Higher is more forgotten.
    """
    return before - after


def rouge1(completions: list[str], references: list[str]) -> np.ndarray:
    """Computes the ROUGE-1 F-measure of each completion against its reference, with stemming.

    Formula: `2 * P * R / (P + R)`, where `P` and `R` are the precision and recall of stemmed unigrams.

    Source: Lin 2004, as implemented in the package `rouge-score` and used in Zhao et al. 2024, Algorithm 1.

    Args:
        completions (`list[str]`):
            One greedy completion per sample.
        references (`list[str]`):
            The expected completions, in the same order.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64, between 0 and 1; NaN where the reference is empty.

    Raises:
        ImportError: if the package `rouge-score` is not installed.
    """
    with requires_extra("rouge", "rouge1"):
        from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    return np.array(
        [
            scorer.score(reference, completion)["rouge1"].fmeasure if reference.strip() else np.nan
            for completion, reference in zip(completions, references, strict=True)
        ]
    )
