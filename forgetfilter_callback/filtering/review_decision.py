"""[`ReviewDecision`]: the decision of a reviewer, exported from the report."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import DecisionError
from ..measures.names import MEASURES, Measure
from ..trace.trace import Trace


Override = Literal["keep", "remove"]
_ADVICE = "Export review_decision.json from the report that `forgetfilter report` writes."
# What another file of this library is, by a key that only this file has.
_OTHER_FILES = {
    "separability": "a filter result (filter_result.json), which records what a filter removed",
    "sessions": "the manifest of a trace (manifest.json)",
    "spearman": "the checks of early stopping (early_stopping.json)",
}


@dataclass(frozen=True)
class ReviewDecision:
    """The decision of a reviewer. The report exports it as `review_decision.json`.

    Attributes:
        measure (`"combined"`, `"loss"`, `"relative"`, `"pooled"`, `"smoothed"` or `"rouge1"`):
            The measure of forgetting that the reviewer looked at.
        threshold (`float` or `None`):
            The threshold φ. `None` removes only the overridden samples.
        overrides (`dict[str, str]`):
            Sample id to `"keep"` or `"remove"`, regardless of the threshold. Identical rows follow.
        trace (`str`):
            The [`~Trace.identity`] of the reviewed trace, with `measure`.
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
        content = _read_object(Path(file))
        missing = [each.name for each in fields(cls) if each.name not in content]
        if missing:
            raise DecisionError(f"{file} is not a reviewer's decision: it has no {', '.join(missing)}. {_ADVICE}")
        decision = cls(**{each.name: content[each.name] for each in fields(cls)})
        threshold, overrides = decision.threshold, decision.overrides
        is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool) and math.isfinite(threshold)
        are_overrides = isinstance(overrides, dict) and all(each in get_args(Override) for each in overrides.values())
        if decision.measure not in MEASURES or not (threshold is None or is_number) or not are_overrides:
            raise DecisionError(
                f'{file} is not a valid reviewer\'s decision: "measure" must be one of {", ".join(MEASURES)}, '
                '"threshold" a number or null, and every value of "overrides" "keep" or "remove".'
            )
        return decision

    def check(self, trace: Trace) -> None:
        """Raise a [`DecisionError`] unless the decision was made on `trace` and on the records that it has now."""
        identity = trace.identity(self.measure)
        # Decisions of older versions are tied to the records of the safety session only, also with measure="relative".
        if self.trace != identity and self.trace != trace.identity():
            raise DecisionError(
                f"This decision was made on another trace ({self.trace}; this one is {identity}), or before a record of "
                "this trace was written or replaced. Write a report of this trace and decide there."
            )


def _read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object. Errors say what another file is."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DecisionError(f"{file} does not exist. {_ADVICE}") from None
    except (OSError, ValueError) as error:  # a folder, not UTF-8 or not JSON
        raise DecisionError(f"{file} is not a reviewer's decision: {error}. {_ADVICE}") from error
    first = content[0] if isinstance(content, list) and content else content
    for key, description in _OTHER_FILES.items():
        if isinstance(first, dict) and key in first:
            raise DecisionError(f"{file} is {description}. A reviewer's decision is needed here. {_ADVICE}")
    if not isinstance(content, dict):
        raise DecisionError(f"{file} is not a reviewer's decision: it contains no JSON object. {_ADVICE}")
    return content
