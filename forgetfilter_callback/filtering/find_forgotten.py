"""[`find_forgotten`]: decide which samples of a trace to remove."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import DecisionError
from ..measures.names import DEFAULT_MEASURE
from ..thresholds import find_threshold
from ..trace.trace import Trace
from ..utils.versions import library_versions
from .config import FilterConfig
from .result import FilterResult, ThresholdMethod
from .review_decision import Override, ReviewDecision


# Rows without a forgetting value are kept. If more than this fraction has none, the rows are not those of the trace.
MAX_UNKNOWN_FRACTION = 0.01


def find_forgotten(
    trace: Trace, filter_config: FilterConfig | None = None, ids: pa.StringArray | None = None
) -> FilterResult:
    """Decide which samples of a trace to remove, without training.

    Args:
        trace ([`Trace`]):
            A trace with records of the safety session.
        filter_config ([`FilterConfig`], *optional*):
            Which samples are removed. Defaults to `FilterConfig()`.
        ids (`pa.StringArray`, *optional*):
            Decide on the samples with these ids, in this order. Defaults to all samples of the trace.

    Returns:
        [`FilterResult`]

    Raises:
        TraceError: if the trace does not hold the records that the measure needs.
        DecisionError: if the reviewer's decision was made on another trace.
        ValueError: if more than 1 % of `ids` are not in the trace, if no sample has a finite value, or if all samples would
            be removed.
    """
    config = filter_config if filter_config is not None else FilterConfig()
    overrides: Mapping[str, Override] = {}
    if config.decision is not None:
        decision = ReviewDecision.load(config.decision)
        decision.check(trace.identity())
        threshold = decision.threshold if decision.threshold is not None else math.inf
        config, overrides = FilterConfig(decision.measure, threshold), decision.overrides
    config = replace(config, measure=config.measure or DEFAULT_MEASURE)
    assert config.measure is not None
    values = trace.forgetting(config.measure, config.step)
    nats_per_unit = trace.nats_per_unit(values, config.step)
    if ids is None:
        ids = trace.rows.ids
    else:
        values = align_values(ids, trace.rows.ids, values)
    result = filter_by_values(ids, values, config, overrides, nats_per_unit, trace.manifest["fingerprint"])
    return replace(result, step=trace.first_and_last(config.step)[1].step)


def align_values(ids: pa.StringArray, known_ids: pa.StringArray, known_values: np.ndarray) -> np.ndarray:
    """Look up values by sample id.

    Args:
        ids (`pa.StringArray` of length `samples`):
            The samples to look up. Null ids have no value.
        known_ids (`pa.StringArray` of length `known_samples`):
            Samples whose values are known.
        known_values (`np.ndarray` of shape `(known_samples,)`):
            Their values.

    Returns:
        `np.ndarray` of shape `(samples,)`: NaN for ids that are not known.

    Raises:
        ValueError: if more than 1 % of the ids that are not null are unknown.
    """
    indices = pc.index_in(ids, value_set=known_ids, skip_nulls=True)
    total = len(ids) - ids.null_count
    unknown = indices.null_count - ids.null_count
    if unknown > MAX_UNKNOWN_FRACTION * total:
        raise ValueError(
            f"{unknown} of the {total} rows have no forgetting value (more than {MAX_UNKNOWN_FRACTION:.0%}), so these are "
            "not the rows that were tracked. The usual causes are a different max_length, chat template, tokenizer or "
            "collator. Prepare the rows exactly as in the tracked sessions."
        )
    return pc.take(pa.array(known_values), indices).to_numpy(zero_copy_only=False)


def filter_by_values(
    ids: pa.StringArray,
    values: np.ndarray,
    filter_config: FilterConfig,
    overrides: Mapping[str, Override] | None = None,
    nats_per_unit: float | None = None,
    fingerprint: str | None = None,
) -> FilterResult:
    """Decide which samples to remove from their forgetting values alone. For a trace, use [`find_forgotten`].

    Args:
        ids (`pa.StringArray` of length `samples`):
            Sample ids, as in `trace.rows.ids`.
        values (`np.ndarray` of shape `(samples,)`):
            Forgetting; higher means more forgotten. Samples whose value is not finite are kept.
        filter_config ([`FilterConfig`]):
            Which samples are removed. `measure` must be given; `step` and `decision` need a trace.
        overrides (`Mapping[str, str]`, *optional*):
            Sample ids with `"keep"` or `"remove"`, regardless of the threshold.
        nats_per_unit (`float`, *optional*):
            [`Trace.nats_per_unit`] of these values. `"smoothed"` uses it to recognize clean sets.
        fingerprint (`str`, *optional*):
            Fingerprint of the trace, stored in the result.

    Returns:
        [`FilterResult`]

    Raises:
        ValueError: if the measure is not given, if the number of values differs from the number of ids, if no value is
            finite, or if all samples would be removed.
        DecisionError: if an override names an unknown sample.
    """
    measure, threshold, fraction = filter_config.measure, filter_config.threshold, filter_config.fraction
    if measure is None:
        raise ValueError(
            "Plain values do not say what they measure. Pass `FilterConfig(measure=...)`, or pass the tracker or the trace "
            "folder instead of values."
        )
    if np.shape(values) != (len(ids),):
        raise ValueError(f"There are {len(ids)} ids, but values of shape {np.shape(values)}. Pass one value per id.")
    values = np.where(np.isfinite(values), np.asarray(values, dtype=np.float64), np.nan)
    known = ~np.isnan(values)
    if not known.any():
        raise ValueError(
            f"None of the {len(values)} samples has a finite forgetting value. The model may have diverged."
        )
    separability = find_threshold(values[known], measure, nats_per_unit)
    phi: float | None
    method: ThresholdMethod
    if fraction is not None:
        method = "fraction"
        phi, removed_fraction = _threshold_for_fraction(values[known], fraction * len(values), len(values))
        removed = known & (values > phi)
        reason = f"the most forgotten {removed_fraction:.1%}"
        if abs(removed_fraction - fraction) * len(values) >= 1:
            reason += f" ({fraction:.1%} requested; equal values stay together, and samples without a value are kept)"
    elif threshold == "auto":
        method = "auto"
        phi = separability.threshold if separability.separable else None
        removed = known & (values > phi) if phi is not None else np.zeros(len(values), dtype=bool)
        reason = separability.reason
    else:
        method = "fixed"
        phi = threshold if math.isfinite(threshold) else None
        removed = known & (values > threshold)
        reason = f"fixed threshold; values range from {np.nanmin(values):.3g} to {np.nanmax(values):.3g}"
    if overrides:
        removed = _apply_overrides(ids, removed, overrides)
        reason += f"; {len(overrides)} overridden by a reviewer"
    if len(removed) and removed.all():
        raise ValueError(
            f"This would remove all {len(values)} samples (their forgetting ranges from {np.nanmin(values):.3g} to "
            f"{np.nanmax(values):.3g}). Choose a larger threshold, or threshold='auto'."
        )
    return FilterResult(
        ids=ids,
        values=values,
        removed=removed,
        measure=measure,
        threshold=phi,
        method=method,
        reason=reason,
        separability=separability,
        fingerprint=fingerprint,
        versions=library_versions(),
        overrides=dict(overrides) if overrides else {},
        nats_per_unit=nats_per_unit if nats_per_unit is not None and math.isfinite(nats_per_unit) else None,
    )


def _threshold_for_fraction(values: np.ndarray, target: float, samples: int) -> tuple[float, float]:
    """The threshold that removes the number of samples closest to `target`, and the fraction of `samples` it removes.

    Equal values stay together, so that the same threshold gives the same result when it is passed as a number.
    """
    levels, counts = np.unique(values, return_counts=True)
    removed_at = counts.sum() - counts.cumsum()  # number of samples above each level
    closest = np.abs(removed_at - target).argmin()
    return float(levels[closest]), removed_at[closest] / samples


def _apply_overrides(ids: pa.StringArray, removed: np.ndarray, overrides: Mapping[str, Override]) -> np.ndarray:
    overridden_ids = pa.array(list(overrides), pa.string())
    unknown = overridden_ids.filter(pc.invert(pc.is_in(overridden_ids, value_set=ids)))
    if len(unknown):
        raise DecisionError(
            f"{len(unknown)} of the overridden samples are not in this set, for example {unknown[0]}. Use a decision that "
            "was made on the trace of this set."
        )
    result = removed.copy()
    indices = pc.index_in(ids, value_set=overridden_ids, skip_nulls=True)
    remove = np.array([override == "remove" for override in overrides.values()])
    result[indices.is_valid()] = remove[indices.drop_null()]
    return result
