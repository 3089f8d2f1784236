"""[`find_forgotten`]: decide which samples of a trace to remove."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.identical_rows import content_numbers, places_in, with_identical_rows
from ..errors import UnknownRowsError
from ..measures.names import DEFAULT_MEASURE
from ..review.estimates import estimate_filter_errors
from ..review.verdicts import known_labels, trace_verdicts
from ..trace.as_trace import TraceOrFolder, as_trace
from ..trace.forgetting import compute_forgetting
from ..trace.trace import Trace
from ..utils.counted import counted_of
from .config import FilterConfig, filter_config_or_default
from .filter_by_values import filter_by_values
from .result import FilterResult
from .review_decision import Override, ReviewDecision


# Rows without a forgetting value are kept. If more than this fraction has none, the rows are not those of the trace.
MAX_UNKNOWN_FRACTION = 0.01


def find_forgotten(
    trace: TraceOrFolder, filter_config: FilterConfig | None = None, ids: pa.StringArray | None = None
) -> FilterResult:
    """Decide which samples of a trace to remove, without training.

    Args:
        trace ([`Trace`], or the folder of one):
            A trace with records of the safety session.
        filter_config ([`FilterConfig`], *optional*):
            Which samples are removed. Defaults to `FilterConfig()`.
        ids (`pa.StringArray`, *optional*):
            Decide on the samples with these ids, in this order. Defaults to all samples of the trace.

    Returns:
        [`FilterResult`]

    Raises:
        TraceError: if the trace does not hold the records that the measure needs.
        DecisionError: if the reviewer's decision or the verdicts belong to another trace, if there are no verdicts, or if
            all samples would be removed.
        TypeError: if `trace` or `filter_config` is something else.
        DataError: if more than 1 % of `ids` are not in the trace, or if no sample has a finite value.
    """
    trace, config = as_trace(trace), filter_config_or_default(filter_config)
    config, overrides = with_decision(trace, config)
    forgetting = compute_forgetting(trace, config.measure or DEFAULT_MEASURE, config.step)
    return decide(trace, config, overrides, *forgetting, ids)


def with_decision(trace: Trace, config: FilterConfig) -> tuple[FilterConfig, Mapping[str, Override]]:
    """Read the reviewer's decision, if one is given.

    Returns:
        `tuple`: a config without a decision, and the samples that the reviewer overrides.

    Raises:
        DecisionError: if the decision belongs to another trace.
    """
    if config.decision is None:
        return config, {}
    decision = ReviewDecision.load(config.decision)
    decision.check(trace)
    threshold = decision.threshold if decision.threshold is not None else math.inf
    return FilterConfig(decision.measure, threshold), decision.overrides


def decide(
    trace: Trace,
    config: FilterConfig,
    overrides: Mapping[str, Override],
    values: np.ndarray,
    nats_per_unit: float | None,
    ids: pa.StringArray | None = None,
) -> FilterResult:
    """Decide which samples to remove, given the values of all samples of the trace.

    Args:
        trace ([`Trace`]):
            The trace of the values.
        config ([`FilterConfig`]), overrides (`Mapping`):
            What [`with_decision`] returns.
        values (`np.ndarray` of shape `(samples,)`, float64):
            [`Trace.forgetting`] with the measure and step of `config`.
        nats_per_unit (`float` or `None`):
            The nats per typical change with the measure and step of `config`.
        ids (`pa.StringArray`, *optional*):
            As in [`find_forgotten`].

    Returns:
        [`FilterResult`]
    """
    measure = config.measure or DEFAULT_MEASURE
    if ids is None:
        ids = trace.rows.ids
    else:
        values = align_values(ids, trace.rows.ids, values)
    if config.reviewed is not None:
        from .find_reviewed import find_reviewed  # imports scikit-learn, which takes more than a second

        result = find_reviewed(trace, config, measure, ids, values, nats_per_unit)
    else:
        overrides = {**overrides, **with_identical_rows(overrides, ids, worst="remove")}
        on_values = replace(config, measure=measure, step=None)
        result = filter_by_values(ids, values, on_values, overrides, nats_per_unit, trace.manifest["fingerprint"])
    result = replace(result, step=trace.first_and_last(config.step)[1].step, identity=trace.identity(measure))
    return with_estimate(result, trace, config.reviewed)


def with_estimate(result: FilterResult, trace: Trace, reviewed: str | os.PathLike[str] | None = None) -> FilterResult:
    """Estimate the errors of a filter by the verdicts in the folder `reviewed` (see [`review_folder`]).

    Raises:
        DecisionError: if the verdicts in `reviewed` cannot be read.
    """
    verdicts = trace_verdicts(trace, reviewed)
    if not verdicts or result.weights is not None:
        return replace(result, estimate=None)
    known = known_labels(verdicts, content_numbers(trace.rows.ids))
    places = pc.index_in(trace.rows.ids, value_set=result.ids)
    is_filtered, places = places.is_valid().to_numpy(zero_copy_only=False), places.drop_null().to_numpy()
    removed, is_above = np.zeros((2, len(trace.rows)), dtype=bool)
    removed[is_filtered] = result.removed[places]
    parts = [is_filtered]
    if result.threshold is not None:  # the values do not depend on the verdicts
        is_above[is_filtered] = result.values[places] > result.threshold
        parts = [is_filtered & ~is_above, is_filtered & is_above]
    return replace(result, estimate=estimate_filter_errors(verdicts, known, removed, parts))


def align_values(ids: pa.StringArray, known_ids: pa.StringArray, known_values: np.ndarray) -> np.ndarray:
    """Look up values by sample id. A further copy of a known sample has its value.

    Args:
        ids (`pa.StringArray` of length `samples`):
            The samples to look up. Null ids have no value.
        known_ids (`pa.StringArray` of length `known_samples`):
            Samples whose values are known.
        known_values (`np.ndarray` of shape `(known_samples,)`):
            Their values.

    Returns:
        `np.ndarray` of shape `(samples,)`: NaN for samples that are unknown.

    Raises:
        UnknownRowsError: if more than 1 % of the samples with an id are unknown.
    """
    indices = places_in(ids, known_ids)
    total = len(ids) - ids.null_count
    unknown = indices.null_count - ids.null_count
    if unknown > MAX_UNKNOWN_FRACTION * total:
        raise UnknownRowsError(
            f"{counted_of(unknown, total, 'row', 'have')} no forgetting value (more than {MAX_UNKNOWN_FRACTION:.0%}), so "
            "these are not the rows that were tracked. The usual causes are a different max_length, collator, tokenizer "
            "(such as another EOS token, or tokens that were added in memory) or chat template (such as one that prints "
            "today's date). Prepare the rows exactly as in the tracked sessions. In a command, pass the folder of the saved "
            "tokenizer as `--tokenizer`."
        )
    return pc.take(pa.array(known_values), indices).to_numpy(zero_copy_only=False)
