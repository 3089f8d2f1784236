"""Forgetting values → a decision with its account: what is removed, at which φ, and how φ was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import DecisionError
from ..measures.names import DEFAULT_MEASURE, MEASURES, Measure
from ..thresholds import Threshold, find_threshold
from ..trace.trace import Trace
from ..utils.versions import library_versions
from .result import FilterResult, ThresholdMethod
from .review_decision import Override


# Rows without a forgetting value are kept; more than this share of them means that the rows are not those of the trace.
MAX_UNKNOWN_FRACTION = 0.01


def find_forgotten(
    trace: Trace,
    measure: Measure = DEFAULT_MEASURE,
    threshold: Threshold = "auto",
    fraction: float | None = None,
    step: int | None = None,
    ids: pa.StringArray | None = None,
    overrides: Mapping[str, Override] | None = None,
) -> FilterResult:
    """Decides which samples of a trace to remove.

    Args:
        trace ([`Trace`]):
            With records of S1+.
        measure, threshold, share, by_hand:
            As in [`filter_by_values`].
        step (`int`, *optional*):
            Which record of S1+ to measure forgetting at; the last one by default.
        ids (`pa.StringArray`, *optional*):
            Decides on the samples with these ids, in this order, instead of on all of the trace in its own.

    Raises:
        TraceError: if the trace has not the records that `measure` needs.
        ValueError: as [`filter_by_values`], and if more than 1 % of `ids` are not in the trace.
    """
    values = trace.forgetting(measure, step)
    nats_per_unit = trace.nats_per_unit(values, step)
    if ids is not None:
        values = align_values(ids, trace.rows.ids, values)
    fingerprint = trace.manifest["fingerprint"]
    result = filter_by_values(
        ids if ids is not None else trace.rows.ids,
        values,
        measure,
        threshold,
        fraction,
        fingerprint,
        overrides,
        nats_per_unit,
    )
    return replace(result, step=trace.first_and_last(step)[1].step)


def align_values(ids: pa.StringArray, known: pa.StringArray, values: np.ndarray) -> np.ndarray:
    """The values, of samples with ids `known`, for other samples: NaN where there is none.

    Raises:
        ValueError: if more than 1 % of `ids` have none, those not counted that are null.
    """
    places = pc.index_in(ids, value_set=known, skip_nulls=True)
    asked = len(ids) - ids.null_count
    unknown = places.null_count - ids.null_count
    if unknown > MAX_UNKNOWN_FRACTION * asked:
        raise ValueError(
            f"{unknown} of the {asked} rows have no forgetting value, more than {MAX_UNKNOWN_FRACTION:.0%}: they are not the "
            "rows that were tracked. The usual causes are another max_length, chat template, tokenizer or collator than "
            "in the tracked sessions. Prepare the rows the same way."
        )
    return pc.take(pa.array(values), places).to_numpy(zero_copy_only=False)


def filter_by_values(
    ids: pa.StringArray,
    values: np.ndarray,
    measure: Measure,
    threshold: Threshold = "auto",
    fraction: float | None = None,
    fingerprint: str | None = None,
    overrides: Mapping[str, Override] | None = None,
    nats_per_unit: float | None = None,
) -> FilterResult:
    """Decides which samples to remove, from their forgetting values. Of a trace, [`find_forgotten`] has all that it takes.

    Args:
        ids (`pa.StringArray` of length `samples`):
            Sample ids, as a trace's `rows.ids`.
        values (`np.ndarray` of shape `(samples,)`):
            Forgetting; higher is more forgotten; not finite where unknown (kept).
        measure (`str`):
            Which forgetting, for the account.
        threshold (`"auto"` or `float`, defaults to `"auto"`):
            φ, or [`separability.separate`] finds it, or finds that there is nothing to remove. `math.inf` removes nothing
            but by hand.
        fraction (`float`, *optional*):
            Between 0 and 1: removes this share of the samples, the most forgotten, instead. Samples with the same value are
            removed or kept together, whichever comes nearer to the share.
        fingerprint (`str`, *optional*):
            Of the trace, for the account.
        overrides (`Mapping[str, str]`, *optional*):
            Ids with `"keep"` or `"remove"`, whatever φ says.
        nats_per_unit (`float`, *optional*):
            The trace's [`~Trace.nats_per_change`] of these values. Only `smoothed` asks for it, to tell clean sets.

    Raises:
        ValueError: if everything would be removed, if no value is finite, if there is not one value an id, or if `measure`,
            `threshold` or `fraction` cannot be.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r} is none of {', '.join(MEASURES)}.")
    if np.shape(values) != (len(ids),):
        raise ValueError(f"There are {len(ids)} ids and values of shape {np.shape(values)}. Give one value a sample.")
    values = np.where(np.isfinite(values), np.asarray(values, dtype=np.float64), np.nan)
    known = ~np.isnan(values)
    if not known.any():
        raise ValueError(f"None of the {len(values)} samples has a finite forgetting value. Did the model diverge?")
    separability = find_threshold(values[known], measure, nats_per_unit)
    phi: float | None
    if fraction is not None:
        if threshold != "auto":
            raise ValueError("Give `threshold` or `fraction`, not both.")
        if not 0 < fraction < 1:
            raise ValueError(f"share={fraction} must lie between 0 and 1.")
        # Ties stay together, so that the same φ given by hand decides the same.
        levels, counts = np.unique(values[known], return_counts=True)
        above = counts.sum() - counts.cumsum()  # as many are removed with φ at each level
        nearest = np.abs(above - fraction * len(values)).argmin()
        phi = float(levels[nearest])
        removed = known & (values > phi)
        method: ThresholdMethod = "fraction"
        if abs(above[nearest] - fraction * len(values)) < 1:
            how = ", as asked"
        else:
            how = f" ({fraction:.1%} asked; samples of the same value stay together, those without one are kept)"
        reason = f"the most forgotten {above[nearest] / len(values):.1%}{how}"
    elif threshold == "auto":
        phi = separability.threshold if separability.separable else None
        method = "auto"
        reason = separability.reason
        removed = known & (values > phi) if phi is not None else np.zeros(len(values), dtype=bool)
    else:
        given = float(threshold)
        if np.isnan(given):
            raise ValueError("threshold must be a number or 'auto', not NaN.")
        method = "fixed"
        removed = known & (values > given)
        phi = given if np.isfinite(given) else None
        reason = f"φ as given; values lie between {np.nanmin(values):.3g} and {np.nanmax(values):.3g}"
    if overrides:
        removed = _overruled(ids, removed, overrides)
        reason += f"; {len(overrides)} by hand"
    if len(removed) and removed.all():
        raise ValueError(
            f"This removes all {len(values)} samples (their forgetting lies between {np.nanmin(values):.3g} and "
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


def _overruled(ids: pa.StringArray, removed: np.ndarray, overrides: Mapping[str, Override]) -> np.ndarray:
    decided = pa.array(list(overrides), pa.string())
    unknown = decided.filter(pc.invert(pc.is_in(decided, value_set=ids)))
    if len(unknown):
        raise DecisionError(
            f"{len(unknown)} of the samples decided by hand are not in this set, for example {unknown[0]}. Decide on "
            "the trace of this very set."
        )
    overruled = removed.copy()
    places = pc.index_in(ids, value_set=decided, skip_nulls=True)
    verdicts = np.array([verdict == "remove" for verdict in overrides.values()])
    overruled[places.is_valid()] = verdicts[places.drop_null()]
    return overruled
