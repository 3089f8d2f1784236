"""Builds the API reference from the docstrings, with pdoc: `python docs/build_api.py site`."""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

import forgetfilter_callback


# What is not in the package's own list: TRL's subclass (TRL is optional), and the functions behind the commands and pages.
MODULES = ("", ".sft", ".run", ".forgetting", ".show", ".report")


def build(folder: Path) -> None:
    # The package imports its names when they are first used; pdoc shows those that are there.
    for name in forgetfilter_callback.__all__:
        setattr(forgetfilter_callback, name, getattr(forgetfilter_callback, name))
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*(f"forgetfilter_callback{module}" for module in MODULES), output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
