"""[`filter_by_values`]: decide which samples to remove from their forgetting values."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import DataError, DecisionError
from ..utils.arrow_arrays import to_numpy
from ..utils.counted import counted, counted_of
from ..utils.versions import library_versions
from .config import FilterConfig, filter_config_or_default
from .result import FilterResult, ThresholdMethod
from .review_decision import Override
from .thresholds import find_threshold


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
            Sample ids, as in `trace.rows.ids`. Null for rows that the trainer itself drops: a `fraction` does
            not count them.
        values (`np.ndarray` of shape `(samples,)`):
            Forgetting; higher means more forgotten. Samples whose value is not finite are kept.
        filter_config ([`FilterConfig`]):
            Which samples are removed. `measure` must be given; `step`, `decision` and `reviewed` need a trace.
        overrides (`Mapping[str, str]`, *optional*):
            Sample ids with `"keep"` or `"remove"`, regardless of the threshold.
        nats_per_unit (`float`, *optional*):
            The `nats_per_unit` of a [`FilterResult`]. `"combined"` and `"smoothed"` use it to recognize clean sets.
        fingerprint (`str`, *optional*):
            Fingerprint of the trace, stored in the result.

    Returns:
        [`FilterResult`]

    Raises:
        TypeError: if `filter_config` is something else.
        ValueError: if the measure is not given, if a setting needs a trace, or if the number of values differs from the
            number of ids.
        DataError: if no value is finite.
        DecisionError: if an override names an unknown sample, or if all samples would be removed.
    """
    filter_config = filter_config_or_default(filter_config)
    measure, threshold, fraction = filter_config.measure, filter_config.threshold, filter_config.fraction
    if filter_config.step is not None or filter_config.decision is not None or filter_config.reviewed is not None:
        raise ValueError(
            "`step`, `decision` and `reviewed` belong to a trace, but there are only values. Pass the tracker or the trace "
            "folder instead of values, or use `find_forgotten`."
        )
    if measure is None:
        raise ValueError(
            "Plain values do not say what they measure. Pass `FilterConfig(measure=...)`, or pass the tracker or the trace "
            "folder instead of values."
        )
    assert threshold != "fdr"  # it comes with `reviewed`
    if np.shape(values) != (len(ids),):
        raise ValueError(
            f"`ids` has {counted(len(ids), 'id')}, but `values` has the shape {np.shape(values)}. Pass one value per id."
        )
    trained = len(ids) - ids.null_count
    has_value = np.isfinite(values) & to_numpy(ids.is_valid())
    values = np.where(has_value, np.asarray(values, dtype=np.float64), np.nan)
    known = ~np.isnan(values)
    if not known.any():
        raise DataError(
            f"There is no finite forgetting value among {counted(len(values), 'row')}. The model may have diverged."
        )
    separability = find_threshold(values[known], measure, nats_per_unit)
    phi: float | None
    method: ThresholdMethod
    if fraction is not None:
        method = "fraction"
        phi, removed_fraction = _threshold_for_fraction(values[known], fraction * trained, trained)
        removed = known & (values > phi)
        of_trained = f" of the {counted(trained, 'row')} that are trained" if ids.null_count else ""
        reason = f"the most forgotten {removed_fraction:.1%}{of_trained}"
        if abs(removed_fraction - fraction) * trained >= 1:
            reason += f" ({fraction:.1%} requested; equal values stay together, and rows without a value are kept)"
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
        reason += f"; {len(overrides):,} overridden by a reviewer"
    if trained and removed.sum() == trained:
        decided = sum(override == "remove" for override in overrides.values()) if overrides else 0
        by_reviewer = f", {decided:,} of them by a reviewer's decision" if decided else ""
        raise DecisionError(
            f"This would remove all {counted(trained, 'row')} (their forgetting ranges from {np.nanmin(values):.3g} "
            f"to {np.nanmax(values):.3g}){by_reviewer}. Choose a larger threshold, or threshold='auto'"
            f"{', or keep more rows in the review' if decided else ''}."
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
            f"{counted_of(len(unknown), len(overrides), 'overridden row', 'are')} not in this set, for example "
            f"{unknown[0]}. Use a decision that was made on the trace of this set."
        )
    result = removed.copy()
    indices = pc.index_in(ids, value_set=overridden_ids, skip_nulls=True)
    remove = np.array([override == "remove" for override in overrides.values()])
    result[indices.is_valid()] = remove[indices.drop_null()]
    return result
