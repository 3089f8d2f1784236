"""[`FilteredSFTTrainer`]: a TRL `SFTTrainer` that removes the most forgotten samples."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset
from torch import nn

from ..callbacks.session_rows import hide_progress
from ..data.as_rows import as_rows
from ..data.encode_text import encode_rows
from ..errors import EncodingError, UnknownRowsError
from ..filtering.config import FilterConfig, filter_config_or_default
from ..scoring.model_capabilities import check_is_causal
from ..trace.trace import Trace
from ..utils.optional_packages import requires_extra
from .base_model_check import BaseModelCheck
from .filter_mixin import (
    FilterMixin,
    Forgetting,
    check_nothing_to_filter,
    explain_filter_settings,
    trace_or_values,
    truncation_of,
)


with requires_extra("trl", "FilteredSFTTrainer"):
    from trl import SFTConfig, SFTTrainer

# A column with the index of each row, which keeps track of the rows while SFTTrainer prepares them.
_INDEX_COLUMN = "forgetfilter_index"


class FilteredSFTTrainer(FilterMixin, SFTTrainer):
    """A [`~trl.SFTTrainer`] that removes the most forgotten rows of `train_dataset` before it prepares and packs the rest.

    Without `forgetting` it behaves exactly like an `SFTTrainer`. Rows that SFTTrainer drops itself (rows without loss
    tokens) have no forgetting value and count as kept. `filter_result` covers all rows of the given dataset.

    Args:
        forgetting, filter_config:
            As in [`FilteredTrainer`].

    All other arguments are those of `SFTTrainer`.

    Attributes:
        removed_dataset, filter_result:
            As in [`FilteredTrainer`].

    Raises:
        TypeError, ValueError, ForgetFilterError: as in [`FilteredTrainer`].
        ValueError: also with weights, if rows are packed or batches are padding-free.
        EncodingError: for an `IterableDataset`, whose rows have no ids, and with `skip_prepare_dataset`.
    """

    def __init__(
        self,
        *args: Any,
        forgetting: Forgetting | None = None,
        filter_config: FilterConfig | None = None,
        **kwargs: Any,
    ):
        self._forgetting = None if forgetting is None else trace_or_values(forgetting)
        self._trace = self._forgetting if isinstance(self._forgetting, Trace) else None
        self._filter_config = filter_config_or_default(filter_config)
        self._has_own_collator = any(each is not None for each in (*args[2:3], kwargs.get("data_collator")))
        if forgetting is not None and "train_dataset" in kwargs:
            kwargs["train_dataset"] = as_rows(kwargs["train_dataset"], "`train_dataset`")
        with explain_filter_settings(kwargs):
            super().__init__(*args, **kwargs)
        if forgetting is None:
            check_nothing_to_filter(filter_config)
            return
        check_is_causal(cast(nn.Module, self.model))
        if self.filter_result is None:
            raise EncodingError(
                "FilteredSFTTrainer filters while SFTTrainer prepares the dataset, but `skip_prepare_dataset` skips that. "
                "Use `filtered(SFTTrainer)` for datasets that are already prepared."
            )
        if self._filter_config.weights:
            self.check_weights_are_possible()
        self._save_result(self.args)
        self.add_callback(BaseModelCheck(self._trace))

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        # SFTTrainer prepares the training set first. An evaluation set may be called "train" too.
        if self._forgetting is not None and dataset_name == "train" and self.filter_result is None:
            if not isinstance(dataset, Dataset):
                raise EncodingError("FilteredSFTTrainer needs a map-style `Dataset`: rows of a stream have no ids.")
            if _INDEX_COLUMN in dataset.column_names:
                raise EncodingError(f"FilteredSFTTrainer needs the column name `{_INDEX_COLUMN}`. Rename that column.")
            if (packing or args.padding_free) and self._filter_config.weights:
                raise ValueError(
                    "`weights` needs one sequence per row, but packing and padding-free batches join rows. Disable "
                    "`packing` and `padding_free`, or remove rows instead."
                )
            unshuffled_args = copy.copy(args)
            unshuffled_args.shuffle_dataset = False
            prepared = super()._prepare_dataset(
                dataset.add_column(_INDEX_COLUMN, np.arange(len(dataset))),
                processing_class,
                unshuffled_args,
                False,
                _without_index(formatting_func),
                dataset_name,
            )
            max_length, keep_end = truncation_of(self._trace)
            prepared_ids = encode_rows(
                prepared.select_columns(["input_ids", "labels"]),
                max_length=max_length,
                disable_tqdm=hide_progress(args),
                keep_end=keep_end,
            ).ids
            prepared_index = np.full(len(dataset), -1)
            prepared_index[prepared[_INDEX_COLUMN]] = np.arange(len(prepared))
            ids = prepared_ids.take(pa.array(prepared_index, mask=prepared_index < 0))
            with self._explain_collator():
                dataset = self._filter(dataset, ids, self._forgetting, self._filter_config, max_length, keep_end)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    @contextmanager
    def _explain_collator(self) -> Iterator[None]:
        """Say what to do if rows are unknown because the user's collator changes them."""
        try:
            yield
        except UnknownRowsError as error:
            if not self._has_own_collator:
                raise
            raise UnknownRowsError(
                f"{error} FilteredSFTTrainer filters the rows before your `data_collator` changes them: use "
                "`filtered(SFTTrainer)` instead."
            ) from error


def _without_index(formatting_func: Any) -> Any:
    """Return a formatting function that gets the rows as the user passed them."""
    if formatting_func is None:
        return None
    return lambda row: formatting_func({name: value for name, value in row.items() if name != _INDEX_COLUMN})
