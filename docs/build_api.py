"""Build the API reference from the docstrings with pdoc: `python docs/build_api.py site`."""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

import forgetfilter_callback


# The package itself, and modules whose functions are useful on their own.
MODULES = (
    "forgetfilter_callback",
    "forgetfilter_callback.data.load_rows",
    "forgetfilter_callback.errors",
    "forgetfilter_callback.measures.loss",
    "forgetfilter_callback.measures.pooled",
    "forgetfilter_callback.measures.relative",
    "forgetfilter_callback.measures.rouge",
    "forgetfilter_callback.measures.smoothed",
    "forgetfilter_callback.pipeline.outputs",
    "forgetfilter_callback.filtering.thresholds",
    "forgetfilter_callback.filtering.find_forgotten",
    "forgetfilter_callback.filtering.review_decision",
    "forgetfilter_callback.trace.records",
    "forgetfilter_callback.reports.plot",
    "forgetfilter_callback.reports.review_page",
    "forgetfilter_callback.reports.terminal",
)


def build(folder: Path) -> None:
    """Write the HTML pages into `folder`."""
    # The package imports its public names on first use, but pdoc documents only names that exist already.
    for name in forgetfilter_callback.__all__:
        setattr(forgetfilter_callback, name, getattr(forgetfilter_callback, name))
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*MODULES, output_directory=folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python docs/build_api.py FOLDER")
    build(Path(sys.argv[1]))
