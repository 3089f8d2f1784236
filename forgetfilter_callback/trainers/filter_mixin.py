"""TODO"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset
from torch.utils.data import Subset
from transformers import TrainingArguments

from ..callbacks.tracker import ForgetTracker
from ..filtering.find_forgotten import align_values, filter_by_values, find_forgotten
from ..filtering.result import FilterResult
from ..filtering.review_decision import load_review
from ..measures.names import DEFAULT_MEASURE, Measure
from ..thresholds import Threshold
from ..trace.trace import Trace


logger = get_logger(__name__)  # says things once, on the main process

FILTER_FOLDER = "_forgetfilter-decision"  # not pushed to the Hub, as the trace is not

Forgetting = ForgetTracker | str | os.PathLike[str] | tuple[Sequence[str], Sequence[float]] | np.ndarray


class FilterMixin:
    """What filtered trainers have in common; it knows nothing of how a trainer prepares its rows."""

    removed_dataset: Any = None
    filter_result: FilterResult | None = None

    def _filter(
        self,
        given: Any,
        ids: pa.StringArray,
        forgetting: Forgetting,
        measure: Measure | None,
        threshold: Threshold,
        fraction: float | None,
        decision: str | os.PathLike[str] | None,
    ) -> Any:
        """The kept ones of the rows as given. A row without an id is kept."""
        trace = trace_of(forgetting)
        overrides = None
        if decision is not None:
            review = load_review(decision, trace, measure, threshold, fraction)
            measure, overrides = review.measure, review.overrides
            threshold = review.threshold if review.threshold is not None else math.inf
        if trace is not None:
            result = find_forgotten(
                trace, measure or DEFAULT_MEASURE, threshold, fraction, ids=ids, overrides=overrides
            )
        elif measure is None:
            raise ValueError(
                "Say what the values measure: `measure=`. (Or pass the trace, or its folder, rather than its values: "
                "`smoothed` is checked by more than them.)"
            )
        else:
            result = filter_by_values(ids, given_values(ids, forgetting), measure, threshold, fraction)
        self.filter_result = result
        self.removed_dataset = rows_at(given, np.flatnonzero(result.removed))
        logger.warning(f"{type(self).__name__}: {result.summary()}")
        return rows_at(given, np.flatnonzero(~result.removed))

    def _save_decision(self, args: TrainingArguments) -> None:
        assert self.filter_result is not None
        if args.should_save:
            self.filter_result.save(Path(args.output_dir) / FILTER_FOLDER, self.removed_dataset)


def trace_of(forgetting: Forgetting) -> Trace | None:
    """The trace, where `forgetting` has one."""
    if isinstance(forgetting, ForgetTracker):
        return forgetting.trace
    return Trace.open(forgetting) if isinstance(forgetting, str | os.PathLike) else None


def warn_nothing_filtered(
    measure: Measure | None,
    threshold: Threshold,
    fraction: float | None,
    decision: str | os.PathLike[str] | None,
) -> None:
    """Says that there is no `forgetting`; refuses what could apply to nothing else."""
    if (measure, threshold, fraction, decision) != (None, "auto", None, None):
        raise ValueError("There is nothing to filter by: pass the tracker, a trace or values as `forgetting`.")
    logger.warning("No `forgetting` was given, so nothing is filtered.")


def given_values(ids: pa.StringArray, forgetting: Any) -> np.ndarray:
    """The values that were given, `(ids, values)` or an array, for the rows with `ids`: NaN where there is none.

    Raises:
        ValueError: if they do not fit the rows.
    """
    if isinstance(forgetting, tuple):
        known, values = pa.array(forgetting[0], pa.string()), np.asarray(forgetting[1], dtype=np.float64)
        if len(known) != len(values):
            raise ValueError(f"forgetting=(ids, values) has {len(known)} ids and {len(values)} values.")
        return align_values(ids, known, values)
    values = np.asarray(forgetting, dtype=np.float64)
    if len(values) != len(ids):
        raise ValueError(
            f"forgetting has {len(values)} values and the training set {len(ids)} rows. A bare array must be for "
            "the same rows in the same order; pass (ids, values) otherwise."
        )
    return np.where(pc.is_valid(ids), values, np.nan)


def rows_at(dataset: Any, indices: np.ndarray) -> Any:
    """Some rows of a dataset, as given."""
    return dataset.select(indices) if isinstance(dataset, Dataset) else Subset(dataset, indices.tolist())
