"""Hooks of mkdocs: write generated tables and the reference of the command line into the pages.

A page names what it wants in a line of its own: `{{ name }}`, where `name` is a function of `tables.py`, or
`{{ command_line }}`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent))

import typer
from typer.cli import get_docs_for_click

import tables
from forgetfilter_callback.cli.commands import app


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    return re.sub(r"^\{\{ (\w+) \}\}$", generated, markdown, flags=re.MULTILINE)


def generated(marker: re.Match[str]) -> str:
    return command_line() if marker[1] == "command_line" else getattr(tables, marker[1])()


def command_line() -> str:
    """The usage and the options of all commands, as Typer writes them."""
    group = typer.main.get_command(app)
    text = get_docs_for_click(obj=group, ctx=typer.Context(group), name="forgetfilter")
    commands = text[text.index("\n## ") :]
    commands = commands.replace("$ forgetfilter", "forgetfilter").replace("{TRACE}", "TRACE")
    return re.sub(r"\[default: \((.*?)\)", r"[default: \1", commands)
