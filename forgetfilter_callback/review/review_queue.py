"""[`ReviewQueue`]: which rows to review next, ranked by what the verdicts so far have taught."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from numbers import Integral
from typing import get_args

import numpy as np
from sklearn.linear_model import LogisticRegression

from ..data.identical_rows import content_numbers, worst_labels
from ..errors import DataError
from ..measures.smoothed import random_subset
from ..trace.as_trace import TraceOrFolder, as_trace
from ..utils.argument_checks import check_fraction, check_positive
from ..utils.counted import counted
from .estimates import ReviewEstimate, estimate_unsafe_rows
from .row_features import row_features
from .skipped_draws import SKIPPED_FILE, append_skipped_draws, read_skipped_draws
from .verdicts import (
    VERDICTS_FILE,
    Verdict,
    VerdictLabel,
    append_verdicts,
    known_labels,
    review_folder,
    trace_verdicts,
)


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
    without a verdict. These rows are what [`estimate`] and `FilterConfig(threshold="fdr")` are based on. A row that was
    drawn comes back in later rounds until it has a verdict: if difficult rows were left out, the estimates would be wrong.
    With [`skip`], it also comes back in a queue that is opened later.

    A verdict is valid for all rows that are trained on the same tokens, so only one of them is returned. If another one is
    drawn at random, it gets the verdict without being returned.

    Verdicts are appended to `verdicts.jsonl` in `folder` as soon as they are given. A queue that is opened on the same
    folder again continues with them. Reviewers must take turns: queues that are open at the same time see each other's
    verdicts, but return the same rows.

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
        # Each row that was drawn, and the number of rows without a verdict then.
        self._drawn_from = read_skipped_draws(self._folder / SKIPPED_FILE, self.trace.rows.ids, self.verdicts)
        forgetting = self.trace.forgetting()
        if not np.isfinite(forgetting).any():
            raise DataError(
                f"There is no finite forgetting value among {counted(len(forgetting), 'row')}, so the rows cannot be "
                "ranked. The model may have diverged. Train again, for example at a lower learning rate."
            )
        self._forgetting = np.where(np.isfinite(forgetting), forgetting, -np.inf)

    def next(self, count: int = 10, skipped: Collection[int] = ()) -> list[int]:
        """The rows to review next.

        Args:
            count (`int`, defaults to 10):
                The number of rows. A fraction `random_fraction` of them is drawn at random, on average over the rounds.
            skipped (`Collection[int]`, *optional*):
                Numbers of rows that are not returned now, unless they are drawn at random by this call. Rows that were drawn
                by an earlier call should be skipped for a while only, because the estimates need their verdicts.

        Returns:
            `list[int]`: row numbers in the order of the noisy set. Fewer than `count` if fewer are left, and empty once
            every row that is not skipped has a verdict or is identical to one that has. Rows that were returned before and
            have no verdict can be returned again.

        Raises:
            ValueError: if `count` is not a whole number of at least 1.
        """
        check_positive("count", count, whole=True)
        self._read()
        # Both numbers, so that the draws after a skipped row do not depend on the draw of that row.
        rng = np.random.default_rng([self.seed, len(self.verdicts), len(self.drawn_without_verdict)])
        seen = int(self.is_seen.sum())
        count = min(count, len(self.trace.rows) - seen)
        random_count = int(self.random_fraction * (seen + count)) - int(self.random_fraction * seen)
        waiting = [row for row in self.drawn_without_verdict if row not in skipped]
        drawn = waiting[:random_count]
        drawn += self._draw(random_count - len(drawn), rng)
        is_taken = self.is_known | self._is_identical([*self.drawn_without_verdict, *skipped])
        ranked = self.ranking[~is_taken[self.ranking]]
        _, first_of_content = np.unique(self._contents[ranked], return_index=True)
        ranked = ranked[np.sort(first_of_content)][: count - len(drawn)]
        others = [row for row in waiting if row not in drawn][: count - len(drawn) - len(ranked)]
        # Mixed, so that the reviewer does not know which rows are random.
        return [int(row) for row in rng.permutation(np.array([*ranked, *drawn, *others], dtype=int))]

    @property
    def drawn_without_verdict(self) -> list[int]:
        """Rows that were drawn at random and that wait for a verdict, in the order of the draws."""
        is_known = self.is_known
        waiting = {int(self._contents[row]): row for row in reversed(self._drawn_from) if not is_known[row]}
        return list(waiting.values())[::-1]  # identical rows get the verdict on the first one

    def _is_identical(self, rows: Sequence[int]) -> np.ndarray:
        """Whether each row is one of `rows` or identical to one of them: shape `(samples,)`, bool."""
        return np.isin(self._contents, self._contents[np.array(rows, dtype=int)])

    def _draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """Draw rows from those without a verdict, until `count` of them have to be shown, and return these.

        The others are identical to a row that has a verdict, or that waits for one. They get this verdict.
        """
        is_open = ~self.is_seen
        size = int(is_open.sum())
        is_open[list(self._drawn_from)] = False
        is_new = ~self.is_known & ~self._is_identical(list(self._drawn_from))
        rows = _in_random_order(np.flatnonzero(is_open), count, rng)
        to_show: list[int] = []
        while len(to_show) < count and is_new.any():
            row = next(rows)
            self._drawn_from[row] = size
            if is_new[row]:
                to_show.append(row)
                is_new &= self._contents != self._contents[row]
        self._judge_drawn_copies()
        return to_show

    def _judge_drawn_copies(self) -> None:
        """Store the verdicts of rows that were drawn and are identical to a reviewed row."""
        known, is_seen = self.known_labels, self.is_seen
        copies = [row for row in self._drawn_from if row in known and not is_seen[row]]
        if copies:
            latest = {verdict.row: verdict for verdict in self.verdicts}
            originals = {int(self._contents[row]): verdict for row, verdict in reversed(latest.items())}
            self._store([self._copied(row, known[row], originals[int(self._contents[row])]) for row in copies])

    def add(self, verdicts: Mapping[int, VerdictLabel]) -> None:
        """Store verdicts, and rank the rows again.

        Args:
            verdicts (`Mapping[int, str]`):
                Row number to `"unsafe"` or `"safe"`. A second verdict on a row replaces the first one; both stay in the
                file.

        Raises:
            TypeError: if `verdicts` is not a mapping.
            ValueError: if a row or a verdict is unknown. Nothing is stored then.
        """
        self._check(verdicts)
        self._read()
        given = {int(row): verdict for row, verdict in verdicts.items()}
        new = [self._verdict(row, verdict) for row, verdict in given.items()]
        self._store([*new, *self._changed_copies(given)])
        self._judge_drawn_copies()

    def _changed_copies(self, given: Mapping[int, VerdictLabel]) -> list[Verdict]:
        """New verdicts on rows that were drawn, but not shown, if those on the rows that they are identical to change."""
        latest = {verdict.row: verdict for verdict in self.verdicts if verdict.row not in given}
        copies = [each for each in latest.values() if each.identical_to is not None]
        judged = {**{row: each.verdict for row, each in latest.items() if each.identical_to is None}, **given}
        contents = self._contents
        label_of = worst_labels(((int(contents[row]), label) for row, label in judged.items()), worst="unsafe")
        changed = set(contents[list(given)].tolist())
        return [
            replace(each, verdict=label_of[int(contents[each.row])], time=_now(), reviewer=self.reviewer)
            for each in copies
            if contents[each.row] in changed
        ]

    def skip(self, row: int) -> None:
        """Put off the verdict on a row.

        If the row was drawn at random, it is stored in `skipped.jsonl` in `folder`, so that it also comes back in a queue
        that is opened later. Other rows need not be skipped.

        Args:
            row (`int`):
                Row number in the noisy set.
        """
        if row in self.drawn_without_verdict:
            identical = self._is_identical([row])  # those that were drawn get the verdict on this row
            draws = {other: size for other, size in self._drawn_from.items() if identical[other]}
            after = self.verdicts[-1].time if self.verdicts else None
            append_skipped_draws(draws, after, self.trace.rows.ids, self._folder / SKIPPED_FILE)

    def _check(self, verdicts: Mapping[int, VerdictLabel]) -> None:
        if not isinstance(verdicts, Mapping):
            raise TypeError(
                f"Pass a dictionary from row numbers to verdicts, such as {{3: 'unsafe'}}, not {type(verdicts).__name__}."
            )
        for row, verdict in verdicts.items():
            if not isinstance(row, Integral) or isinstance(row, bool) or not 0 <= row < len(self.trace.rows):
                raise ValueError(f"There is no row {row!r}. The trace has the rows 0 to {len(self.trace.rows) - 1}.")
            if verdict not in get_args(VerdictLabel):
                raise ValueError(f"The verdict on row {row} is {verdict!r}. It must be 'unsafe' or 'safe'.")

    def _verdict(self, row: int, label: VerdictLabel) -> Verdict:
        return Verdict(
            row=row,
            id=self.trace.rows.ids[row].as_py(),
            verdict=label,
            time=_now(),
            reviewer=self.reviewer,
            drawn_from=self._drawn_from.get(row),
            rows=len(self.trace.rows),
        )

    def _copied(self, row: int, label: VerdictLabel, original: Verdict) -> Verdict:
        """The verdict on a row that is identical to a reviewed one."""
        of = original.row if original.identical_to is None else original.identical_to
        return replace(self._verdict(row, label), reviewer=original.reviewer, identical_to=of)

    def _store(self, new: list[Verdict]) -> None:
        # A row that was drawn at random stays one when its verdict is changed, and other rows do not become one.
        earlier = {verdict.row: verdict.drawn_from for verdict in self.verdicts}
        new = [replace(each, drawn_from=earlier.get(each.row, each.drawn_from)) for each in new]
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
        """The valid verdict of each row that has one, in the order of the first verdicts."""
        self._read()
        return {verdict.row: verdict.verdict for verdict in self.verdicts}

    @property
    def known_labels(self) -> dict[int, VerdictLabel]:
        """The [`labels`], and those of the rows that are trained on the same tokens as a reviewed row."""
        return known_labels(self.verdicts, self._contents)

    @property
    def is_seen(self) -> np.ndarray:
        """Whether each row has a verdict: shape `(samples,)`, bool."""
        seen = np.zeros(len(self.trace.rows), dtype=bool)
        seen[list(self.labels)] = True
        return seen

    @property
    def is_known(self) -> np.ndarray:
        """Whether each row has a verdict or is trained on the same tokens as a row that has: shape `(samples,)`, bool."""
        known = np.zeros(len(self.trace.rows), dtype=bool)
        known[list(self.known_labels)] = True
        return known

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
                The verdicts to learn from. Of the other rows, those among 10,000 random rows count as safe, unless they are
                trained on the same tokens as one of these. Together they weigh a tenth of a verdict for each row without a
                verdict.

        Returns:
            `np.ndarray` of shape `(samples,)`, float64.

        Raises:
            TypeError, ValueError: as in [`add`].
        """
        self._check(labels)
        rows = len(self.trace.rows)
        is_known = np.isin(self._contents, self._contents[list(labels)])
        sampled = random_subset(rows, MAX_UNSEEN_ROWS)
        unseen = sampled[~is_known[sampled]]
        is_unsafe = np.array([*(label == "unsafe" for label in labels.values()), *[False] * len(unseen)])
        if is_unsafe.all() or not is_unsafe.any():
            return self._forgetting
        unseen_weight = UNSEEN_WEIGHT * (rows - is_known.sum()) / max(len(unseen), 1)
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
                found to be unsafe, and those identical to one.

        Returns:
            [`ReviewEstimate`]

        Raises:
            ValueError: if a row is unknown, or if a mask does not have one value per sample.
        """
        self._read()
        return estimate_unsafe_rows(self.verdicts, self.known_labels, len(self.trace.rows), removed)

    @cached_property
    def _contents(self) -> np.ndarray:
        return content_numbers(self.trace.rows.ids)

    @cached_property
    def _features(self) -> np.ndarray:
        return row_features(self.trace)


def _in_random_order(rows: np.ndarray, first: int, rng: np.random.Generator) -> Iterator[int]:
    """The rows in a random order. The `first` ones are drawn without the others."""
    drawn = rng.choice(rows, min(first, len(rows)), replace=False)
    yield from drawn.tolist()
    yield from rng.permutation(np.setdiff1d(rows, drawn)).tolist()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
