"""A short table for notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from .sanitize_text import sanitize


def html_table(title: str, content: Mapping[str, object]) -> str:
    """A table of two columns with a title. The contents are untrusted: they are escaped."""
    lines = "".join(
        f'<tr><th style="text-align: left">{_text(name)}</th><td style="text-align: left">{_text(value)}</td></tr>'
        for name, value in content.items()
    )
    return f"<div><b>{_text(title)}</b><table>{lines}</table></div>"


def _text(value: object) -> str:
    return escape(sanitize(str(value)))
