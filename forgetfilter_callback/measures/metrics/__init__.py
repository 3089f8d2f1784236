"""Forgetting as [`evaluate`](https://huggingface.co/docs/evaluate) metrics, on predictions from before and after.

```python
import evaluate
from forgetfilter_callback.measures.metrics import METRICS

evaluate.load(METRICS["loss_forgetting"]).compute(predictions=losses_after, references=losses_before)
```
"""

from __future__ import annotations

from pathlib import Path

import datasets
import evaluate
import numpy as np


# Name → file, for `evaluate.load`. They are read from here: nothing is downloaded.
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
    """What `evaluate` is told of a metric whose inputs (name → what it is) all have one dtype."""
    lines = [f"    {name} (`list[{dtype}]`): {what}" for name, what in inputs.items()]
    returns = (
        "    forgetting (`list[float]`): one value a sample; higher is more forgotten.\n    mean (`float`): their mean."
    )
    return evaluate.MetricInfo(
        description=description,
        citation=_CITATION,
        inputs_description="\n".join(["Args:", *lines, "Returns:", returns]),
        features=datasets.Features({name: datasets.Value(dtype) for name in inputs}),
    )


def metric_result(values: np.ndarray) -> dict[str, list[float] | float]:
    """Values and their mean, without samples that have none."""
    return {"forgetting": values.tolist(), "mean": float(np.nanmean(values))}
