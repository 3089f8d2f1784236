"""Counts in messages."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Return `count` with `noun` in the singular or, with an "s", in the plural: "1 row", "2,000 rows"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
