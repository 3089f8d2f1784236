"""Loss forgetting, for `evaluate.load`: see [`forgetfilter_callback.metrics`]."""

import evaluate
import numpy as np

from forgetfilter_callback.measures.loss import loss_forgetting
from forgetfilter_callback.measures.metrics import metric_info, metric_result


class LossForgetting(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Rise of a sample's mean loss during safety finetuning, in nats per token.",
            {
                "predictions": "after safety finetuning, mean loss of each sample in nats per token",
                "references": "the same before it",
            },
            "float64",
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, list[float] | float]:
        return metric_result(loss_forgetting(np.asarray(references), np.asarray(predictions)))
