"""[`ReviewSession`]: which row the page shows, and what it says about the review so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.preprocessing import normalize

from ...data.decode import Decoder, special_ids
from ...errors import DecisionError
from ...filtering.by_source import source_name
from ...review.review_queue import ReviewQueue
from ...review.stop_advice import stop_advice
from ...review.verdicts import VerdictLabel
from ..source_table import MAX_LISTED, short_name
from ..token_text import MAX_TEXT_LENGTH, last_characters, split_text


# Characters of a prompt and of an answer. Without a limit, one huge row could block the browser.
MAX_ROW_LENGTH = 20_000
SIMILAR_ROWS = 2
TEMPLATE_ROWS = 20  # what their prompts have in common is taken as the chat template


class ReviewSession:
    """A review of rows, one at a time.

    Rows come in rounds. After the last row of a round, the queue ranks the rows again. A row that is skipped comes back when
    the ranking has no other rows left. If it was drawn at random, it comes back after the next round.

    Args:
        queue ([`ReviewQueue`]):
            Chooses the rows and stores the verdicts.
        decoder ([`tokenizers.Tokenizer`] or [`~transformers.PreTrainedTokenizerBase`]):
            Decodes the token ids of the trace.
        round_size (`int`, defaults to 10):
            Rows per round.
        sources (`Sequence` of length `samples`, *optional*):
            Where each row came from.
    """

    def __init__(
        self, queue: ReviewQueue, decoder: Decoder, round_size: int = 10, sources: Sequence[Any] | None = None
    ):
        self.queue = queue
        self._decoder = decoder
        self._special = special_ids(decoder)
        self._round_size = round_size
        self._sources = None if sources is None else [source_name(value) for value in sources]
        self._rows_of_source = Counter(self._sources)
        before, after = queue.trace.first_and_last()
        self._before, self._after = queue.trace.stored_losses(before), queue.trace.stored_losses(after)
        states = queue.trace.states(before).astype(np.float32)  # changed in place below: a copy takes 4 bytes per state
        is_finite = np.isfinite(states)
        # All states share a large component. Without centering, all rows would be similar.
        states -= states.sum(axis=0, where=is_finite) / np.maximum(is_finite.sum(axis=0), 1, dtype=np.float32)
        states[~is_finite] = 0
        self._directions = normalize(states, copy=False)
        # Rows before the current one, for undo.
        self._shown = [
            verdict.row
            for verdict in {each.row: each for each in queue.verdicts}.values()
            if verdict.identical_to is None
        ]
        self._skipped: set[int] = set()
        self._round = self._next_round()  # the current row and those after it

    @property
    def row(self) -> int | None:
        """Number of the current row, or `None` if every row has a verdict."""
        return self._round[0] if self._round else None

    def judge(self, row: int, verdict: VerdictLabel) -> None:
        """Store the verdict on the current row, and go to the next row.

        Raises:
            DecisionError: if `row` is not the current row. Nothing is stored then.
        """
        self._check_current(row)
        self.queue.add({row: verdict})
        self._skipped.discard(row)
        self._advance()

    def skip(self, row: int) -> None:
        """Go to the next row. The current row keeps its verdict if it has one.

        Raises:
            DecisionError: if `row` is not the current row.
        """
        self._check_current(row)
        if row not in self.queue.labels:
            self._skipped.add(row)
            self.queue.skip(row)
        self._advance()

    def undo(self) -> None:
        """Show the previous row again. Its verdict is valid until there is a new one. Does nothing at the first row."""
        if self._shown:
            self._round.insert(0, self._shown.pop())

    def state(self) -> dict[str, Any]:
        """What the page shows, as JSON types."""
        estimate = self.queue.estimate()
        low, high = estimate.unsafe_left
        is_enough, advice = stop_advice(self.queue)
        return {
            "row": None if self.row is None else self._row_content(self.row),
            "rows": estimate.rows,
            "seen": estimate.seen,
            "identical": estimate.identical,
            "unsafe": estimate.unsafe_found,
            "left_in_round": sum(row not in self.queue.labels for row in self._round),
            "unsafe_left": [low, high],
            "drawn": estimate.drawn,
            "is_enough": is_enough,
            "advice": advice,
            "can_undo": bool(self._shown),
            "by_source": None if self._sources is None else self._by_source(self._sources),
        }

    def some_prompts(self) -> list[dict[str, Any]]:
        """The prompts of random rows, as JSON types. They show what the chat template is."""
        rows = np.random.default_rng(0).permutation(len(self.queue.trace.rows))[:TEMPLATE_ROWS].tolist()
        texts = [self._text(row, MAX_ROW_LENGTH) for row in rows]
        return [{"prompt": text["prompt"], "cut": text["cut"]} for text in texts]

    def _check_current(self, row: int) -> None:
        if row != self.row:
            raise DecisionError(
                f"Row {row} is not the current row, so nothing was stored. Perhaps the review is open in two windows."
            )

    def _advance(self) -> None:
        # If the next round cannot be made, the current row stays, and the reviewer can press the key again.
        following = self._round[1:] or self._next_round()
        self._shown.append(self._round[0])
        self._round = following

    def _next_round(self) -> list[int]:
        rows = self.queue.next(self._round_size, self._skipped)
        if len(rows) < self._round_size and self._skipped.issuperset(rows):  # nothing else is left
            self._skipped.clear()
            rows = self.queue.next(self._round_size)
        self._skipped.difference_update(self.queue.drawn_without_verdict)
        return rows

    def _by_source(self, sources: list[str]) -> list[dict[str, Any]]:
        """What was seen of each source, identical rows included, the one with the most unsafe rows first.

        Sources without a seen row are left out.
        """
        labels = self.queue.known_labels
        seen = Counter(sources[row] for row in labels)
        unsafe = Counter(sources[row] for row, label in labels.items() if label == "unsafe")
        order = sorted(seen, key=lambda source: (-unsafe[source], -seen[source], source))
        groups = [(short_name(source), [source]) for source in order[:MAX_LISTED]]
        if order[MAX_LISTED:]:
            groups.append((f"{len(order) - MAX_LISTED:,} more", order[MAX_LISTED:]))
        return [
            {
                "source": name,
                "rows": sum(self._rows_of_source[source] for source in group),
                "seen": sum(seen[source] for source in group),
                "unsafe": sum(unsafe[source] for source in group),
            }
            for name, group in groups
        ]

    def _source(self, row: int) -> str | None:
        return None if self._sources is None else short_name(self._sources[row])

    def _row_content(self, row: int) -> dict[str, Any]:
        return {
            "number": row,
            "source": self._source(row),
            **self._text(row, MAX_ROW_LENGTH),
            "verdict": self.queue.labels.get(row),
            "similar": self._similar_rows(row),
        }

    def _similar_rows(self, row: int) -> list[dict[str, Any]]:
        cosines = self._directions @ self._directions[row]
        cosines[row] = -np.inf
        content = []
        for other in np.argsort(-cosines)[: min(SIMILAR_ROWS, len(cosines) - 1)].tolist():
            content.append(
                {
                    "number": other,
                    "source": self._source(other),
                    "cosine": float(cosines[other]),
                    **self._text(other, MAX_TEXT_LENGTH),
                    "verdict": self.queue.labels.get(other),
                }
            )
        return content

    def _text(self, row: int, max_length: int) -> dict[str, Any]:
        rows = self.queue.trace.rows
        tokens, loss_mask = rows.sample(row)
        span = slice(rows.loss_offsets[row], rows.loss_offsets[row + 1])
        rises = self._after[span] - self._before[span]
        prompt, pieces = split_text(self._decoder, tokens, loss_mask, rises, self._special, max_length)
        prompt, cut = last_characters(prompt, max_length)
        return {"prompt": prompt, "cut": cut, "pieces": pieces}
