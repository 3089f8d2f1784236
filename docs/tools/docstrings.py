"""Griffe extension: make Markdown of docstrings in the Hugging Face style.

Griffe reads Google's style, which has no types such as "`np.ndarray` of shape `(samples,)`, *optional*".
"""

from __future__ import annotations

import re
from typing import Any

import griffe

import forgetfilter_callback


TITLES = {"Args": "Arguments"}
ENTRY = re.compile(r"^    (\w+(?:, \w+)*)(?: \((.*)\))?:(.*)$")  # `name (type):` or `Error: when`
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites each docstring before it is rendered."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(docstring: str) -> str:
    """Sections as lists, and references as links to the pages of the reference."""
    lines, section = [], None
    for line in docstring.splitlines():
        title = re.fullmatch(r"(Args|Attributes|Returns|Example|.*[Rr]aises):", line)
        if title:
            section = title[1]
            lines += [f"**{TITLES.get(section, section)}**", ""]
        elif section is None or section == "Example":
            lines.append(line)
        elif line and not line.startswith(" "):
            section = None
            lines += ["", line]
        else:
            lines.append(item(line) if section != "Returns" else line.removeprefix("    "))
    return REFERENCE.sub(link, "\n".join(lines))


def item(line: str) -> str:
    """One line of a section with named entries."""
    entry = ENTRY.match(line)
    if entry is None:
        return line  # the text of an entry is indented by more than its list item
    names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
    kind = f" ({entry[2]})" if entry[2] else ""
    return f"- **{names}**{kind}:{entry[3]}"


def link(reference: re.Match[str]) -> str:
    """A link to a public name; the name alone if it has no entry in the reference."""
    name = reference[1].rpartition(".")[2]
    if reference[1] in forgetfilter_callback.__all__:
        return f"[`{name}`][forgetfilter_callback.{name}]"
    return f"`{name}`"
