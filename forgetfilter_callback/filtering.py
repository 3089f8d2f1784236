"""Forgetting values → a decision with its account: what is removed, at which φ, and how φ was chosen."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from .forgetting import Measure
from .separability import Separability, separate
from .trace import library_versions, write_json, write_parquet


FilterThreshold = float | Literal["auto"]
Method = Literal["auto", "fixed", "share"]


@dataclass(frozen=True)
class FilterResult:
    """What was removed, and why.

    Attributes:
        ids (`pa.StringArray` of length `samples`):
            Sample ids, in the order of the training set.
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

    @property
    def counts(self) -> dict[str, int]:
        """`samples`, `removed`, `kept` and, among the kept, `unknown` (no forgetting value)."""
        removed = int(self.removed.sum())
        unknown = int(np.isnan(self.values).sum())
        return {"samples": len(self.ids), "removed": removed, "kept": len(self.ids) - removed, "unknown": unknown}

    def summary(self) -> str:
        """One sentence for a log."""
        phi = "" if self.threshold is None else f" (φ = {self.threshold:.3g} of {self.measure} forgetting)"
        return f"{self.counts['removed']} of {self.counts['samples']} samples removed{phi}: {self.reason}"

    def save(self, folder: Path, removed_rows: Any = None) -> None:
        """Writes `decision.json`, `values.parquet` (id, forgetting, removed) and, from a `Dataset`, `removed.jsonl`."""
        folder.mkdir(parents=True, exist_ok=True)
        account = asdict(self)
        for column in ("ids", "values", "removed"):
            del account[column]
        write_json({"counts": self.counts, **account}, folder / "decision.json")
        table = pa.table({"id": self.ids, "forgetting": self.values, "removed": self.removed})
        write_parquet([table], folder / "values.parquet")
        (folder / "removed.jsonl").unlink(missing_ok=True)  # of an earlier decision
        if isinstance(removed_rows, Dataset):
            removed_rows.to_json(folder / "removed.jsonl", force_ascii=False)

    @classmethod
    def load(cls, folder: str | Path) -> FilterResult:
        """Reads what [`save`] wrote."""
        account = json.loads((Path(folder) / "decision.json").read_text(encoding="utf-8"))
        del account["counts"]
        account["separability"] = Separability(**account["separability"])
        table = pq.read_table(Path(folder) / "values.parquet")
        return cls(
            ids=table["id"].combine_chunks(),
            values=table["forgetting"].to_numpy(),
            removed=table["removed"].to_numpy(),
            **account,
        )


def decide(
    ids: pa.StringArray,
    values: np.ndarray,
    measure: Measure,
    threshold: FilterThreshold = "auto",
    share: float | None = None,
    fingerprint: str | None = None,
) -> FilterResult:
    """Decides which samples to remove, from their forgetting values alone.

    Args:
        ids (`pa.StringArray` of length `samples`):
            Sample ids, as a trace's `rows.ids`.
        values (`np.ndarray` of shape `(samples,)`):
            Forgetting; higher is more forgotten; not finite where unknown (kept).
        measure (`str`):
            Which forgetting, for the account.
        threshold (`"auto"` or `float`, defaults to `"auto"`):
            φ, or [`separability.separate`] finds it, or finds that there is nothing to remove.
        share (`float`, *optional*):
            Between 0 and 1: removes this share of the samples, the most forgotten, instead.
        fingerprint (`str`, *optional*):
            Of the trace, for the account.

    Raises:
        ValueError: if everything would be removed, if no value is finite, or if `threshold` or `share` cannot be.
    """
    values = np.where(np.isfinite(values), np.asarray(values, dtype=np.float64), np.nan)
    known = ~np.isnan(values)
    if not known.any():
        raise ValueError(f"None of the {len(values)} samples has a finite forgetting value. Did the model diverge?")
    separability = separate(values[known], measure)
    phi: float | None
    if share is not None:
        if threshold != "auto":
            raise ValueError("Give `threshold` or `share`, not both.")
        if not 0 < share < 1:
            raise ValueError(f"share={share} must lie between 0 and 1.")
        # Ties are kept together, so that the same φ given by hand decides the same.
        largest_first = np.sort(values[known])[::-1]
        phi = float(largest_first[min(round(share * len(values)), len(largest_first) - 1)])
        removed = known & (values > phi)
        method: Method = "share"
        reason = f"the most forgotten {share:.1%}, as asked"
    elif threshold == "auto":
        phi = separability.threshold if separability.separable else None
        method = "auto"
        reason = separability.reason
        removed = known & (values > phi) if phi is not None else np.zeros(len(values), dtype=bool)
    else:
        phi = float(threshold)
        if np.isnan(phi):
            raise ValueError("threshold must be a number or 'auto', not NaN.")
        method = "fixed"
        removed = known & (values > phi)
        reason = f"φ as given; values lie between {np.nanmin(values):.3g} and {np.nanmax(values):.3g}"
    if len(removed) and removed.all():
        raise ValueError(
            f"φ = {phi:.3g} removes all {len(values)} samples (forgetting lies between {np.nanmin(values):.3g} and "
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
    )
