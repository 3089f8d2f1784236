"""Decide which samples to remove from the verdicts of a review."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import DecisionError
from ..review.false_discoveries import removable_rows
from ..review.review_queue import ReviewQueue
from ..trace.trace import Trace
from .config import FilterConfig
from .filter_by_values import filter_by_values
from .result import FilterResult
from .review_decision import Override


def find_reviewed(
    trace: Trace, config: FilterConfig, ids: pa.StringArray, values: np.ndarray, nats_per_unit: float
) -> FilterResult:
    """Remove the rows found to be unsafe, and keep those found to be safe. See [`FilterConfig`] for the other rows."""
    queue = ReviewQueue(trace, config.reviewed)
    if not queue.verdicts:
        raise DecisionError(
            f"There are no verdicts in {config.reviewed}. Review rows first: `ReviewQueue` stores them."
        )
    trace_ids = trace.rows.ids
    overrides: dict[str, Override] = {
        trace_ids[row].as_py(): "remove" if label == "unsafe" else "keep" for row, label in queue.labels.items()
    }
    in_set = pc.is_in(pa.array(list(overrides), pa.string()), value_set=ids).to_pylist()
    overrides = {id_: override for (id_, override), known in zip(overrides.items(), in_set, strict=True) if known}
    if config.threshold not in ("auto", "fdr") or config.fraction is not None:
        on_values = replace(config, step=None, reviewed=None)
        return filter_by_values(ids, values, on_values, overrides, nats_per_unit, trace.manifest["fingerprint"])
    no_threshold = replace(config, threshold=math.inf, step=None, reviewed=None)
    result = filter_by_values(ids, values, no_threshold, overrides, nats_per_unit, trace.manifest["fingerprint"])
    unsafe = sum(override == "remove" for override in overrides.values())
    reason = f"{len(overrides)} rows were reviewed, and the {unsafe} unsafe ones are removed"
    if config.threshold == "auto":
        return replace(result, method="reviewed", reason=f"{reason}; no other row is removed")
    found = removable_rows(queue, config.level)
    removed = result.removed | pc.is_in(ids, value_set=trace_ids.filter(pa.array(found.removed))).to_numpy(False)
    count = int(removed.sum() - result.removed.sum())
    if count:
        reason += f"; so are {count} rows without a verdict, with a false discovery rate of at most {config.level:g}"
    else:
        reason += (
            f"; about {found.more_needed} more safe verdicts on rows drawn at random are needed (there are "
            f"{found.safe_drawn}) before others can be removed with a false discovery rate of at most {config.level:g}; "
            "`forgetfilter review --random-fraction 1` shows such rows only"
        )
    return replace(result, removed=removed, method="fdr", reason=reason)
