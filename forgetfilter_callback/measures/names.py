"""Names, default and units of the forgetting measures."""

from __future__ import annotations

from typing import Literal, get_args


Measure = Literal["combined", "loss", "relative", "pooled", "smoothed", "rouge1"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
DEFAULT_MEASURE: Measure = "combined"
# The unit of measures that depend on how much safety finetuning changes the model: 1 is what a typical token changes.
TYPICAL_CHANGES = "typical changes"
UNITS: dict[Measure, str] = {
    "combined": TYPICAL_CHANGES,
    "loss": "nats per token",
    "relative": "fraction of what was learned",
    "pooled": "nats",
    "smoothed": TYPICAL_CHANGES,
    "rouge1": "ROUGE-1",
}
