"""`detect_session` tells noisy from safety finetuning by the rows of a run. An oracle compares tokens and labels."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from forgetfilter_callback import encode_rows
from forgetfilter_callback.callbacks.sessions import DetectedSession, detect_session
from forgetfilter_callback.errors import TraceError


def row(number: int, masked: int = 0) -> dict[str, list[int]]:
    """A row that no other number gives; its first `masked` labels are -100."""
    tokens = [5 + number, 6, 7 + number, 8]
    return {"input_ids": tokens, "labels": [-100] * masked + tokens[masked:]}


def rows(*numbers: int, masked: int = 0) -> list[dict[str, list[int]]]:
    return [row(number, masked) for number in numbers]


def detect(requested: str, training: list[dict] | None, noisy: list[dict]) -> DetectedSession | None:
    """The result of `detect_session`; `None` if it raises a TraceError."""
    encoded = None if training is None else encode_rows(training, disable_tqdm=True)
    try:
        return detect_session(requested, encoded, encode_rows(noisy, disable_tqdm=True))
    except TraceError as error:
        assert "texts of the noisy set, but with a loss on other tokens" in str(error)
        return None


def oracle(requested: str, training: list[dict] | None, noisy: list[dict]) -> DetectedSession | None:
    """The documented rule, applied to lists of tokens and labels."""

    def samples(dataset: list[dict]) -> Counter:
        # The first token is never predicted, so its label makes no difference.
        return Counter((tuple(each["input_ids"]), tuple(each["labels"][1:])) for each in dataset)

    overlap = 0 if training is None else (samples(training) & samples(noisy)).total()
    if requested != "auto":
        return DetectedSession(requested, overlap, certain=True)
    if training is None:
        return DetectedSession("safety", 0, certain=False)
    if samples(training) == samples(noisy):
        return DetectedSession("noisy", overlap, certain=True)
    if 2 * overlap >= len(noisy):
        copies = sum(count for sample, count in samples(training).items() if sample in samples(noisy))
        return DetectedSession("noisy" if 2 * copies > len(training) else "safety", overlap, certain=False)
    training_texts = [each["input_ids"] for each in training]
    if 2 * sum(each["input_ids"] in training_texts for each in noisy) >= len(noisy):
        return None
    return DetectedSession("safety", overlap, certain=False)


NOISY = rows(*range(16))
OTHERS = rows(*range(50, 90))
CASES = {
    "the noisy set": (NOISY, DetectedSession("noisy", 16, certain=True)),
    "the noisy set in another order": (NOISY[::-1], DetectedSession("noisy", 16, certain=True)),
    "all rows but one": (NOISY[1:], DetectedSession("noisy", 15, certain=False)),
    "one row more": (NOISY + OTHERS[:1], DetectedSession("noisy", 16, certain=False)),
    "a row twice": (NOISY + NOISY[:1], DetectedSession("noisy", 16, certain=False)),
    "all rows three times": (NOISY * 3, DetectedSession("noisy", 16, certain=False)),
    "all rows twice, and 31 others": (NOISY * 2 + OTHERS[:31], DetectedSession("noisy", 16, certain=False)),
    "all rows twice, and as many others": (NOISY * 2 + OTHERS[:32], DetectedSession("safety", 16, certain=False)),
    "half of the rows": (NOISY[:8], DetectedSession("noisy", 8, certain=False)),
    "less than half of the rows": (NOISY[:7], DetectedSession("safety", 7, certain=False)),
    "half of the rows, and 7 others": (NOISY[:8] + OTHERS[:7], DetectedSession("noisy", 8, certain=False)),
    "half of the rows, and as many others": (NOISY[:8] + OTHERS[:8], DetectedSession("safety", 8, certain=False)),
    "8 anchors in a safety set of 24": (OTHERS[:16] + NOISY[:8], DetectedSession("safety", 8, certain=False)),
    "all rows, and 15 others": (NOISY + OTHERS[:15], DetectedSession("noisy", 16, certain=False)),
    "all rows, and as many others": (NOISY + OTHERS[:16], DetectedSession("safety", 16, certain=False)),
    "one row 16 times": (NOISY[:1] * 16, DetectedSession("safety", 1, certain=False)),
    "other rows": (OTHERS, DetectedSession("safety", 0, certain=False)),
    "rows that cannot be encoded": (None, DetectedSession("safety", 0, certain=False)),
    "the noisy set with another mask": (rows(*range(16), masked=2), None),
    "half of the rows with another mask": (rows(*range(8), masked=2) + OTHERS, None),
    "7 rows with another mask": (rows(*range(7), masked=2), DetectedSession("safety", 0, certain=False)),
    "4 rows, and 4 others with another mask": (NOISY[:4] + rows(4, 5, 6, 7, masked=3), None),
    "8 rows, and 8 others with another mask": (
        NOISY[:8] + rows(*range(8, 16), masked=2), DetectedSession("safety", 8, certain=False)
    ),
    "a mask of the first token only": (rows(*range(16), masked=1), DetectedSession("noisy", 16, certain=True)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_rule(case):
    training, expected = CASES[case]
    assert detect("auto", training, NOISY) == expected == oracle("auto", training, NOISY)


@pytest.mark.parametrize("requested", ["noisy", "safety"])
@pytest.mark.parametrize("case", CASES)
def test_a_requested_session_overrides_the_rule(case, requested):
    training, _ = CASES[case]
    detected = detect(requested, training, NOISY)
    assert detected == oracle(requested, training, NOISY)
    assert (detected.session, detected.certain) == (requested, True)


def test_random_rows_agree_with_the_oracle():
    rng = np.random.default_rng(0)
    pool = [row(number, masked) for number in range(6) for masked in (0, 0, 0, 2)]
    seen = Counter()
    for _ in range(300):
        noisy, training = ([pool[i] for i in rng.integers(0, len(pool), rng.integers(1, 12))] for _ in range(2))
        if rng.random() < 0.2:
            training = [noisy[i] for i in rng.permutation(len(noisy))]
        expected = oracle("auto", training, noisy)
        assert detect("auto", training, noisy) == expected
        seen[expected if expected is None else (expected.session, expected.certain)] += 1
    assert len(seen) == 4 and min(seen.values()) > 10, seen


def long_row(number: int) -> dict[str, list[int]]:
    """A row of 12 tokens. All rows begin and end with the same tokens."""
    tokens = [5, 10 + number, *range(40, 48), 60 + number, 6]
    return {"input_ids": tokens, "labels": [-100, *tokens[1:]]}


@pytest.mark.parametrize("keep_end", [False, True])
@pytest.mark.parametrize(("noisy_length", "training_length"), [(12, 6), (6, 12), (8, 4), (None, 6)])
def test_rows_of_sessions_with_another_max_length_are_found(noisy_length, training_length, keep_end):
    noisy = encode_rows(list(map(long_row, range(16))), max_length=noisy_length, keep_end=keep_end, disable_tqdm=True)
    length = min(each for each in (noisy_length, training_length) if each is not None)
    for numbers, session, overlap in (
        (range(16), "noisy", 16),
        (range(12, 30), "safety", 4),
        (range(16, 30), "safety", 0),
    ):
        trained = [long_row(number) for number in numbers]
        training = encode_rows(trained, max_length=length, keep_end=keep_end, disable_tqdm=True)
        detected = detect_session("auto", training, noisy, keep_end)
        assert (detected.session, detected.overlap) == (session, overlap)
