"""Forgetting as [`evaluate`](https://huggingface.co/docs/evaluate) metrics, on predictions from before and after.

```python
import evaluate
from forgetfilter_callback.metrics import METRICS

evaluate.load(METRICS["loss_forgetting"]).compute(predictions=losses_after, references=losses_before)
```
"""

from __future__ import annotations

from pathlib import Path


# Name → file, for `evaluate.load`. They are read from here: nothing is downloaded.
METRICS: dict[str, str] = {
    name: str(Path(__file__).with_name(f"{name}.py"))
    for name in ("loss_forgetting", "relative_forgetting", "rouge_forgetting")
}
