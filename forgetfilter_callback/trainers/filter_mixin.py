"""[`FilterMixin`]: the filtering that all filtered trainers share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset
from torch.utils.data import Subset
from transformers import TrainingArguments

from ..callbacks.tracker import ForgetTracker
from ..filtering.config import FilterConfig
from ..filtering.filter_by_values import filter_by_values
from ..filtering.find_forgotten import align_values, find_forgotten
from ..filtering.result import FilterResult
from ..trace.trace import Trace
from ..utils.counted import counted
from ..utils.distributed import run_on_main
from .row_weights import RowWeightsMixin, WeighingCollator


logger = get_logger(__name__)

# `Trainer.push_to_hub` skips names that begin with "_". The removed rows must not be published.
RESULT_FOLDER = "_forgetfilter-result"

Forgetting = ForgetTracker | str | os.PathLike[str] | tuple[Sequence[str], Sequence[float]] | np.ndarray


class FilterMixin(RowWeightsMixin):
    """Filters a dataset by sample id. Subclasses know how their trainer prepares rows.

    Attributes:
        removed_dataset (*optional*):
            The removed rows, unchanged. `None` if nothing was filtered.
        filter_result ([`FilterResult`], *optional*):
            What was removed and why. `None` if nothing was filtered.
    """

    removed_dataset: Any = None
    filter_result: FilterResult | None = None

    def _filter(
        self,
        dataset: Any,
        ids: pa.StringArray,
        forgetting: Forgetting,
        filter_config: FilterConfig | None,
        max_length: int | None,
        keep_end: bool = False,
    ) -> Any:
        """Return the kept rows of `dataset`, whose sample ids are `ids`. Rows with a null id are kept.

        `max_length` and `keep_end` say how rows were truncated for their ids.
        """

        def decide() -> FilterResult:
            trace = get_trace(forgetting)
            if trace is not None:
                return find_forgotten(trace, filter_config, ids)
            config = filter_config if filter_config is not None else FilterConfig()
            return filter_by_values(ids, _values_of(ids, forgetting), config)

        self.filter_result = result = run_on_main(decide)
        self.removed_dataset = _select(dataset, np.flatnonzero(result.removed))
        if result.weights is not None:
            self._weighing = partial(
                WeighingCollator, ids=ids, weights=result.weights, max_length=max_length, keep_end=keep_end
            )
        has_effect = result.removed.any() or result.weights is not None
        log = logger.info if has_effect else logger.warning
        log(f"{type(self).__name__}: {result.summary()}")
        return _select(dataset, np.flatnonzero(~result.removed))

    def _save_result(self, args: TrainingArguments) -> None:
        assert self.filter_result is not None
        if args.should_save:
            removed = self.removed_dataset if isinstance(self.removed_dataset, Dataset) else None
            self.filter_result.save(Path(cast(str, args.output_dir)) / RESULT_FOLDER, removed)


def get_trace(forgetting: Forgetting) -> Trace | None:
    """The trace of a tracker or of a folder; `None` for plain values."""
    if isinstance(forgetting, ForgetTracker):
        return forgetting.trace
    return Trace.open(forgetting) if isinstance(forgetting, str | os.PathLike) else None


def check_nothing_to_filter(filter_config: FilterConfig | None) -> None:
    """Without `forgetting`: raise if a filter was configured, otherwise warn that nothing is filtered."""
    if filter_config is not None:
        raise ValueError(
            "`filter_config` was given without `forgetting`. Pass the tracker, the trace folder or values as `forgetting`."
        )
    logger.warning("`forgetting` was not given, so no sample is removed.")


def _values_of(ids: pa.StringArray, forgetting: Any) -> np.ndarray:
    """Plain values, `(ids, values)` or an array, for the samples `ids`: shape `(samples,)`, NaN where unknown."""
    if isinstance(forgetting, tuple):
        known_ids, known_values = pa.array(forgetting[0], pa.string()), np.asarray(forgetting[1], dtype=np.float64)
        if len(known_ids) != len(known_values):
            raise ValueError(
                f"forgetting=(ids, values) has {len(known_ids):,} ids, but {counted(len(known_values), 'value')}."
            )
        return align_values(ids, known_ids, known_values)
    values = np.asarray(forgetting, dtype=np.float64)
    if len(values) != len(ids):
        raise ValueError(
            f"`forgetting` has {counted(len(values), 'value')}, but the training set has {counted(len(ids), 'row')}. An "
            "array must match the rows in their order. Otherwise pass (ids, values)."
        )
    return np.where(pc.is_valid(ids), values, np.nan)


def _select(dataset: Any, indices: np.ndarray) -> Any:
    """The rows of a dataset at `indices`."""
    return dataset.select(indices) if isinstance(dataset, Dataset) else Subset(dataset, indices.tolist())
