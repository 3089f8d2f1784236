"""[`FilteredTrainer`]: a `Trainer` that leaves out the most forgotten samples."""

from __future__ import annotations

import os
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer

from ..data.collated_rows import encode_collated
from ..errors import UnsupportedDatasetError
from ..measures.names import Measure
from ..thresholds import Threshold
from ..utils.model_state import preserve_state
from .base_model_check import BaseModelCheck
from .filter_mixin import FilterMixin, Forgetting, trace_of, warn_nothing_filtered


class FilteredTrainer(FilterMixin, Trainer):
    """A [`~transformers.Trainer`] that removes the most forgotten samples of `train_dataset` before it trains.

    Without `forgetting` it is exactly a `Trainer`. For a subclass of yours: `filtered(MyTrainer)`. For TRL's SFTTrainer:
    `forgetfilter_callback.sft.FilteredSFTTrainer`.

    Args:
        forgetting ([`ForgetTracker`], folder of a trace, `(ids, values)` or array, *optional*):
            How much each sample was forgotten. Samples are found by id, whatever their position. A bare array is for the
            same rows in the same order.
        measure (`"loss"`, `"relative"`, `"pooled"`, `"smoothed"` or `"rouge1"`, *optional*):
            The measure; `"smoothed"` by default where `forgetting` is a tracker or a trace. Of values it must be named.
        threshold (`"auto"` or `float`, defaults to `"auto"`):
            φ: samples with forgetting > φ are removed. `"auto"` finds it from the values, or removes nothing when they
            do not hold two populations.
        fraction (`float`, *optional*):
            Removes this share of the samples, the most forgotten, instead.
        decision (`str` or `Path`, *optional*):
            A file that the review page exported: measure, φ and what was decided by hand.

    Attributes:
        removed_dataset:
            The removed rows as given; `None` without `forgetting`.
        filter_result ([`FilterResult`]):
            Values, φ, how φ was chosen, counts; `None` without `forgetting`. Written, with the removed rows, into
            `output_dir/_forgetfilter-decision`.

    Raises:
        ValueError: if more than 1 % of the rows have no forgetting value, or everything would be removed; if `forgetting`
            is values and `measure` is not given.
        ValueError: from `train()`, if the model is not the base model that the trace began with.
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
        super().__init__(*args, **kwargs)
        if forgetting is None:
            warn_nothing_filtered(measure, threshold, fraction, decision)
            return
        if isinstance(self.train_dataset, IterableDataset):  # type: ignore[has-type] # set by Trainer
            raise UnsupportedDatasetError(
                "FilteredTrainer needs a map-style dataset: rows of a stream cannot be left out by id. Load it with "
                "`streaming=False`, or stream the `kept.jsonl` that `forgetfilter filter` writes."
            )
        trace = trace_of(forgetting)
        with preserve_state(self.model):
            loader = self.get_train_dataloader()
            max_length = trace.manifest["max_length"] if trace is not None else None
            rows = encode_collated(loader.dataset, loader.collate_fn, max_length, self.args.disable_tqdm)
        given: Any = self.train_dataset  # type: ignore[has-type] # set by Trainer
        self.train_dataset = self._filter(given, rows.ids, forgetting, measure, threshold, fraction, decision)
        self._save_decision(self.args)
        self.add_callback(BaseModelCheck(trace))


def filtered(trainer_class: type[Trainer]) -> type[Trainer]:
    """[`FilteredTrainer`] for another subclass of `Trainer`: `filtered(MyTrainer)(..., forgetting=tracker)`.

    The class must train on the rows that it is given, one sample a row.
    """
    return type(f"Filtered{trainer_class.__name__}", (FilteredTrainer, trainer_class), {})
