"""Relative forgetting, for `evaluate.load`: see [`forgetfilter_callback.metrics`]."""

import datasets
import evaluate
import numpy as np

from forgetfilter_callback.forgetting import relative_forgetting


DESCRIPTION = """The part of what finetuning taught that safety finetuning undid: 0 none of it, 1 all of it."""
INPUTS = """
Args:
    predictions (`list[float]`): mean loss of each sample after safety finetuning, nats per token.
    references (`list[float]`): the same before it.
    base (`list[float]`): the same of the base model.
Returns:
    forgetting (`list[float]`): one value a sample; higher is more forgotten.
    mean (`float`): their mean, without samples that have none.
"""
CITATION = """@inproceedings{zhao2024forgetfilter,
  title={Learning and Forgetting Unsafe Examples in Large Language Models},
  author={Zhao, Jiachen and Deng, Zhun and Madras, David and Zou, James and Ren, Mengye},
  booktitle={ICML}, year={2024}
}"""


class RelativeForgetting(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": datasets.Value("float64"),
                    "base": datasets.Value("float64"),
                }
            ),
        )

    def _compute(
        self, predictions: list[float], references: list[float], base: list[float]
    ) -> dict[str, list[float] | float]:
        values = relative_forgetting(np.asarray(base), np.asarray(references), np.asarray(predictions))
        return {"forgetting": values.tolist(), "mean": float(np.nanmean(values))}
