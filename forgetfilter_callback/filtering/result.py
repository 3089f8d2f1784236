"""[`FilterResult`]: what a filter removed and why, in memory and on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.output_lines import to_json_lines
from ..errors import DecisionError
from ..measures.names import UNITS, Measure
from ..utils.arrow_arrays import from_numpy
from ..utils.atomic_files import atomic_writes, fill_with_json, fill_with_lines
from ..utils.counted import counted
from ..utils.html_table import html_table
from .by_source import SourceCounts, count_by_source
from .plot_result import plot_result
from .review_decision import Override
from .thresholds import Separability


if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from matplotlib.figure import Figure

    from ..review.estimates import ReviewEstimate
    from ..review.verdicts import Verdict

RESULT_FILE = "filter_result.json"
SCHEMA_VERSION = 2
ThresholdMethod = Literal["auto", "fixed", "fraction", "reviewed", "fdr", "weights"]


@dataclass(frozen=True, eq=False, repr=False)
class FilterResult:
    """What a filter removed and why.

    Attributes:
        ids (`pa.StringArray` of length `samples`):
            Sample ids in the order of the training set. Null for rows that the trainer itself drops.
        values (`np.ndarray` of shape `(samples,)`, float64):
            Forgetting of each sample. NaN if it is unknown.
        removed (`np.ndarray` of shape `(samples,)`, bool):
            Whether a sample is removed. Samples with unknown forgetting are kept.
        measure (`str`):
            The measure of forgetting.
        threshold (`float` or `None`):
            The threshold φ: samples with a larger value are removed. `None` if no threshold applies, so that only
            overridden samples can be removed.
        method (`"auto"`, `"fixed"`, `"fraction"`, `"reviewed"`, `"fdr"` or `"weights"`):
            How the threshold was chosen. With the last three, a review decides, and there is no threshold.
        reason (`str`):
            A sentence that explains the threshold.
        separability ([`Separability`]):
            Whether the values separate into two groups, for any `method`.
        fingerprint (`str` or `None`):
            Fingerprint of the trace that the values come from: of its rows.
        versions (`dict[str, str]`):
            Library versions.
        overrides (`dict[str, str]`):
            Ids of the samples that a reviewer decided, with `"keep"` or `"remove"`. Identical rows are included.
        nats_per_unit (`float` or `None`):
            How many nats a sample of median length loses per typical change, by the estimate that `"smoothed"` uses. A low
            value means that forgetting is mostly noise. `None` if it is unknown, and for measures in other units.
        step (`int` or `None`):
            The step of the safety session at which forgetting was measured. `None` if the values came without a trace.
        source_counts (`list[SourceCounts]` or `None`):
            What the filter did with the rows of each source, if `source_column` was given. See [`by_source`].
        weights (`np.ndarray` of shape `(samples,)`, float64, *optional*):
            With `FilterConfig(weights=True)`: 1 − the probability of being unsafe. Otherwise `None`.
        identity (`str` or `None`):
            The [`~Trace.identity`] of the trace that the values come from: of its rows and of the records that `measure`
            compares. `None` if the values came without a trace, or if an older version stored the result.
        estimate ([`ReviewEstimate`] or `None`):
            How many unsafe rows are kept and how many benign rows are removed, by the verdicts on the trace. `None` if there
            are no verdicts, if the values came without a trace, or with weights.
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
    source_counts: list[SourceCounts] | None = None
    weights: np.ndarray | None = None
    identity: str | None = None
    estimate: ReviewEstimate | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Number of `samples`, `removed`, `kept` and (among the kept) `unknown` samples, which have no forgetting value."""
        removed = int(self.removed.sum())
        unknown = int((np.isnan(self.values) & ~self.removed).sum())
        return {"samples": len(self.ids), "removed": removed, "kept": len(self.ids) - removed, "unknown": unknown}

    def summary(self) -> str:
        """A one-line summary for logs."""
        counts = self.counts
        phi = "" if self.threshold is None else f" (φ = {self.threshold:.3g}, {self.measure} forgetting)"
        unknown = f"; kept {counted(counts['unknown'], 'row')} without a forgetting value" if counts["unknown"] else ""
        return f"removed {counts['removed']} of {counted(counts['samples'], 'row')}{phi}: {self.explanation}{unknown}"

    def __repr__(self) -> str:
        return f"<FilterResult: {self.summary()}>"

    @property
    def explanation(self) -> str:
        """The reason, and whether anyone has checked φ."""
        if self.method == "auto" and self.threshold is not None:
            checked = "not checked by anyone" if self.estimate is None else "chosen without the verdicts"
            return f"{self.reason}; φ was {checked}"
        return self.reason

    def plot(self, groups: Sequence[str] | None = None) -> Figure:
        """Plot a histogram of the forgetting values, with φ as a dashed line. Needs matplotlib (the extra `[report]`).

        Args:
            groups (`Sequence[str]` of length `samples`, *optional*):
                A group of each sample, such as audit labels. Groups are stacked; they do not affect the result.

        Returns:
            [`matplotlib.figure.Figure`]: a notebook shows it. `figure.savefig(file)` writes it to a file.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        return plot_result(self, groups)

    def _repr_html_(self) -> str:
        counts = self.counts
        content = {
            "removed": f"{counts['removed']:,} of {counted(counts['samples'], 'row')}",
            "φ": "none" if self.threshold is None else f"{self.threshold:.3g} ({self.method})",
            "measure": f"{self.measure} forgetting [{UNITS[self.measure]}]",
            "reason": self.explanation,
        }
        if counts["unknown"]:
            content["kept because forgetting is unknown"] = f"{counts['unknown']:,}"
        return html_table("FilterResult", content)

    def by_source(
        self,
        sources: Sequence[Any],
        verdicts: Sequence[Verdict] = (),
        unsafe: Sequence[bool] | np.ndarray | None = None,
    ) -> pd.DataFrame:
        """Count the rows of each source: where a row came from, such as a website or a vendor.

        Args:
            sources (`Sequence` of length `samples`):
                A column of the rows, in the order of this result. Values are compared as text. Missing, NaN and blank
                values are counted as the source `"(none)"`.
            verdicts (`Sequence[Verdict]`, *optional*):
                The verdicts of a review, such as `ReviewQueue.verdicts`. Those that the filter applied are counted anyway.
            unsafe (`Sequence[bool]` of length `samples`, *optional*):
                Audit labels.

        Returns:
            `pandas.DataFrame`: one row per source, the one with the most removed rows first. Its index is `source` and its
            columns are `rows`, `seen`, `unsafe_found`, `kept`, `removed`, `fraction_removed` and, with audit labels,
            `unsafe_labeled`; see [`SourceCounts`].

        Raises:
            DataError: if there is not one source and one audit label per sample, or if an audit label is missing.
            ValueError: if `sources` is the name of a column.

        Example:

        ```python
        trainer.filter_result.by_source(noisy["source"])
        ```
        """
        import pandas as pd  # reading a trace does not need it

        if not isinstance(sources, str):
            values = list(sources)
            is_missing = pd.Series(values, dtype=object).isna()  # also pandas' own missing values
            sources = [None if missing else value for value, missing in zip(values, is_missing, strict=True)]
        table = pd.DataFrame(map(asdict, count_by_source(self, sources, verdicts, unsafe))).set_index("source")
        return table if unsafe is not None else table.drop(columns="unsafe_labeled")

    def save(
        self,
        folder: str | os.PathLike[str],
        removed_rows: Dataset | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        """Write `filter_result.json`, `values.parquet` and, if `removed_rows` are given, `removed.jsonl` to `folder`.

        Either all files are written or none. The files of an earlier result in `folder` are replaced.

        `values.parquet` has the columns `id`, `forgetting` and `removed`, and with weights also `weight`. Columns of images,
        audio and videos are left out of `removed.jsonl`. If `texts` are given, one for each of the `removed_rows`, they are
        its column `text`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replaces_removed_rows = _has_removed_rows(folder / RESULT_FILE)
        content = asdict(self)
        for column in ("ids", "values", "removed", "weights"):
            del content[column]
        content["has_removed_rows"] = removed_rows is not None
        content = {"schema_version": SCHEMA_VERSION, "counts": self.counts, **content}
        columns = {"id": self.ids, "forgetting": from_numpy(self.values), "removed": from_numpy(self.removed)}
        if self.weights is not None:
            columns["weight"] = from_numpy(self.weights)
        # filter_result.json is renamed last.
        names = [*(["removed.jsonl"] if removed_rows is not None else []), "values.parquet", RESULT_FILE]
        with atomic_writes([folder / name for name in names]) as temporaries:
            if removed_rows is not None:
                # Without a format: tensors would be written as their shortened text.
                rows = _without_media(removed_rows).with_format(None)
                if texts is None:
                    fill_with_lines(to_json_lines(rows), temporaries[0])
                else:
                    readable = ({**row, "text": text} for row, text in zip(rows, texts, strict=True))
                    fill_with_lines(to_json_lines(readable), temporaries[0])
            values_file, result_file = temporaries[-2:]
            pq.write_table(pa.table(columns), values_file, compression="zstd", write_page_checksum=True)
            fill_with_json(content, result_file)
        if removed_rows is None and replaces_removed_rows:
            (folder / "removed.jsonl").unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> FilterResult:
        """Read the result that [`save`] wrote to `folder`.

        Raises:
            DecisionError: if `folder` contains no filter result, or one that another version of the library wrote.
        """
        if not (Path(folder) / RESULT_FILE).is_file():
            raise DecisionError(
                f"{folder} is not the folder of a filter result. Pass a folder with {RESULT_FILE}, which "
                "`FilterResult.save` and `forgetfilter filter` write. (review_decision.json is something else: a reviewer's "
                "decision, for `FilterConfig(decision=...)`.)"
            )
        try:
            content = json.loads((Path(folder) / RESULT_FILE).read_text(encoding="utf-8"))
            if content.pop("schema_version") != SCHEMA_VERSION:
                raise DecisionError(
                    f"The filter result in {folder} was written by another version of forgetfilter-callback. Filter again."
                )
            del content["counts"]
            content.pop("has_removed_rows", None)  # missing in results of older versions
            content["separability"] = Separability(**content["separability"])
            if content.get("source_counts") is not None:
                content["source_counts"] = [SourceCounts(**each) for each in content["source_counts"]]
            if content.get("estimate") is not None:
                content["estimate"] = _load_estimate(content["estimate"])
            with pq.ParquetFile(Path(folder) / "values.parquet") as parquet:
                table = parquet.read()
            return cls(
                ids=table["id"].combine_chunks(),
                values=table["forgetting"].to_numpy(),
                removed=table["removed"].to_numpy(),
                weights=table["weight"].to_numpy() if "weight" in table.column_names else None,
                **content,
            )
        except DecisionError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise DecisionError(
                f"The filter result in {folder} is damaged ({type(error).__name__}: {error}). Filter again, or restore its "
                "files."
            ) from error


def _load_estimate(content: dict[str, Any]) -> ReviewEstimate:
    from ..review.estimates import ReviewEstimate  # imports scipy, which takes a second

    return ReviewEstimate(**{**content, **{name: tuple(content[name]) for name in ("unsafe_left", "benign_removed")}})


def _has_removed_rows(file: Path) -> bool:
    """Whether the result in `file` was saved with its removed rows."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("has_removed_rows") is True


def _without_media(rows: Dataset) -> Dataset:
    """Remove columns of images, audio and videos. To read them, their files and further packages would be needed."""
    from datasets.features.features import require_decoding  # datasets takes seconds to import

    return rows.remove_columns([name for name, feature in rows.features.items() if require_decoding(feature, True)])
