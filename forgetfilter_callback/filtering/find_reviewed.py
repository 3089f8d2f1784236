"""Decide which samples to remove from the verdicts of a review."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.encoded_rows import content_hash
from ..data.identical_rows import places_in, with_identical_rows
from ..errors import DecisionError
from ..measures.names import Measure
from ..review.false_discoveries import removable_rows
from ..review.review_queue import ReviewQueue
from ..review.unsafe_probabilities import unsafe_probabilities
from ..trace.trace import Trace
from ..utils.counted import counted
from .config import FilterConfig
from .filter_by_values import filter_by_values
from .result import FilterResult
from .review_decision import Override


logger = logging.getLogger(__name__)


def find_reviewed(
    trace: Trace,
    config: FilterConfig,
    measure: Measure,
    ids: pa.StringArray,
    values: np.ndarray,
    nats_per_unit: float | None,
) -> FilterResult:
    """Remove the rows found to be unsafe, and keep those found to be safe, or weight all rows. See [`FilterConfig`]."""
    queue = ReviewQueue(trace, config.reviewed)
    if not queue.verdicts:
        raise DecisionError(
            f"There are no verdicts in {config.reviewed}. Review rows first, with `forgetfilter review` or `ReviewQueue`."
        )
    _warn_of_contradictions(queue)
    if config.weights:
        no_threshold = FilterConfig(measure, math.inf)
        result = filter_by_values(ids, values, no_threshold, {}, nats_per_unit, trace.manifest["fingerprint"])
        return _with_weights(result, queue)
    trace_ids = trace.rows.ids
    verdicts: dict[str, Override] = {
        trace_ids[row].as_py(): "remove" if label == "unsafe" else "keep" for row, label in queue.labels.items()
    }
    overrides = with_identical_rows(verdicts, ids, worst="remove")
    seen = {verdict.id for verdict in queue.verdicts if verdict.identical_to is None}
    reviewed = [override for id_, override in overrides.items() if id_ in seen]
    unsafe = list(overrides.values()).count("remove")
    if unsafe == len(ids) - ids.null_count:
        raise DecisionError(
            f"The review in {config.reviewed} found all {counted(unsafe, 'row')} to be unsafe, so no row would be left to "
            "finetune on. Correct the verdicts on safe rows with `forgetfilter review` or `ReviewQueue.add`, or finetune on "
            "other data."
        )
    if config.threshold not in ("auto", "fdr") or config.fraction is not None:
        on_values = replace(config, measure=measure, step=None, reviewed=None)
        return filter_by_values(ids, values, on_values, overrides, nats_per_unit, trace.manifest["fingerprint"])
    no_threshold = FilterConfig(measure, math.inf)
    result = filter_by_values(ids, values, no_threshold, overrides, nats_per_unit, trace.manifest["fingerprint"])
    reason = f"{counted(len(reviewed), 'row')} reviewed, {reviewed.count('remove'):,} found to be unsafe and removed"
    if len(overrides) > len(reviewed):
        reason += f"; {counted(len(overrides) - len(reviewed), 'identical row')} treated like them"
    if config.threshold == "auto":
        return replace(result, method="reviewed", reason=f"{reason}; no other row was removed")
    found = removable_rows(queue, config.level)
    is_found = pc.take(pa.array(found.removed), places_in(ids, trace_ids))
    removed = result.removed | pc.fill_null(is_found, False).to_numpy(False)
    count = int(removed.sum() - result.removed.sum())
    if count:
        reason += (
            f"; also {counted(count, 'row')} without a verdict, with a false discovery rate of at most {config.level:g}"
        )
    elif found.more_needed == 0:
        reason += "; no other row was removed"
    else:
        reason += (
            f"; no other row was removed: with about {counted(found.unsafe_left, 'unsafe row')} left (estimated from the "
            f"rows drawn at random), a false discovery rate of at most {config.level:g} needs "
        )
        if found.more_needed is None:
            reason += "more rows than the set has; review rows in the order of the ranking, or allow a higher rate"
        else:
            reason += (
                f"at least {counted(found.more_needed, 'more safe verdict')} on rows drawn at random (so far: "
                f"{found.safe_drawn:,}), and more if the ranking is poor; `forgetfilter review --random-fraction 1` shows "
                "such rows only"
            )
    return replace(result, removed=removed, method="fdr", reason=reason)


def _warn_of_contradictions(queue: ReviewQueue) -> None:
    """Warn if identical rows have different verdicts."""
    ids, labels, first = queue.trace.rows.ids, queue.labels, dict[str, int]()
    for row, label in labels.items():
        other = first.setdefault(content_hash(ids[row].as_py()), row)
        if labels[other] != label:
            logger.warning(
                f"Rows {other} and {row} are identical, but the verdict on one is {labels[other]!r} and on the other "
                f"{label!r}. Each is filtered by its own verdict. Change one of them with `ReviewQueue.add`."
            )
            return


def _with_weights(result: FilterResult, queue: ReviewQueue) -> FilterResult:
    """Add the weights of the rows to a result that removes nothing. Rows that are not in the trace have the weight 1."""
    places = places_in(result.ids, queue.trace.rows.ids)
    known = pc.take(pa.array(1 - unsafe_probabilities(queue)), places)
    weights = pc.fill_null(known, 1.0).to_numpy(zero_copy_only=False)
    reason = (
        f"{counted(queue.estimate().seen, 'row')} reviewed; each row has the weight 1 − its probability of being unsafe "
        f"(mean weight {weights.mean():.3f}, {int((weights < 0.5).sum()):,} below 0.5)"
    )
    return replace(result, weights=weights, method="weights", reason=reason)
