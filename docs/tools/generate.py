"""Write the tables of figures and the options of all commands into the pages: `python docs/tools/generate.py`.

The text between `<!-- generated: name -->` and `<!-- end -->` is replaced by the table `name` of `tables.py`, or by
[`command_line`].
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

import typer
from typer.cli import get_docs_for_click

import tables
from forgetfilter_callback.cli.commands import app


DOCS = Path(__file__).parents[1]
GENERATED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_generated_parts(page: str) -> str:
    """A page with its generated parts written again."""
    return GENERATED.sub(lambda part: f"{part[1]}\n{generated(part[2])}\n\n{part[3]}", page)


def generated(name: str) -> str:
    return command_line() if name == "command_line" else tables.TABLES[name]()


def command_line() -> str:
    """The usage and the options of all commands, as Typer writes them."""
    group = typer.main.get_command(app)
    text = get_docs_for_click(obj=group, ctx=typer.Context(group), name="forgetfilter")
    commands = text[text.index("\n## ") :].strip()
    commands = commands.replace("```console\n$ forgetfilter", "```text\nforgetfilter").replace("{TRACE}", "TRACE")
    return re.sub(r"\[default: \((.*?)\)", r"[default: \1", commands)


if __name__ == "__main__":
    for file in DOCS.rglob("*.md"):
        file.write_text(with_generated_parts(file.read_text(encoding="utf-8")), encoding="utf-8")
