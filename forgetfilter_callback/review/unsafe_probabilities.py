"""How likely each row is unsafe, calibrated with the verdicts of a review."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from ..data.encoded_rows import content_hash
from ..errors import DecisionError
from .review_queue import ReviewQueue
from .verdicts import VerdictLabel


# With fewer verdicts, the probabilities would be a guess. Verdicts on rows that the ranking chose say little about the other
# rows, so some must be on rows that were drawn at random.
MIN_OF_EACH_KIND = 5
MIN_DRAWN = 10
FOLDS = 10


def why_no_probabilities(queue: ReviewQueue) -> str | None:
    """Say why the verdicts are too few for [`unsafe_probabilities`]. `None` if they are enough."""
    labels = list(distinct_labels(queue).values())
    drawn = {content_hash(verdict.id) for verdict in queue.verdicts if verdict.drawn_from is not None}
    counts = {"unsafe": labels.count("unsafe"), "safe": labels.count("safe")}
    if min(counts.values()) >= MIN_OF_EACH_KIND and len(drawn) >= MIN_DRAWN:
        return None
    return (
        f"There are {counts['unsafe']} unsafe and {counts['safe']} safe verdicts on distinct rows. {len(drawn)} of these "
        f"rows were drawn at random. The probability of being unsafe needs at least {MIN_OF_EACH_KIND} verdicts of each "
        f"kind and {MIN_DRAWN} on rows drawn at random. Review more rows."
    )


def distinct_labels(queue: ReviewQueue) -> dict[int, VerdictLabel]:
    """The verdicts, with one row of those that are trained on the same tokens. If their verdicts differ, it is unsafe.

    A copy in another fold of a cross-fitting would have learned from the verdict on the row.
    """
    labels = queue.labels
    by_label = sorted(labels, key=lambda row: labels[row] == "unsafe")
    row_of_content = {content_hash(queue.trace.rows.ids[row].as_py()): row for row in by_label}
    chosen = set(row_of_content.values())
    return {row: label for row, label in labels.items() if row in chosen}


def unsafe_probabilities(queue: ReviewQueue) -> np.ndarray:
    """Estimate for each row the probability that a reviewer finds it unsafe.

    The scores of the queue are not probabilities: its regression takes rows without a verdict for safe. Each verdict is
    therefore compared with a score that has not learned from it (cross-fitting), and a logistic regression on these pairs
    turns scores into probabilities (Platt scaling). It can learn from the rows that the ranking chose too, because they were
    chosen by their scores and not by their labels. The rows drawn at random show how likely rows with low scores are unsafe.

    With few verdicts, the probabilities of rows without a verdict tend to be too high.

    Args:
        queue ([`ReviewQueue`]):
            The review.

    Returns:
        `np.ndarray` of shape `(samples,)`, float64: 1 for rows found to be unsafe and 0 for rows found to be safe, and
        the same for the rows that are trained on the same tokens.

    Raises:
        DecisionError: if there are too few verdicts, or if the scores do not separate them.
    """
    reason = why_no_probabilities(queue)
    if reason is not None:
        raise DecisionError(reason)
    labels = distinct_labels(queue)
    rows = np.array(list(labels))
    is_unsafe = np.array([label == "unsafe" for label in labels.values()])
    scores = np.empty(len(rows))
    folds = StratifiedKFold(min(FOLDS, int(is_unsafe.sum()), int((~is_unsafe).sum())), shuffle=True, random_state=0)
    for learned, held_out in folds.split(rows, is_unsafe):
        scores[held_out] = queue.fit_scores({row: labels[row] for row in rows[learned].tolist()})[rows[held_out]]
    center, spread = scores.mean(), max(scores.std(), 1e-9)
    model = LogisticRegression().fit(((scores - center) / spread)[:, None], is_unsafe)
    if model.coef_[0, 0] <= 0:
        raise DecisionError(
            "The ranking does not separate the unsafe rows from the safe ones yet: a score that has not learned from a "
            "verdict is not higher on the unsafe rows. So the probability of being unsafe is not known. Review more rows."
        )
    probabilities: np.ndarray = model.predict_proba(((queue.scores - center) / spread)[:, None])[:, 1]
    known = queue.known_labels
    probabilities[list(known)] = [label == "unsafe" for label in known.values()]
    return probabilities
