"""TODO"""

from __future__ import annotations

from typing import Literal, get_args


Measure = Literal["loss", "relative", "pooled", "smoothed", "rouge1"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
DEFAULT_MEASURE: Measure = "smoothed"
UNITS: dict[Measure, str] = {
    "loss": "nats per token",
    "relative": "part of what S1 taught",
    "pooled": "nats_per_unit",
    "smoothed": "of the typical change",
    "rouge1": "ROUGE-1",
}
