"""Forgetting measures as [`evaluate`](https://huggingface.co/docs/evaluate) metrics.

```python
import evaluate
from forgetfilter_callback.measures.evaluate_metrics import METRICS

evaluate.load(METRICS["loss_forgetting"]).compute(predictions=losses_after, references=losses_before)
```
"""

from __future__ import annotations

from pathlib import Path

import datasets
import evaluate
import numpy as np


# Metric name → path for `evaluate.load`. The metrics are loaded from these local files; nothing is downloaded.
METRICS: dict[str, str] = {
    name: str(Path(__file__).with_name(f"{name}.py"))
    for name in ("loss_forgetting", "relative_forgetting", "rouge_forgetting")
}


_CITATION = """@inproceedings{zhao2024forgetfilter,
  title={Learning and Forgetting Unsafe Examples in Large Language Models},
  author={Zhao, Jiachen and Deng, Zhun and Madras, David and Zou, James and Ren, Mengye},
  booktitle={ICML}, year={2024}
}"""


def metric_info(description: str, inputs: dict[str, str], dtype: str) -> evaluate.MetricInfo:
    """Builds the `MetricInfo` of a forgetting metric.

    Args:
        description (`str`):
            What the metric computes.
        inputs (`dict[str, str]`):
            Description of each input, by name.
        dtype (`str`):
            Type of all inputs, `"float64"` or `"string"`.
    """
    lines = [f"    {name} (`list[{dtype}]`): {text}" for name, text in inputs.items()]
    returns = (
        "    forgetting (`list[float]`): one value per sample; higher is more forgotten.\n"
        "    mean (`float`): mean over the samples that have a value."
    )
    return evaluate.MetricInfo(
        description=description,
        citation=_CITATION,
        inputs_description="\n".join(["Args:", *lines, "Returns:", returns]),
        features=datasets.Features({name: datasets.Value(dtype) for name in inputs}),
    )


def metric_result(values: np.ndarray) -> dict[str, list[float] | float]:
    """Returns the values and their mean; NaN values are ignored in the mean."""
    return {"forgetting": values.tolist(), "mean": float(np.nanmean(values))}
