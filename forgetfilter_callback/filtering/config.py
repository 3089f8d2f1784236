"""[`FilterConfig`]: which samples are removed."""

from __future__ import annotations

import math
import os
from dataclasses import KW_ONLY, dataclass, field
from numbers import Real
from typing import Any, Literal

from ..measures.names import MEASURES, Measure
from ..utils.argument_checks import check_minimum, check_true_or_false


Threshold = float | Literal["auto", "fdr"]
DEFAULT_LEVEL = 0.1


@dataclass(frozen=True)
class FilterConfig:
    """Which samples are removed. Used by the trainers, [`ForgetFilter`], [`find_forgotten`] and the command line.

    By default, the threshold φ is chosen automatically on the default measure, and nothing is removed if the forgetting
    values do not separate into two groups.

    Args:
        measure (`"combined"`, `"loss"`, `"relative"`, `"pooled"`, `"smoothed"` or `"rouge1"`, *optional*):
            The measure of forgetting. Defaults to `"combined"`. It must be given if forgetting is passed as plain values.
        threshold (`"auto"`, `"fdr"` or `float`, defaults to `"auto"`):
            The threshold φ, in the unit of the measure: samples with a larger forgetting are removed. `"auto"` chooses φ
            from the values alone. If `reviewed` is given, `"auto"` uses no φ: only rows found to be unsafe are removed.
            `"fdr"` needs `reviewed`: rows without a verdict are removed too, as long as at most the fraction `level` of them
            is expected to be benign. It uses the ranking of the review, so `measure` and `step` cannot be given with it.
        fraction (`float`, *optional*):
            Between 0 and 1. Removes this fraction of the samples, the most forgotten ones, instead of using a threshold.
            Samples with equal values are removed or kept together.
        step (`int`, *optional*):
            The record of the safety session at which forgetting is measured. Defaults to the last one.
        decision (`str` or `Path`, *optional*):
            A `review_decision.json` that a reviewer exported from the report. It contains the measure, the threshold
            and the overridden samples, so it cannot be combined with the other arguments.
        reviewed (`str` or `Path`, *optional*):
            The folder with the verdicts of a [`ReviewQueue`]. Rows found to be unsafe are removed and rows found to be safe
            are kept, regardless of the threshold.
        level (`float`, defaults to 0.1):
            The false discovery rate for `threshold="fdr"`, between 0 and 1: the expected fraction of benign rows among those
            removed without a verdict.
        weights (`bool`, defaults to `False`):
            Removes nothing. [`FilteredTrainer`] trains on all rows instead, each with the weight 1 − its probability of
            being unsafe. Needs `reviewed`: the probabilities are estimated from the verdicts.

    Raises:
        ValueError: if a value is out of range, or if arguments exclude each other.
    """

    measure: Measure | None = field(
        default=None,
        metadata={
            "help": "|".join(MEASURES),
            "metavar": "MEASURE",
            "default": "combined",
            "group": "Filtering",
        },
    )
    threshold: Threshold = field(
        default="auto",
        metadata={
            "help": "Remove rows above this φ: a number or auto.",
            "metavar": "NUMBER",
            "group": "Filtering",
        },
    )
    _: KW_ONLY
    fraction: float | None = field(
        default=None,
        metadata={"help": "Remove this fraction of the rows instead.", "metavar": "FRACTION", "group": "Filtering"},
    )
    step: int | None = field(
        default=None,
        metadata={
            "help": "Record of safety finetuning to measure at.",
            "metavar": "STEP",
            "default": "the last",
            "group": "Filtering",
        },
    )
    decision: str | os.PathLike[str] | None = field(
        default=None,
        metadata={
            "help": "review_decision.json, exported from the page of `report`.",
            "metavar": "FILE",
            "group": "Reviewed rows",
        },
    )
    reviewed: str | os.PathLike[str] | None = field(
        default=None,
        metadata={
            "help": "Verdicts of a review. Allows --threshold fdr.",
            "metavar": "FOLDER",
            "group": "Reviewed rows",
        },
    )
    level: float = field(
        default=DEFAULT_LEVEL,
        metadata={
            "help": "With fdr: allowed fraction of wrong removals.",
            "metavar": "FRACTION",
            "group": "Reviewed rows",
        },
    )
    weights: bool = False

    def __post_init__(self) -> None:
        if self.measure is not None and self.measure not in MEASURES:
            raise ValueError(f"measure={self.measure!r} is unknown. Choose one of {', '.join(MEASURES)}.")
        object.__setattr__(self, "threshold", parse_threshold(self.threshold))
        if self.fraction is not None and not (isinstance(self.fraction, Real) and 0 < self.fraction < 1):
            raise ValueError(f"fraction={self.fraction!r} must be between 0 and 1 (both excluded).")
        if self.fraction is not None and self.threshold != "auto":
            raise ValueError("`threshold` and `fraction` exclude each other. Pass one of them.")
        check_minimum("step", self.step, 0)
        check_true_or_false("weights", self.weights)
        others = (self.measure, self.threshold, self.fraction, self.step)
        if not (isinstance(self.level, Real) and 0 < self.level < 1):
            raise ValueError(f"level={self.level!r} must be between 0 and 1 (both excluded).")
        if self.threshold == "fdr" and self.reviewed is None:
            raise ValueError(
                "threshold='fdr' needs verdicts on rows that were drawn at random. Review rows with a `ReviewQueue` or "
                "`forgetfilter review`, and pass the folder of the review as `reviewed` (`forgetfilter filter --reviewed`)."
            )
        if self.threshold == "fdr" and (self.measure, self.step) != (None, None):
            raise ValueError(
                "threshold='fdr' uses the ranking of the review, which combines all measures at the last record. Leave out "
                "`measure` and `step`."
            )
        if self.threshold != "fdr" and self.level != DEFAULT_LEVEL:
            raise ValueError(f"level={self.level} has an effect only with threshold='fdr'. Pass both, or leave it out.")
        if self.decision is not None and self.reviewed is not None:
            raise ValueError("`decision` and `reviewed` exclude each other. Pass one of them.")
        if self.weights and (self.reviewed is None or (self.threshold, self.fraction) != ("auto", None)):
            raise ValueError(
                "`weights` removes no row, so it excludes `threshold` and `fraction`, and it needs verdicts: pass the "
                "folder of a review as `reviewed`."
            )
        if self.weights and (self.measure, self.step) != (None, None):
            raise ValueError(
                "`weights` uses the ranking of the review, which combines all measures at the last record. Leave out "
                "`measure` and `step`."
            )
        if self.decision is not None and others != (None, "auto", None, None):
            raise ValueError(
                "`decision` already contains the measure and the threshold, and it was made on the last record. Pass "
                "either `decision`, or `measure`, `threshold`, `fraction` and `step`."
            )


def filter_config_or_default(filter_config: Any, name: str = "filter_config") -> FilterConfig:
    """Return `filter_config`, or `FilterConfig()` for `None`. `name` is the name of the argument.

    Raises:
        TypeError: if it is anything else, such as a dictionary.
    """
    if filter_config is None:
        return FilterConfig()
    if not isinstance(filter_config, FilterConfig):
        raise TypeError(
            f"`{name}` must be a FilterConfig, but it is {type(filter_config).__name__}. Pass `FilterConfig(...)`, or "
            "`FilterConfig(**settings)` for a dictionary."
        )
    return filter_config


def parse_threshold(threshold: float | str) -> Threshold:
    """A threshold as a number, `"auto"` or `"fdr"`; numbers may be given as text."""
    if threshold == "auto":
        return "auto"
    if threshold == "fdr":
        return "fdr"
    try:
        value = math.nan if isinstance(threshold, bool) else float(threshold)
    except (TypeError, ValueError):
        value = math.nan
    if math.isnan(value) or (isinstance(threshold, str) and math.isinf(value)):
        raise ValueError(f"threshold={threshold!r} must be a number, 'auto' or 'fdr'.")
    return value
