"""[`FilteredTrainer`]: a `Trainer` that removes the most forgotten samples."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer

from ..callbacks.session_rows import hide_progress, rows_and_collator
from ..data.as_rows import as_rows
from ..data.encode_collated import encode_collated
from ..errors import UnsupportedDatasetError
from ..filtering.config import FilterConfig, filter_config_or_default
from ..scoring.model_capabilities import check_is_causal
from ..trace.trace import Trace
from ..utils.model_state import preserve_state
from .base_model_check import BaseModelCheck
from .filter_mixin import (
    FilterMixin,
    Forgetting,
    check_nothing_to_filter,
    explain_filter_settings,
    trace_or_values,
    truncation_of,
)


class FilteredTrainer(FilterMixin, Trainer):
    """A [`~transformers.Trainer`] that removes the most forgotten samples of `train_dataset` before it trains (Zhao et al.
    2024, Algorithm 1).

    Without `forgetting` it behaves exactly like a `Trainer`. For your own subclass of `Trainer`, use
    `filtered(MyTrainer)`. For TRL's `SFTTrainer`, use [`FilteredSFTTrainer`].

    Args:
        forgetting ([`ForgetTracker`], [`Trace`] or its folder, `(ids, values)` or array, *optional*):
            How much each sample was forgotten. Samples are matched by id, regardless of their order. A plain array must
            match the rows in their order.
        filter_config ([`FilterConfig`], *optional*):
            Which samples are removed. By default, the threshold is chosen automatically, and nothing is removed if the
            values do not separate. With `FilterConfig(reviewed=..., weights=True)` nothing is removed, and the loss of each
            token is multiplied by the weight of its row (see `filter_result.weights`). The loss is divided by the number of
            tokens as usual, and the losses that are logged are not weighted. Neither is the auxiliary loss of a mixture of
            experts. Rows that are trained on the same tokens get the lowest of their weights.

    All other arguments are those of `Trainer`.

    Attributes:
        removed_dataset:
            The removed rows, unchanged. `None` without `forgetting`.
        filter_result ([`FilterResult`]):
            What was removed and why. `None` without `forgetting`. It is also written to
            `output_dir/_forgetfilter-result`, with the removed rows if they are a [`~datasets.Dataset`]. Rows of token ids
            get a column `text` there if the trainer has a `processing_class`.

    Raises:
        TypeError: if `forgetting` or `filter_config` is something else, or if an argument is unknown.
        ValueError: if `forgetting` is plain values and `filter_config.measure` is not given.
        DataError: if more than 1 % of the rows have no forgetting value, if no value is finite, or if an array does not have
            one value per row.
        DecisionError, TraceError: as in [`find_forgotten`].
        EncodingError: if the rows are not samples of causal language modeling, such as the rows of a stream.
        ForgetFilterError: from `train()`, if the model is not the base model of the trace. With weights, also if the model
            is compiled, if `torch.nn.DataParallel` is used, or if a fused loss never computes the logits.
    """

    def __init__(
        self,
        *args: Any,
        forgetting: Forgetting | None = None,
        filter_config: FilterConfig | None = None,
        **kwargs: Any,
    ):
        with explain_filter_settings(kwargs):
            super().__init__(*args, **kwargs)
        if forgetting is None:
            check_nothing_to_filter(filter_config)
            return
        config = filter_config_or_default(filter_config)
        self.train_dataset = dataset = as_rows(self.train_dataset, "`train_dataset`")
        if isinstance(dataset, IterableDataset):
            raise UnsupportedDatasetError(
                "FilteredTrainer needs a map-style dataset, because samples of a stream cannot be removed by id. Load the "
                "dataset with `streaming=False`, or stream the `kept.jsonl` that `forgetfilter filter` writes."
            )
        forgetting = trace_or_values(forgetting)
        trace = forgetting if isinstance(forgetting, Trace) else None
        model = cast(nn.Module, self.model)
        check_is_causal(model)
        if config.weights:
            self.check_weights_are_possible()
        prepared = [*self.accelerator._dataloaders]
        with preserve_state(model):
            rows, collate_fn = rows_and_collator(self.get_train_dataloader())
            max_length, keep_end = truncation_of(trace)
            ids = encode_collated(
                rows,
                collate_fn,
                model,
                max_length,
                hide_progress(self.args),
                keep_end,
                known=trace.rows if trace is not None else None,
            ).ids
        self.accelerator._dataloaders = prepared  # without the loader of the unfiltered rows
        self.train_dataset = self._filter(dataset, ids, forgetting, config, max_length, keep_end)
        self._save_result(self.args)
        self.add_callback(BaseModelCheck(trace))


def filtered(trainer_class: type[Trainer]) -> type[FilteredTrainer]:
    """Create a [`FilteredTrainer`] from another subclass of `Trainer`: `filtered(MyTrainer)(..., forgetting=tracker)`.

    Args:
        trainer_class (`type[Trainer]`):
            The class to extend. It must train on the rows it is given, with one sample per row.

    Returns:
        `type[FilteredTrainer]`: a subclass of both `FilteredTrainer` and `trainer_class`.
    """
    return type(f"Filtered{trainer_class.__name__}", (FilteredTrainer, trainer_class), {})
