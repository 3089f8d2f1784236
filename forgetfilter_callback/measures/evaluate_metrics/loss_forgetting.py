"""Loss forgetting as a metric for `evaluate.load` (see [`forgetfilter_callback.measures.evaluate_metrics`])."""

import evaluate
import numpy as np

from forgetfilter_callback.measures.evaluate_metrics import metric_info, metric_result
from forgetfilter_callback.measures.loss import loss_forgetting


class LossForgetting(evaluate.Metric):
    """Rise of each sample's mean loss, in nats per token (see [`loss_forgetting`])."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Rise of each sample's mean loss during safety finetuning, in nats per token.",
            {
                "predictions": "mean loss of each sample after safety finetuning, in nats per token",
                "references": "mean loss of each sample before safety finetuning, in nats per token",
            },
            "float64",
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, list[float] | float]:
        return metric_result(loss_forgetting(np.asarray(references), np.asarray(predictions)))
