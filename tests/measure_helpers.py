"""Measures of forgetting as loops in plain Python. Each argument has one array per sample."""

from __future__ import annotations

import math

import numpy as np


def fraction_lost(rise: float) -> float:
    return 1 - math.exp(-rise) if rise > 0 else math.exp(rise) - 1


def rises_of_others(tokens, before, after, sample: int, token: int) -> list[float]:
    """How much the losses of a token rise in all other samples."""
    return [
        float(after[j][k]) - float(before[j][k])
        for j in range(len(tokens))
        for k in range(len(tokens[j]))
        if j != sample and tokens[j][k] == token
    ]


def pooled_reference(tokens, before, after) -> list[float]:
    """In nats; NaN for samples without tokens."""
    values = []
    for i, own in enumerate(tokens):
        others = [rises_of_others(tokens, before, after, i, token) for token in own]
        largest = sorted((sum(rises) / (len(rises) + 3) for rises in others), reverse=True)[:3]
        values.append(sum(largest) / len(largest) if largest else math.nan)
    return values


def agreed_reference(tokens, before, after) -> list[float]:
    """In typical changes. No sample may be empty."""
    squares = [
        sum((float(b) - float(a)) ** 2 for a, b in zip(before[i], after[i], strict=True)) / len(own)
        for i, own in enumerate(tokens)
    ]
    place, ordered = 0.98 * (len(squares) - 1), sorted(squares)
    below = math.floor(place)
    limit = ordered[below] + (place - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])
    total = sum(len(own) * min(square, limit) for own, square in zip(tokens, squares, strict=True))
    typical = fraction_lost(max(0.05, math.sqrt(total / sum(map(len, tokens)))))
    values = []
    for i, own in enumerate(tokens):
        agreed = []
        for k, token in enumerate(own):
            lost = fraction_lost(float(after[i][k]) - float(before[i][k]))
            others = [fraction_lost(rise) for rise in rises_of_others(tokens, before, after, i, token)]
            agreed.append(min(lost, (sum(others) + 3 * 0.25 * lost) / (len(others) + 3)))
        agreed.sort(reverse=True)
        values.append(float(np.mean(agreed[: math.ceil(len(agreed) / 10)])) / typical)
    return values


def ridge_strengths(samples: int, size: int) -> np.ndarray:
    """The strengths that smoothing tries, for states of shape `(samples, size)`."""
    return np.logspace(-4, 4, 33) * samples / min(samples, size)
