"""[`FilterMixin`]: the filtering that all filtered trainers share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..callbacks.tracker import ForgetTracker
from ..data.decode import decode
from ..data.tokenizers import unwrap_tokenizer
from ..errors import DataError
from ..filtering.config import FilterConfig
from ..filtering.filter_by_values import filter_by_values
from ..filtering.find_forgotten import align_values, find_forgotten
from ..filtering.result import FilterResult
from ..trace.as_trace import TraceOrFolder, as_trace
from ..trace.trace import Trace
from ..utils.counted import counted
from ..utils.distributed import run_on_main
from .row_weights import RowWeightsMixin, WeighingCollator


logger = get_logger(__name__)

# `Trainer.push_to_hub` skips names that begin with "_". The removed rows must not be published.
RESULT_FOLDER = "_forgetfilter-result"

PlainValues = tuple[Sequence[str], Sequence[float]] | np.ndarray
Forgetting = ForgetTracker | TraceOrFolder | PlainValues


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
        forgetting: Trace | PlainValues,
        filter_config: FilterConfig,
        max_length: int | None,
        keep_end: bool = False,
    ) -> Any:
        """Return the kept rows of `dataset`, whose sample ids are `ids`. Rows with a null id are kept.

        `max_length` and `keep_end` say how rows were truncated for their ids.
        """

        def decide() -> FilterResult:
            if isinstance(forgetting, Trace):
                return find_forgotten(forgetting, filter_config, ids)
            return filter_by_values(ids, _values_of(ids, forgetting), filter_config)

        self.filter_result = result = run_on_main(decide)
        self.removed_dataset = _select(dataset, np.flatnonzero(result.removed))
        if result.weights is not None:
            self._weighing = partial(
                WeighingCollator, ids=ids, weights=result.weights, max_length=max_length, keep_end=keep_end
            )
        has_effect = result.removed.any() or result.weights is not None
        is_doubtful = result.method == "auto" and result.separability.is_doubtful
        log = logger.info if has_effect and not is_doubtful else logger.warning
        log(f"{type(self).__name__}: {result.summary()}")
        return _select(dataset, np.flatnonzero(~result.removed))

    def _save_result(self, args: TrainingArguments) -> None:
        assert self.filter_result is not None
        if args.should_save:
            removed = self.removed_dataset if isinstance(self.removed_dataset, Dataset) else None
            texts = None if removed is None else _texts(removed, unwrap_tokenizer(self.processing_class))
            self.filter_result.save(Path(cast(str, args.output_dir)) / RESULT_FOLDER, removed, texts)


def truncation_of(trace: Trace | None) -> tuple[int | None, bool]:
    """How the rows of a trace were truncated for their ids: `max_length` and `keep_end` of [`encode_rows`]."""
    if trace is None:
        return None, False
    return trace.manifest["max_length"], trace.manifest["encoding"].get("keep_end", False)


def trace_or_values(forgetting: Forgetting) -> Trace | PlainValues:
    """The trace of a tracker or of a folder, or the plain values. A folder is opened once, because that reads all rows.

    Raises:
        TypeError: if `forgetting` is something else.
    """
    if isinstance(forgetting, ForgetTracker):
        return forgetting.trace
    if isinstance(forgetting, Trace | str | os.PathLike):
        return as_trace(forgetting)
    _plain_values(forgetting)
    return forgetting


@contextmanager
def explain_filter_settings(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Say where a setting of the filter belongs if a trainer refuses it as an unknown argument.

    Raises:
        TypeError: the error of the trainer, with this advice.
    """
    try:
        yield
    except TypeError as error:
        for name in arguments.keys() & {field.name for field in fields(FilterConfig)}:
            if f"unexpected keyword argument '{name}'" in str(error):
                raise TypeError(
                    f"{error}. It is a setting of the filter: pass "
                    f"`filter_config=FilterConfig({name}={arguments[name]!r})`."
                ) from error
        raise


def check_nothing_to_filter(filter_config: FilterConfig | None) -> None:
    """Without `forgetting`: raise if a filter was configured, otherwise warn that nothing is filtered."""
    if filter_config is not None:
        raise ValueError(
            "`filter_config` was given without `forgetting`. Pass the tracker, the trace folder or values as `forgetting`."
        )
    logger.warning("`forgetting` was not given, so no sample is removed.")


def _plain_values(forgetting: Any) -> tuple[pa.StringArray | None, np.ndarray]:
    """The ids, if there are any, and the values of `(ids, values)` or of an array.

    Raises:
        TypeError: if `forgetting` is something else.
    """
    ids, values = None, forgetting
    try:
        if isinstance(forgetting, tuple):
            given_ids, values = forgetting
            ids = pa.array(given_ids, pa.string())
        values = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, pa.ArrowException):
        values = None
    if values is None or values.ndim != 1:
        raise TypeError(
            "`forgetting` must be a ForgetTracker, a Trace or its folder, a tuple (ids, values), or an array of one number "
            f"per row, but it is {_described(forgetting)}."
        )
    return ids, values


def _described(forgetting: Any) -> str:
    """The type of a value, and its shape or length."""
    if isinstance(forgetting, np.ndarray):
        return f"an array of the shape {forgetting.shape}"
    kind = type(forgetting).__name__
    return f"{kind} of length {len(forgetting)}" if isinstance(forgetting, Sized) else kind


def _values_of(ids: pa.StringArray, forgetting: Any) -> np.ndarray:
    """Plain values, `(ids, values)` or an array, for the samples `ids`: shape `(samples,)`, NaN where unknown."""
    known_ids, values = _plain_values(forgetting)
    if known_ids is not None:
        if len(known_ids) != len(values):
            raise ValueError(
                f"forgetting=(ids, values) has {len(known_ids):,} ids, but {counted(len(values), 'value')}."
            )
        return align_values(ids, known_ids, values)
    if len(values) != len(ids):
        raise DataError(
            f"`forgetting` has {counted(len(values), 'value')}, but the training set has {counted(len(ids), 'row')}. An "
            "array must match the rows in their order. Otherwise pass (ids, values)."
        )
    return np.where(pc.is_valid(ids), values, np.nan)


def _select(dataset: Any, indices: np.ndarray) -> Any:
    """The rows of a dataset at `indices`."""
    return dataset.select(indices) if isinstance(dataset, Dataset) else Subset(dataset, indices.tolist())


def _texts(rows: Dataset, tokenizer: PreTrainedTokenizerBase | None) -> list[str] | None:
    """The texts of tokenized rows, so that a person can read what was removed. `None` if they have texts, or no tokens."""
    if tokenizer is None or "input_ids" not in rows.column_names or "text" in rows.column_names:
        return None
    return [decode(tokenizer, tokens) for tokens in rows["input_ids"]]
