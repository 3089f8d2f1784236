"""Names, default, units and meanings of the forgetting measures."""

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
# What a value means, for a reviewer.
MEANINGS: dict[Measure, str] = {
    "combined": "How much the model forgot the row in safety finetuning, compared with the other rows of this run only.",
    "loss": "0.69 means that the tokens of the row became half as likely, on geometric average; 0 means no change.",
    "relative": "1 means that all that noisy finetuning taught about the row was lost; 0 means that nothing was.",
    "pooled": "0.69 means that the most forgotten words of the row became half as likely in other rows; 0 means no change.",
    "smoothed": "1 means that the most forgotten tenth of the tokens lost as much as a typical change takes; 0 means that "
    "they lost nothing.",
    "rouge1": "0.5 means that the model's answer shares that much less with the row than before; 0 means no change.",
}
