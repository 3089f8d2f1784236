"""[`ReviewDecision`]: the decision of a reviewer, exported from the review page."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..errors import DecisionError
from ..measures.names import MEASURES, Measure


Override = Literal["keep", "remove"]


@dataclass(frozen=True)
class ReviewDecision:
    """The decision of a reviewer. The review page exports it as `review_decision.json`.

    Attributes:
        measure (`"loss"`, `"relative"`, `"pooled"`, `"smoothed"` or `"rouge1"`):
            The measure of forgetting that the reviewer looked at.
        threshold (`float` or `None`):
            The threshold φ. `None` removes only the overridden samples.
        overrides (`dict[str, str]`):
            Sample id to `"keep"` or `"remove"`, regardless of the threshold.
        trace (`str`):
            The [`~Trace.identity`] of the reviewed trace.
    """

    measure: Measure
    threshold: float | None
    overrides: dict[str, Override]
    trace: str

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> ReviewDecision:
        """Read `review_decision.json`.

        Raises:
            DecisionError: if `file` is not a valid reviewer's decision.
        """
        advice = "Export review_decision.json from the review page that `forgetfilter report` writes."
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            if "separability" in content:
                raise DecisionError(
                    f"{file} is a filter result (filter_result.json), which records what a filter removed. A reviewer's "
                    f"decision is needed here. {advice}"
                )
            decision = cls(**{name: content[name] for name in ("measure", "threshold", "overrides", "trace")})
            is_number = decision.threshold is None or math.isfinite(float(decision.threshold))
            are_overrides = all(override in get_args(Override) for override in decision.overrides.values())
        except DecisionError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DecisionError(
                f"{file} is not a reviewer's decision ({type(error).__name__}: {error}). {advice}"
            ) from error
        if decision.measure not in MEASURES or not is_number or not are_overrides:
            raise DecisionError(
                f"{file} is not a valid reviewer's decision: `measure` must be one of {', '.join(MEASURES)}, `threshold` a "
                "number or null, and every value of `overrides` 'keep' or 'remove'."
            )
        return decision

    def check(self, identity: str) -> None:
        """Raise a [`DecisionError`] unless the decision was made on the trace with this [`~Trace.identity`]."""
        if identity != self.trace:
            raise DecisionError(
                f"This decision was made on another trace ({self.trace}; this one is {identity}), or before the last record "
                "of this trace was written. Create a review page of this trace and decide there."
            )
