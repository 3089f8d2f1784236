"""Loss forgetting, for `evaluate.load`: see [`forgetfilter_callback.metrics`]."""

import datasets
import evaluate
import numpy as np

from forgetfilter_callback.forgetting import loss_forgetting


DESCRIPTION = """Rise of a sample's mean loss during safety finetuning, in nats per token."""
INPUTS = """
Args:
    predictions (`list[float]`): mean loss of each sample after safety finetuning, nats per token.
    references (`list[float]`): the same before it.
Returns:
    forgetting (`list[float]`): one value a sample; higher is more forgotten.
    mean (`float`): their mean, without samples that have none.
"""
CITATION = """@inproceedings{zhao2024forgetfilter,
  title={Learning and Forgetting Unsafe Examples in Large Language Models},
  author={Zhao, Jiachen and Deng, Zhun and Madras, David and Zou, James and Ren, Mengye},
  booktitle={ICML}, year={2024}
}"""


class LossForgetting(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, list[float] | float]:
        values = loss_forgetting(np.asarray(references), np.asarray(predictions))
        return {"forgetting": values.tolist(), "mean": float(np.nanmean(values))}
