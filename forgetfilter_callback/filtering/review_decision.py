"""TODO"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..errors import DecisionError
from ..measures.names import MEASURES, Measure
from ..thresholds import Threshold
from ..trace.trace import Trace


Override = Literal["keep", "remove"]


@dataclass(frozen=True)
class ReviewDecision:
    """What a reviewer decided. The review page exports it as JSON, which `decision=` and `forgetfilter filter` take.

    Attributes:
        measure (`"loss"`, `"relative"`, `"pooled"`, `"smoothed"` or `"rouge1"`):
            Which forgetting was looked at.
        threshold (`float` or `None`):
            φ; `None` where nothing is removed but by hand.
        overrides (`dict[str, str]`):
            Sample ids, each with `"keep"` or `"remove"`, whatever φ says.
        trace (`str`):
            The [`~Trace.identity`] of the trace that was looked at.
    """

    measure: Measure
    threshold: float | None
    overrides: dict[str, Override]
    trace: str

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> ReviewDecision:
        """Reads an exported decision.

        Raises:
            DecisionError: if `file` is not one.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            review = cls(**{name: content[name] for name in ("measure", "threshold", "overrides", "trace")})
            threshold_fits = review.threshold is None or math.isfinite(float(review.threshold))
            by_hand_fits = all(value in get_args(Override) for value in review.overrides.values())
        except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DecisionError(
                f"{file} is no decision ({type(error).__name__}: {error}). Export one from the review page that "
                "`forgetfilter report` makes."
            ) from error
        if review.measure not in MEASURES or not threshold_fits or not by_hand_fits:
            raise DecisionError(
                f"{file} is no decision: `measure` must be one of {', '.join(MEASURES)}, `threshold` a number or null, and "
                "every value in `overrides` 'keep' or 'remove'."
            )
        return review

    def check(self, identity: str) -> None:
        """Refuses a decision made on another trace, or before its last record."""
        if identity != self.trace:
            raise DecisionError(
                f"This decision was made on another trace ({self.trace}, this one is {identity}), or on this one before its "
                "last record was taken. Make a review page of this trace and decide there."
            )


def load_review(
    decision: str | os.PathLike[str],
    trace: Trace | None,
    measure: Measure | None,
    threshold: Threshold,
    fraction: float | None,
) -> ReviewDecision:
    """A reviewer's decision on `trace`; refused beside other settings or on another trace."""
    if (measure, threshold, fraction) != (None, "auto", None):
        raise DecisionError(
            "A decision says measure and φ itself: give `decision`, or `measure`, `threshold`, `fraction`."
        )
    if trace is None:
        raise DecisionError("A decision was made on a trace: pass the trace, or its folder, as `forgetting`.")
    review = ReviewDecision.load(decision)
    review.check(trace.identity())
    return review
