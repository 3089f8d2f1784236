"""Texts of strangers in a terminal or a card."""

from __future__ import annotations


def sanitize(text: str) -> str:
    """A text without what a terminal would obey: escape sequences and other control characters."""
    return "".join(character if character.isprintable() else " " for character in text)
