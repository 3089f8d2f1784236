"""ROUGE forgetting, for `evaluate.load`: see [`forgetfilter_callback.metrics`]."""

import datasets
import evaluate
import numpy as np

from forgetfilter_callback.forgetting import rouge_forgetting
from forgetfilter_callback.generation import rouge1


DESCRIPTION = (
    """Drop of ROUGE-1 (F-measure, stemmed) of a sample's greedy completion (Zhao et al. 2024, Algorithm 1)."""
)
INPUTS = """
Args:
    predictions (`list[str]`): completion of each sample after safety finetuning.
    predictions_before (`list[str]`): the same before it.
    references (`list[str]`): what the completions should be.
Returns:
    forgetting (`list[float]`): one value a sample; higher is more forgotten.
    mean (`float`): their mean, without samples that have none.
"""
CITATION = """@inproceedings{zhao2024forgetfilter,
  title={Learning and Forgetting Unsafe Examples in Large Language Models},
  author={Zhao, Jiachen and Deng, Zhun and Madras, David and Zou, James and Ren, Mengye},
  booktitle={ICML}, year={2024}
}"""


class RougeForgetting(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "predictions_before": datasets.Value("string"),
                    "references": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self, predictions: list[str], predictions_before: list[str], references: list[str]
    ) -> dict[str, list[float] | float]:
        values = rouge_forgetting(rouge1(predictions_before, references), rouge1(predictions, references))
        return {"forgetting": values.tolist(), "mean": float(np.nanmean(values))}
