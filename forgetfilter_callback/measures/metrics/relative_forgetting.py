"""Relative forgetting, for `evaluate.load`: see [`forgetfilter_callback.metrics`]."""

import evaluate
import numpy as np

from forgetfilter_callback.measures.metrics import metric_info, metric_result
from forgetfilter_callback.measures.relative import relative_forgetting


class RelativeForgetting(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "The part of what finetuning taught that safety finetuning undid: 0 none of it, 1 all of it.",
            {
                "predictions": "after safety finetuning, mean loss of each sample in nats per token",
                "references": "the same before it",
                "base": "the same of the base model",
            },
            "float64",
        )

    def _compute(
        self, predictions: list[float], references: list[float], base: list[float]
    ) -> dict[str, list[float] | float]:
        return metric_result(relative_forgetting(np.asarray(base), np.asarray(references), np.asarray(predictions)))
