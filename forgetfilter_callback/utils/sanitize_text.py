"""Sanitize untrusted text for terminals and Markdown."""

from __future__ import annotations


def sanitize(text: str) -> str:
    """Replace control characters, including those that start terminal escape sequences, with spaces."""
    return "".join(character if character.isprintable() else " " for character in text)
