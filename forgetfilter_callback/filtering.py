"""Forgetting values → a decision with its account: what is removed, at which φ, and how φ was chosen."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from .files import as_json_lines, replacing, write_json, write_lines, write_parquet
from .forgetting import DEFAULT_MEASURE, MEASURES, FilterThreshold, Measure
from .separability import Separability, separate
from .trace import Trace, library_versions


SCHEMA_VERSION = 1  # of decision.json
Method = Literal["auto", "fixed", "share"]
ByHand = Literal["keep", "remove"]
# Rows without a forgetting value are kept; more than this share of them means that the rows are not those of the trace.
MOST_UNKNOWN = 0.01


class DecisionError(ValueError):
    """A reviewer's decision that cannot be read or is of another trace. The message says why and what to do."""


@dataclass(frozen=True)
class Review:
    """What a reviewer decided. The review page exports it as JSON, which `decision=` and `forgetfilter filter` take.

    Attributes:
        measure (`"loss"`, `"relative"`, `"pooled"`, `"smoothed"` or `"rouge1"`):
            Which forgetting was looked at.
        threshold (`float` or `None`):
            φ; `None` where nothing is removed but by hand.
        by_hand (`dict[str, str]`):
            Sample ids, each with `"keep"` or `"remove"`, whatever φ says.
        trace (`str`):
            The [`~Trace.identity`] of the trace that was looked at.
    """

    measure: Measure
    threshold: float | None
    by_hand: dict[str, ByHand]
    trace: str

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Review:
        """Reads an exported decision.

        Raises:
            DecisionError: if `file` is not one.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            review = cls(**{name: content[name] for name in ("measure", "threshold", "by_hand", "trace")})
            threshold_fits = review.threshold is None or math.isfinite(float(review.threshold))
            by_hand_fits = all(value in get_args(ByHand) for value in review.by_hand.values())
        except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DecisionError(
                f"{file} is no decision ({type(error).__name__}: {error}). Export one from the review page that "
                "`forgetfilter report` makes."
            ) from error
        if review.measure not in MEASURES or not threshold_fits or not by_hand_fits:
            raise DecisionError(
                f"{file} is no decision: `measure` must be one of {', '.join(MEASURES)}, `threshold` a number or null, and "
                "every value in `by_hand` 'keep' or 'remove'."
            )
        return review

    def check(self, identity: str) -> None:
        """Refuses a decision made on another trace, or before its last record."""
        if identity != self.trace:
            raise DecisionError(
                f"This decision was made on another trace ({self.trace}, this one is {identity}), or on this one before its "
                "last record was taken. Make a review page of this trace and decide there."
            )


@dataclass(frozen=True)
class FilterResult:
    """What was removed, and why.

    Attributes:
        ids (`pa.StringArray` of length `samples`):
            Sample ids, in the order of the training set; null where the trainer drops the row.
        values (`np.ndarray` of shape `(samples,)`, float64):
            Forgetting; NaN where it is unknown.
        removed (`np.ndarray` of shape `(samples,)`, bool):
            Which samples are removed. Samples with an unknown value never are.
        measure (`str`):
            Which forgetting.
        threshold (`float` or `None`):
            φ: a sample is removed when its value is larger. `None` when nothing is removed because the values do not
            separate.
        method (`"auto"`, `"fixed"` or `"share"`):
            How φ was chosen.
        reason (`str`):
            The same in a sentence.
        separability ([`Separability`]):
            Whether the values hold two populations, whichever way φ was chosen.
        fingerprint (`str` or `None`):
            Of the trace the values come from.
        versions (`dict[str, str]`):
            Library versions.
        by_hand (`dict[str, str]`):
            Ids that a reviewer decided, with `"keep"` or `"remove"`.
        nats (`float` or `None`):
            What [`decide`] was given, if it is finite.
        step (`int` or `None`):
            Which record of S1+ forgetting was measured at; `None` where there was no trace.
    """

    ids: pa.StringArray
    values: np.ndarray
    removed: np.ndarray
    measure: Measure
    threshold: float | None
    method: Method
    reason: str
    separability: Separability
    fingerprint: str | None
    versions: dict[str, str]
    by_hand: dict[str, ByHand] = field(default_factory=dict)
    nats: float | None = None
    step: int | None = None

    @property
    def counts(self) -> dict[str, int]:
        """`samples`, `removed`, `kept` and, among the kept, `unknown` (no forgetting value)."""
        removed = int(self.removed.sum())
        unknown = int(np.isnan(self.values).sum())
        return {"samples": len(self.ids), "removed": removed, "kept": len(self.ids) - removed, "unknown": unknown}

    def summary(self) -> str:
        """One sentence for a log."""
        phi = "" if self.threshold is None else f" (φ = {self.threshold:.3g} of {self.measure} forgetting)"
        unknown = f"; {self.counts['unknown']} without a forgetting value kept" if self.counts["unknown"] else ""
        return f"{self.counts['removed']} of {self.counts['samples']} samples removed{phi}: {self.reason}{unknown}"

    def save(self, folder: str | os.PathLike[str], removed_rows: Any = None) -> None:
        """Writes `decision.json`, `values.parquet` (id, forgetting, removed) and, from a `Dataset`, `removed.jsonl`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        account = asdict(self)
        for column in ("ids", "values", "removed"):
            del account[column]
        with ExitStack() as parts:  # all of them or none; the account gets its name last
            at_last = parts.enter_context(replacing(folder / "decision.json"))
            write_json({"schema_version": SCHEMA_VERSION, "counts": self.counts, **account}, at_last)
            table = pa.table({"id": self.ids, "forgetting": self.values, "removed": self.removed})
            write_parquet([table], parts.enter_context(replacing(folder / "values.parquet")))
            if isinstance(removed_rows, Dataset):
                rows = parts.enter_context(replacing(folder / "removed.jsonl"))
                plain_rows = removed_rows.with_format(None)  # tensors would be written as they print, cut short
                write_lines(as_json_lines(plain_rows), rows)
        if not isinstance(removed_rows, Dataset):
            (folder / "removed.jsonl").unlink(missing_ok=True)  # of an earlier decision

    @classmethod
    def load(cls, folder: str | Path) -> FilterResult:
        """Reads what [`save`] wrote.

        Raises:
            DecisionError: if it is not that, or a newer version's.
        """
        try:
            account = json.loads((Path(folder) / "decision.json").read_text(encoding="utf-8"))
            if account.pop("schema_version") > SCHEMA_VERSION:
                raise DecisionError(f"A newer forgetfilter-callback wrote the decision in {folder}. Upgrade this one.")
            del account["counts"]
            account["separability"] = Separability(**account["separability"])
            table = pq.read_table(Path(folder) / "values.parquet")
            return cls(
                ids=table["id"].combine_chunks(),
                values=table["forgetting"].to_numpy(),
                removed=table["removed"].to_numpy(),
                **account,
            )
        except DecisionError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise DecisionError(
                f"{folder} holds no decision ({type(error).__name__}: {error}). `FilterResult.save` and `forgetfilter "
                "filter` write them."
            ) from error


def find_forgotten(
    trace: Trace,
    measure: Measure = DEFAULT_MEASURE,
    threshold: FilterThreshold = "auto",
    share: float | None = None,
    step: int | None = None,
    ids: pa.StringArray | None = None,
    by_hand: Mapping[str, ByHand] | None = None,
) -> FilterResult:
    """Decides which samples of a trace to remove.

    Args:
        trace ([`Trace`]):
            With records of S1+.
        measure, threshold, share, by_hand:
            As in [`decide`].
        step (`int`, *optional*):
            Which record of S1+ to measure forgetting at; the last one by default.
        ids (`pa.StringArray`, *optional*):
            Decides on the samples with these ids, in this order, instead of on all of the trace in its own.

    Raises:
        TraceError: if the trace has not the records that `measure` needs.
        ValueError: as [`decide`], and if more than 1 % of `ids` are not in the trace.
    """
    values = trace.forgetting(measure, step)
    nats = trace.nats_per_change(values, step)
    if ids is not None:
        values = values_for(ids, trace.rows.ids, values)
    fingerprint = trace.manifest["fingerprint"]
    result = decide(
        ids if ids is not None else trace.rows.ids, values, measure, threshold, share, fingerprint, by_hand, nats
    )
    return replace(result, step=trace.first_and_last(step)[1].step)


def values_for(ids: pa.StringArray, known: pa.StringArray, values: np.ndarray) -> np.ndarray:
    """The values, of samples with ids `known`, for other samples: NaN where there is none.

    Raises:
        ValueError: if more than 1 % of `ids` have none, those not counted that are null.
    """
    places = pc.index_in(ids, value_set=known, skip_nulls=True)
    asked = len(ids) - ids.null_count
    unknown = places.null_count - ids.null_count
    if unknown > MOST_UNKNOWN * asked:
        raise ValueError(
            f"{unknown} of the {asked} rows have no forgetting value, more than {MOST_UNKNOWN:.0%}: they are not the "
            "rows that were tracked. The usual causes are another max_length, chat template, tokenizer or collator than "
            "in the tracked sessions. Prepare the rows the same way."
        )
    return pc.take(pa.array(values), places).to_numpy(zero_copy_only=False)


def decide(
    ids: pa.StringArray,
    values: np.ndarray,
    measure: Measure,
    threshold: FilterThreshold = "auto",
    share: float | None = None,
    fingerprint: str | None = None,
    by_hand: Mapping[str, ByHand] | None = None,
    nats: float | None = None,
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
        share (`float`, *optional*):
            Between 0 and 1: removes this share of the samples, the most forgotten, instead. Samples with the same value are
            removed or kept together, whichever comes nearer to the share.
        fingerprint (`str`, *optional*):
            Of the trace, for the account.
        by_hand (`Mapping[str, str]`, *optional*):
            Ids with `"keep"` or `"remove"`, whatever φ says.
        nats (`float`, *optional*):
            The trace's [`~Trace.nats_per_change`] of these values. Only `smoothed` asks for it, to tell clean sets.

    Raises:
        ValueError: if everything would be removed, if no value is finite, if there is not one value an id, or if `measure`,
            `threshold` or `share` cannot be.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r} is none of {', '.join(MEASURES)}.")
    if np.shape(values) != (len(ids),):
        raise ValueError(f"There are {len(ids)} ids and values of shape {np.shape(values)}. Give one value a sample.")
    values = np.where(np.isfinite(values), np.asarray(values, dtype=np.float64), np.nan)
    known = ~np.isnan(values)
    if not known.any():
        raise ValueError(f"None of the {len(values)} samples has a finite forgetting value. Did the model diverge?")
    separability = separate(values[known], measure, nats)
    phi: float | None
    if share is not None:
        if threshold != "auto":
            raise ValueError("Give `threshold` or `share`, not both.")
        if not 0 < share < 1:
            raise ValueError(f"share={share} must lie between 0 and 1.")
        # Ties stay together, so that the same φ given by hand decides the same.
        levels, counts = np.unique(values[known], return_counts=True)
        above = counts.sum() - counts.cumsum()  # as many are removed with φ at each level
        nearest = np.abs(above - share * len(values)).argmin()
        phi = float(levels[nearest])
        removed = known & (values > phi)
        method: Method = "share"
        if abs(above[nearest] - share * len(values)) < 1:
            how = ", as asked"
        else:
            how = f" ({share:.1%} asked; samples of the same value stay together, those without one are kept)"
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
    if by_hand:
        removed = _overruled(ids, removed, by_hand)
        reason += f"; {len(by_hand)} by hand"
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
        by_hand=dict(by_hand) if by_hand else {},
        nats=nats if nats is not None and math.isfinite(nats) else None,
    )


def _overruled(ids: pa.StringArray, removed: np.ndarray, by_hand: Mapping[str, ByHand]) -> np.ndarray:
    decided = pa.array(list(by_hand), pa.string())
    unknown = decided.filter(pc.invert(pc.is_in(decided, value_set=ids)))
    if len(unknown):
        raise DecisionError(
            f"{len(unknown)} of the samples decided by hand are not in this set, for example {unknown[0]}. Decide on "
            "the trace of this very set."
        )
    overruled = removed.copy()
    places = pc.index_in(ids, value_set=decided, skip_nulls=True)
    verdicts = np.array([verdict == "remove" for verdict in by_hand.values()])
    overruled[places.is_valid()] = verdicts[places.drop_null()]
    return overruled
