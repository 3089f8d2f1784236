"""[`FilteredSFTTrainer`]: the same for TRL's SFTTrainer, which tokenises, cuts, shuffles and packs its rows itself."""

from __future__ import annotations

import copy
import os
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ..data.text_rows import encode_rows
from ..errors import EncodingError
from ..measures.names import Measure
from ..thresholds import Threshold
from .base_model_check import BaseModelCheck
from .filter_mixin import FilterMixin, Forgetting, trace_of, warn_nothing_filtered


# The place of a row as given, carried along while the trainer prepares it.
_PLACE = "forgetfilter_place"


class FilteredSFTTrainer(FilterMixin, SFTTrainer):
    """A [`~trl.SFTTrainer`] that removes the most forgotten rows of `train_dataset` before it prepares and packs the rest.

    Without `forgetting` it is exactly an `SFTTrainer`. Rows that SFTTrainer itself drops (nothing of them counts) have no
    forgetting value and stay with the kept ones; `filter_result` is of all rows as given.

    Args:
        forgetting, measure, threshold, share, decision:
            As in [`FilteredTrainer`].

    Attributes:
        removed_dataset, filter_result:
            As in [`FilteredTrainer`].

    Raises:
        ValueError: as [`FilteredTrainer`].
        EncodingError: for an `IterableDataset`, whose rows cannot be told apart, and where preparation is skipped
            (`skip_prepare_dataset`).
    """

    def __init__(
        self,
        *args: Any,
        forgetting: Forgetting | None = None,
        measure: Measure | None = None,
        threshold: Threshold = "auto",
        fraction: float | None = None,
        decision: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ):
        self._filter_arguments = (forgetting, measure, threshold, fraction, decision)
        super().__init__(*args, **kwargs)
        if forgetting is None:
            warn_nothing_filtered(measure, threshold, fraction, decision)
        else:
            if self.filter_result is None:
                raise EncodingError(
                    "FilteredSFTTrainer filters while it prepares rows, which `skip_prepare_dataset` leaves out. Use "
                    "`filtered(SFTTrainer)` on rows that are prepared already."
                )
            self._save_decision(self.args)
            self.add_callback(BaseModelCheck(trace_of(forgetting)))

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        forgetting, measure, threshold, fraction, decision = self._filter_arguments
        # The training set comes first; an evaluation set may have that name too.
        if forgetting is not None and dataset_name == "train" and self.filter_result is None:
            if not isinstance(dataset, Dataset):
                raise EncodingError("FilteredSFTTrainer needs a map-style `Dataset`: rows of a stream have no ids.")
            in_order = copy.copy(args)
            in_order.shuffle_dataset = False
            prepared = super()._prepare_dataset(
                dataset.add_column(_PLACE, np.arange(len(dataset))),
                processing_class,
                in_order,
                False,
                formatting_func,
                dataset_name,
            )
            trace = trace_of(forgetting)
            rows = encode_rows(
                prepared.select_columns(["input_ids", "labels"]),
                max_length=trace.manifest["max_length"] if trace is not None else None,
                disable_tqdm=args.disable_tqdm,
                keep_end=args.truncation_mode == "keep_end",
            )
            prepared_as = np.full(len(dataset), -1)
            prepared_as[prepared[_PLACE]] = np.arange(len(prepared))
            ids = rows.ids.take(pa.array(prepared_as, mask=prepared_as < 0))
            dataset = self._filter(dataset, ids, forgetting, measure, threshold, fraction, decision)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
