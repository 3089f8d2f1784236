"""Counts in messages."""

from __future__ import annotations


_SINGULAR = {"are": "is", "do": "does", "exceed": "exceeds", "have": "has", "were": "was"}


def counted(count: int, noun: str) -> str:
    """Return `count` with `noun` in the singular or, with an "s", in the plural: "1 row", "2,000 rows"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def counted_of(count: int, total: int, noun: str, verb: str) -> str:
    """Return a share with its verb, which is given in the plural: "1 of 12 rows has", "2 of 12 rows have"."""
    return f"{count:,} of {counted(total, noun)} {_SINGULAR[verb] if count == 1 else verb}"
