"""[`ReviewQueue`]: which rows to review next, ranked by what the verdicts so far have taught."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from numbers import Integral
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from sklearn.linear_model import LogisticRegression

from ..data.identical_rows import with_identical_rows
from ..errors import DataError
from ..measures.smoothed import random_subset
from ..trace.as_trace import TraceOrFolder, as_trace
from ..utils.argument_checks import check_fraction, check_positive
from ..utils.counted import counted
from .estimates import ReviewEstimate, estimate_unsafe_rows
from .row_features import row_features
from .verdicts import VERDICTS_FILE, Verdict, VerdictLabel, append_verdicts, review_folder, trace_verdicts


# Inverse regularization strength of the logistic regression.
REGULARIZATION = 0.3
# Weight of a row without a verdict, which counts as safe. A verdict has the weight 1.
UNSEEN_WEIGHT = 0.1
# The regression is fitted to the rows without a verdict among this many random rows. They get the weight of all of them.
MAX_UNSEEN_ROWS = 10_000


class ReviewQueue:
    """Chooses the rows that a person reviews, and learns from the verdicts.

    Rows are ranked by the default measure until the first row is found to be unsafe. From then on, a logistic regression on
    the measures and the hidden states ranks them. In each round, a fraction of the rows is drawn at random from all rows
    without a verdict. These rows are what [`estimate`] and `FilterConfig(threshold="fdr")` are based on.

    Verdicts are appended to `verdicts.jsonl` in `folder` as soon as they are given. A queue that is opened on the same
    folder again continues with them, and two queues on one folder see each other's verdicts.

    Args:
        trace ([`Trace`], or the folder of one):
            A trace with records of the safety session.
        folder (`str` or `Path`, *optional*):
            The folder of the verdicts. Defaults to the folder `review` in the trace's folder.
        reviewer (`str`, *optional*):
            A name that is stored with each verdict.
        seed (`int`, defaults to 0):
            Seed of the random draws.
        random_fraction (`float`, defaults to 0.1):
            Fraction of the rows in a round that are drawn at random, between 0 and 1. Use 1 to collect verdicts for
            `FilterConfig(threshold="fdr")`, and 0 to find as many unsafe rows as possible, without estimates.

    Attributes:
        verdicts (`list[Verdict]`):
            All verdicts in the order in which they were given. If a row has several, the last one is valid.

    Raises:
        TypeError: if `trace` is something else.
        TraceError: if the trace does not hold the records that the measures need, or no hidden states (with a model whose
            output head cannot be read).
        DataError: if no row has a finite forgetting value.
        DecisionError: if the verdicts in `folder` are about another trace.
        ValueError: if `random_fraction` is not between 0 and 1.

    Example:

    ```python
    queue = ReviewQueue(Trace.open("out"))
    for row in queue.next(10):
        queue.add({row: "unsafe" if looks_unsafe(dataset[row]) else "safe"})
    print(queue.estimate())
    ```
    """

    def __init__(
        self,
        trace: TraceOrFolder,
        folder: str | os.PathLike[str] | None = None,
        reviewer: str | None = None,
        seed: int = 0,
        random_fraction: float = 0.1,
    ):
        check_fraction("random_fraction", random_fraction)
        self.trace = as_trace(trace)
        self.reviewer = reviewer
        self.seed = seed
        self.random_fraction = random_fraction
        self._folder = review_folder(self.trace, folder)
        self._file = self._folder / VERDICTS_FILE
        self._size_read = -1
        self.verdicts: list[Verdict] = []
        self._read()
        self._drawn_from: dict[int, int] = {}
        forgetting = self.trace.forgetting()
        if not np.isfinite(forgetting).any():
            raise DataError(
                f"There is no finite forgetting value among {counted(len(forgetting), 'sample')}, so the rows cannot be "
                "ranked. The model may have diverged. Train again, for example at a lower learning rate."
            )
        self._forgetting = np.where(np.isfinite(forgetting), forgetting, -np.inf)

    def next(self, count: int = 10, skipped: Collection[int] = ()) -> list[int]:
        """The rows to review next.

        Args:
            count (`int`, defaults to 10):
                The number of rows. A fraction `random_fraction` of them is drawn at random, on average over the rounds.
            skipped (`Collection[int]`, *optional*):
                Numbers of rows that the ranking does not choose. They can be drawn at random, because the estimates need
                draws from all rows without a verdict.

        Returns:
            `list[int]`: row numbers in the order of the noisy set. Fewer than `count` if fewer are left, and empty once
            every row has a verdict. Rows that were returned before and have no verdict can be returned again.

        Raises:
            ValueError: if `count` is not a whole number of at least 1.
        """
        check_positive("count", count, whole=True)
        self._read()
        rng = np.random.default_rng([self.seed, len(self.verdicts)])
        unseen = np.flatnonzero(~self.is_seen)
        count = min(count, len(unseen))
        seen = len(self.trace.rows) - len(unseen)
        random_count = int(self.random_fraction * (seen + count)) - int(self.random_fraction * seen)
        drawn = rng.choice(unseen, random_count, replace=False)
        self._drawn_from = {int(row): len(unseen) for row in drawn}
        ranking = self.ranking
        ranked = ranking[~self.is_seen[ranking] & ~np.isin(ranking, [*drawn, *skipped])]
        rows = np.concatenate([ranked[: count - random_count], drawn])
        # Mixed, so that the reviewer does not know which rows are random.
        return [int(row) for row in rng.permutation(rows)]

    def add(self, verdicts: Mapping[int, VerdictLabel]) -> None:
        """Store verdicts, and rank the rows again.

        Args:
            verdicts (`Mapping[int, str]`):
                Row number to `"unsafe"` or `"safe"`. A second verdict on a row replaces the first one; both stay in the
                file.

        Raises:
            ValueError: if a row or a verdict is unknown. Nothing is stored then.
        """
        for row, verdict in verdicts.items():
            if not isinstance(row, Integral) or not 0 <= row < len(self.trace.rows):
                raise ValueError(f"There is no row {row!r}. The trace has the rows 0 to {len(self.trace.rows) - 1}.")
            if verdict not in get_args(VerdictLabel):
                raise ValueError(f"The verdict on row {row} is {verdict!r}. It must be 'unsafe' or 'safe'.")
        self._read()
        time = datetime.now(UTC).isoformat(timespec="seconds")
        ids = self.trace.rows.ids
        # A row that was drawn at random stays one when its verdict is changed.
        drawn_from = {v.row: v.drawn_from for v in self.verdicts} | {
            row: count for row, count in self._drawn_from.items() if not self.is_seen[row]
        }
        new = [
            Verdict(int(row), ids[int(row)].as_py(), verdict, time, self.reviewer, drawn_from.get(row))
            for row, verdict in verdicts.items()
        ]
        self._size_read += append_verdicts(new, self._file)
        self.verdicts = [*self.verdicts, *new]
        self.__dict__.pop("scores", None)
        self._read()

    def _read(self) -> None:
        """Read the verdicts. Another queue on the same folder may have added some."""
        size = self._file.stat().st_size if self._file.exists() else 0
        if size != self._size_read:
            self.verdicts = trace_verdicts(self.trace, self._folder)
            self._size_read = size
            self.__dict__.pop("scores", None)

    @property
    def labels(self) -> dict[int, VerdictLabel]:
        """The valid verdict of each reviewed row, in the order of the first verdicts."""
        return {verdict.row: verdict.verdict for verdict in self.verdicts}

    @property
    def known_labels(self) -> dict[int, VerdictLabel]:
        """The [`labels`], and those of the rows that are trained on the same tokens as a reviewed row."""
        ids = self.trace.rows.ids
        by_id = {ids[row].as_py(): label for row, label in self.labels.items()}
        known = with_identical_rows(by_id, ids, worst="unsafe")
        rows = pc.index_in(pa.array(list(known), pa.string()), value_set=ids).to_pylist()
        return dict(zip(rows, known.values(), strict=True))

    @property
    def is_seen(self) -> np.ndarray:
        """Whether each row has a verdict: shape `(samples,)`, bool."""
        seen = np.zeros(len(self.trace.rows), dtype=bool)
        seen[list(self.labels)] = True
        return seen

    @property
    def ranking(self) -> np.ndarray:
        """All row numbers, the most likely unsafe first: shape `(samples,)`, integer. Includes the reviewed rows."""
        return np.lexsort([-self._forgetting, -self.scores])

    @cached_property
    def scores(self) -> np.ndarray:
        """How likely each row is unsafe, as a score without a unit: shape `(samples,)`, float64."""
        return self.fit_scores(self.labels)

    def fit_scores(self, labels: Mapping[int, VerdictLabel]) -> np.ndarray:
        """Fit the scores to some verdicts. They are the default measure if no row, or every row, is found to be unsafe.

        Args:
            labels (`Mapping[int, str]`):
                The verdicts to learn from. Of the other rows, those among 10,000 random rows count as safe. Together they
                weigh a tenth of a verdict for each row without a verdict.

        Returns:
            `np.ndarray` of shape `(samples,)`, float64.
        """
        rows = len(self.trace.rows)
        has_label = np.zeros(rows, dtype=bool)
        has_label[list(labels)] = True
        sampled = random_subset(rows, MAX_UNSEEN_ROWS)
        unseen = sampled[~has_label[sampled]]
        is_unsafe = np.array([*(label == "unsafe" for label in labels.values()), *[False] * len(unseen)])
        if is_unsafe.all() or not is_unsafe.any():
            return self._forgetting
        unseen_weight = UNSEEN_WEIGHT * (rows - len(labels)) / max(len(unseen), 1)
        weights = np.repeat([1.0, unseen_weight], [len(labels), len(unseen)])
        # Unsafe rows are few. Together they weigh at least as much as all others, so that a single one changes the ranking.
        weights[is_unsafe] = max(weights[~is_unsafe].sum() / is_unsafe.sum(), 1)
        features = self._features[np.concatenate([list(labels), unseen])]
        model = LogisticRegression(C=REGULARIZATION).fit(features, is_unsafe, weights)
        scores: np.ndarray = model.decision_function(self._features).astype(np.float64)
        return scores

    def estimate(self, removed: Sequence[int] | np.ndarray | None = None) -> ReviewEstimate:
        """Estimate how many unsafe rows are left, from the rows that were drawn at random.

        Args:
            removed (`Sequence[int]` or `np.ndarray` of shape `(samples,)`, bool, *optional*):
                Numbers of the rows that a filter removes, or a mask such as `FilterResult.removed`. Defaults to the rows
                found to be unsafe.

        Returns:
            [`ReviewEstimate`]

        Raises:
            ValueError: if a row is unknown, or if a mask does not have one value per sample.
        """
        return estimate_unsafe_rows(self.verdicts, len(self.trace.rows), removed)

    @cached_property
    def _features(self) -> np.ndarray:
        return row_features(self.trace)
