"""ROUGE forgetting, for `evaluate.load`: see [`forgetfilter_callback.metrics`]."""

import evaluate

from forgetfilter_callback.measures.metrics import metric_info, metric_result
from forgetfilter_callback.measures.rouge import rouge1, rouge_forgetting


class RougeForgetting(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Drop of ROUGE-1 (F-measure, stemmed) of a sample's greedy completion (Zhao et al. 2024, Algorithm 1).",
            {
                "predictions": "completion of each sample after safety finetuning",
                "predictions_before": "the same before it",
                "references": "what the completions should be",
            },
            "string",
        )

    def _compute(
        self, predictions: list[str], predictions_before: list[str], references: list[str]
    ) -> dict[str, list[float] | float]:
        return metric_result(rouge_forgetting(rouge1(predictions_before, references), rouge1(predictions, references)))
