"""[`FilteredTrainer`]: a `Trainer` that leaves out the most forgotten samples."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import IterableDataset, Subset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .encoding import NotOneSampleARow, encode_collated
from .filtering import DecisionError, FilterResult, Review, decide, find_forgotten, values_for
from .forgetting import DEFAULT_MEASURE, FilterThreshold, Measure, mean_losses
from .model_state import cannot_record, untouched
from .scoring import token_losses
from .trace import Trace
from .tracker import ForgetTracker


logger = get_logger(__name__)  # says things once, on the main process

FILTER_FOLDER = "_forgetfilter-decision"  # not pushed to the Hub, as the trace is not
# M0 check: on so many samples, the mean loss may differ by so much (nats per token). Loading M0 in another precision
# moves it by a hundredth; one epoch of finetuning by a tenth and more.
CHECKED_SAMPLES = 32
MOST_DIFFERENCE = 0.1

Forgetting = ForgetTracker | str | os.PathLike[str] | tuple[Sequence[str], Sequence[float]] | np.ndarray


class Filtering:
    """What filtered trainers have in common; it knows nothing of how a trainer prepares its rows."""

    removed_dataset: Any = None
    filter_result: FilterResult | None = None

    def _filter(
        self,
        given: Any,
        ids: pa.StringArray,
        forgetting: Forgetting,
        measure: Measure | None,
        threshold: FilterThreshold,
        share: float | None,
        decision: str | os.PathLike[str] | None,
    ) -> Any:
        """The kept ones of the rows as given. A row without an id is kept."""
        trace = trace_of(forgetting)
        by_hand = None
        if decision is not None:
            review = reviewed(decision, trace, measure, threshold, share)
            measure, by_hand = review.measure, review.by_hand
            threshold = review.threshold if review.threshold is not None else math.inf
        if trace is not None:
            result = find_forgotten(trace, measure or DEFAULT_MEASURE, threshold, share, ids=ids, by_hand=by_hand)
        elif measure is None:
            raise ValueError(
                "Say what the values measure: `measure=`. (Or pass the trace, or its folder, rather than its values: "
                "`smoothed` is checked by more than them.)"
            )
        else:
            result = decide(ids, given_values(ids, forgetting), measure, threshold, share)
        self.filter_result = result
        self.removed_dataset = rows_at(given, np.flatnonzero(result.removed))
        logger.warning(f"{type(self).__name__}: {result.summary()}")
        return rows_at(given, np.flatnonzero(~result.removed))

    def _save_decision(self, args: TrainingArguments) -> None:
        assert self.filter_result is not None
        if args.should_save:
            self.filter_result.save(Path(args.output_dir) / FILTER_FOLDER, self.removed_dataset)


class FilteredTrainer(Filtering, Trainer):
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
        share (`float`, *optional*):
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
        threshold: FilterThreshold = "auto",
        share: float | None = None,
        decision: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if forgetting is None:
            filter_nothing(measure, threshold, share, decision)
            return
        if isinstance(self.train_dataset, IterableDataset):  # type: ignore[has-type] # set by Trainer
            raise NotOneSampleARow(
                "FilteredTrainer needs a map-style dataset: rows of a stream cannot be left out by id. Load it with "
                "`streaming=False`, or stream the `kept.jsonl` that `forgetfilter filter` writes."
            )
        trace = trace_of(forgetting)
        with untouched(self.model):
            loader = self.get_train_dataloader()
            max_length = trace.manifest["max_length"] if trace is not None else None
            rows = encode_collated(loader.dataset, loader.collate_fn, max_length, self.args.disable_tqdm)
        given: Any = self.train_dataset  # type: ignore[has-type] # set by Trainer
        self.train_dataset = self._filter(given, rows.ids, forgetting, measure, threshold, share, decision)
        self._save_decision(self.args)
        self.add_callback(BaseModelCheck(trace))


def filtered(trainer_class: type[Trainer]) -> type[Trainer]:
    """[`FilteredTrainer`] for another subclass of `Trainer`: `filtered(MyTrainer)(..., forgetting=tracker)`.

    The class must train on the rows that it is given, one sample a row.
    """
    return type(f"Filtered{trainer_class.__name__}", (FilteredTrainer, trainer_class), {})


def trace_of(forgetting: Forgetting) -> Trace | None:
    """The trace, where `forgetting` has one."""
    if isinstance(forgetting, ForgetTracker):
        return forgetting.trace
    return Trace.open(forgetting) if isinstance(forgetting, str | os.PathLike) else None


def filter_nothing(
    measure: Measure | None,
    threshold: FilterThreshold,
    share: float | None,
    decision: str | os.PathLike[str] | None,
) -> None:
    """Says that there is no `forgetting`; refuses what could apply to nothing else."""
    if (measure, threshold, share, decision) != (None, "auto", None, None):
        raise ValueError("There is nothing to filter by: pass the tracker, a trace or values as `forgetting`.")
    logger.warning("No `forgetting` was given, so nothing is filtered.")


def reviewed(
    decision: str | os.PathLike[str],
    trace: Trace | None,
    measure: Measure | None,
    threshold: FilterThreshold,
    share: float | None,
) -> Review:
    """A reviewer's decision on `trace`; refused beside other settings or on another trace."""
    if (measure, threshold, share) != (None, "auto", None):
        raise DecisionError(
            "A decision says measure and φ itself: give `decision`, or `measure`, `threshold`, `share`."
        )
    if trace is None:
        raise DecisionError("A decision was made on a trace: pass the trace, or its folder, as `forgetting`.")
    review = Review.load(decision)
    review.check(trace.identity())
    return review


class BaseModelCheck(TrainerCallback):
    """Refuses to train a model that is not the M0 of the trace: training and `get_peft_model` change models in place."""

    def __init__(self, trace: Trace | None):
        self.trace = trace

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            return
        reason = cannot_record(kwargs["model"])
        if reason is not None:
            logger.warning(f"It could not be checked that this model is the base model ({reason}).")
            return
        model = kwargs["model"]
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            logger.warning(
                "It could not be checked that this model is the base model: its prompt is drawn anew each time."
            )
            return
        if self.trace is None or self.trace.base_record is None:
            logger.warning(
                "There is no record of the base model (step 0 of S1), so it could not be checked that this model is the one "
                "from before the noisy set was learnt."
            )
            return
        offsets = self.trace.rows.counted_offsets
        scorable = np.flatnonzero(np.diff(offsets))
        checked = scorable[np.linspace(0, len(scorable) - 1, min(CHECKED_SAMPLES, len(scorable)), dtype=int)]
        base = mean_losses(self.trace.token_losses(self.trace.base_record), offsets)[checked]
        some = self.trace.rows.select(checked)
        with untouched(kwargs["model"]):
            losses = token_losses(kwargs["model"], some, disable_tqdm=True)
        here = mean_losses(losses, some.counted_offsets)
        difference = float(np.mean(np.abs(here - base)))
        if not difference <= MOST_DIFFERENCE:
            raise ValueError(
                f"This is not the base model that the trace began with: on {len(checked)} samples the mean loss is "
                f"{np.mean(here):.3f} nats per token, the base model's was {np.mean(base):.3f} (mean difference "
                f"{difference:.3f}, allowed {MOST_DIFFERENCE}). Training and `get_peft_model` change a model in place: "
                "load it afresh with `from_pretrained`, or unload the adapter and add a new one."
            )


def given_values(ids: pa.StringArray, forgetting: Any) -> np.ndarray:
    """The values that were given, `(ids, values)` or an array, for the rows with `ids`: NaN where there is none.

    Raises:
        ValueError: if they do not fit the rows.
    """
    if isinstance(forgetting, tuple):
        known, values = pa.array(forgetting[0], pa.string()), np.asarray(forgetting[1], dtype=np.float64)
        if len(known) != len(values):
            raise ValueError(f"forgetting=(ids, values) has {len(known)} ids and {len(values)} values.")
        return values_for(ids, known, values)
    values = np.asarray(forgetting, dtype=np.float64)
    if len(values) != len(ids):
        raise ValueError(
            f"forgetting has {len(values)} values and the training set {len(ids)} rows. A bare array must be for "
            "the same rows in the same order; pass (ids, values) otherwise."
        )
    return np.where(pc.is_valid(ids), values, np.nan)


def rows_at(dataset: Any, indices: np.ndarray) -> Any:
    """Some rows of a dataset, as given."""
    return dataset.select(indices) if isinstance(dataset, Dataset) else Subset(dataset, indices.tolist())
