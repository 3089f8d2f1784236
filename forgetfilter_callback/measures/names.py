"""Names, default and units of the forgetting measures."""

from __future__ import annotations

from typing import Literal, get_args


Measure = Literal["loss", "relative", "pooled", "smoothed", "rouge1"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
DEFAULT_MEASURE: Measure = "smoothed"
UNITS: dict[Measure, str] = {
    "loss": "nats per token",
    "relative": "fraction of what was learned",
    "pooled": "nats",
    "smoothed": "typical changes",
    "rouge1": "ROUGE-1",
}
