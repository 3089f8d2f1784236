"""Relative forgetting as a metric for `evaluate.load` (see [`forgetfilter_callback.measures.evaluate_metrics`])."""

import evaluate
import numpy as np

from forgetfilter_callback.measures.evaluate_metrics import metric_info, metric_result
from forgetfilter_callback.measures.relative import relative_forgetting


class RelativeForgetting(evaluate.Metric):
    """Fraction of each sample's learning gain that was undone (see [`relative_forgetting`])."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Fraction of what noisy finetuning taught that safety finetuning undid: 0 if nothing, 1 if everything.",
            {
                "predictions": "mean loss of each sample after safety finetuning, in nats per token",
                "references": "mean loss of each sample before safety finetuning, in nats per token",
                "base": "mean loss of each sample under the base model, in nats per token",
            },
            "float64",
        )

    def _compute(
        self, predictions: list[float], references: list[float], base: list[float]
    ) -> dict[str, list[float] | float]:
        return metric_result(relative_forgetting(np.asarray(base), np.asarray(references), np.asarray(predictions)))
