"""TODO"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..data.json_lines import to_json_lines
from ..errors import DecisionError
from ..measures.names import Measure
from ..thresholds import Separability
from ..utils.atomic_files import atomic_write, write_json, write_lines, write_parquet
from .review_decision import Override


SCHEMA_VERSION = 1  # of decision.json
ThresholdMethod = Literal["auto", "fixed", "fraction"]


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
        overrides (`dict[str, str]`):
            Ids that a reviewer decided, with `"keep"` or `"remove"`.
        nats_per_unit (`float` or `None`):
            What [`filter_by_values`] was given, if it is finite.
        step (`int` or `None`):
            Which record of S1+ forgetting was measured at; `None` where there was no trace.
    """

    ids: pa.StringArray
    values: np.ndarray
    removed: np.ndarray
    measure: Measure
    threshold: float | None
    method: ThresholdMethod
    reason: str
    separability: Separability
    fingerprint: str | None
    versions: dict[str, str]
    overrides: dict[str, Override] = field(default_factory=dict)
    nats_per_unit: float | None = None
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
            before_commit = parts.enter_context(atomic_write(folder / "decision.json"))
            write_json({"schema_version": SCHEMA_VERSION, "counts": self.counts, **account}, before_commit)
            table = pa.table({"id": self.ids, "forgetting": self.values, "removed": self.removed})
            write_parquet([table], parts.enter_context(atomic_write(folder / "values.parquet")))
            if isinstance(removed_rows, Dataset):
                rows = parts.enter_context(atomic_write(folder / "removed.jsonl"))
                plain_rows = removed_rows.with_format(None)  # tensors would be written as they print, cut short
                write_lines(to_json_lines(plain_rows), rows)
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
