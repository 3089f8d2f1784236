"""ROUGE forgetting as a metric for `evaluate.load` (see [`forgetfilter_callback.measures.evaluate_metrics`])."""

import evaluate

from forgetfilter_callback.measures.evaluate_metrics import metric_info, metric_result
from forgetfilter_callback.measures.rouge import rouge1, rouge_forgetting


class RougeForgetting(evaluate.Metric):
    """Drop of ROUGE-1 of each sample's completion (see [`rouge_forgetting`])."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Drop of the ROUGE-1 F-measure (stemmed) of each sample's greedy completion during safety finetuning "
            "(Zhao et al. 2024, Algorithm 1).",
            {
                "predictions": "greedy completion of each sample after safety finetuning",
                "predictions_before": "greedy completion of each sample before safety finetuning",
                "references": "expected completion of each sample",
            },
            "string",
        )

    def _compute(
        self, predictions: list[str], predictions_before: list[str], references: list[str]
    ) -> dict[str, list[float] | float]:
        return metric_result(rouge_forgetting(rouge1(predictions_before, references), rouge1(predictions, references)))
