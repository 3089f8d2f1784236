"""Section on filtering for the card of a filtered dataset."""

from __future__ import annotations

import re

from ..filtering.result import FilterResult
from ..measures.names import UNITS
from ..trace.trace import Trace
from ..utils.counted import counted_of
from ..utils.paths import short_model_name
from ..utils.sanitize_text import sanitize
from .source_table import source_table


def dataset_card(result: FilterResult, trace: Trace) -> str:
    """Writes a Markdown section for the card of a filtered dataset.

    It says how many rows were removed, at which threshold and why, and which model and trace the result is based on.

    Args:
        result ([`FilterResult`]):
            The filter result.
        trace ([`Trace`]):
            The trace that `result` was computed from.

    Returns:
        `str`: the section, beginning with the heading "Filtering".
    """
    counts = result.counts
    if result.threshold is not None:
        rule = f"above φ = {result.threshold:.4g} {UNITS[result.measure]} ({result.method})"
    elif result.method == "fdr":
        rule = "rows found to be unsafe in a review, and rows selected at the false discovery rate"
    elif result.method == "weights":
        rule = "none: rows are weighted instead"
    elif result.method == "reviewed":
        rule = "rows found to be unsafe in a review"
    else:
        rule = "none, except rows overridden to 'remove'"
    how = "the rows that it forgot most were removed. No harm classifier read the rows."
    if result.method in ("reviewed", "fdr", "weights"):
        how = "a person reviewed rows: those that it forgot most, those similar to unsafe ones, and random ones."
    overrides = list(result.overrides.values())
    lines = [
        "## Filtering",
        "",
        f"{counted_of(counts['removed'], counts['samples'], 'row', 'were')} removed with "
        "[ForgetFilter](https://arxiv.org/abs/2312.12736). A model that had been finetuned on all rows was finetuned "
        f"on safe examples, and {how}",
        "",
        "| | |",
        "|---|---|",
        f"| measure | {result.measure} forgetting |",
        f"| removed rows | {rule} |",
        f"| safety session | step {result.step} |",
        f"| reason | {result.explanation} |",
        f"| decided by a person, identical rows included | {overrides.count('keep')} kept, "
        f"{overrides.count('remove')} removed |",
        f"| estimated errors | {'not known' if result.estimate is None else result.estimate.errors} |",
        f"| kept because forgetting is unknown | {counts['unknown']:,} |",
        f"| model | {_code_cell(short_model_name(trace.manifest['model']))} |",
        f"| fingerprint of the rows | {trace.manifest['fingerprint']} |",
        f"| versions | {', '.join(f'{name} {number}' for name, number in result.versions.items())} |",
        "",
        "`filter_result/` contains the filter result and the forgetting values, `removed.jsonl` the removed rows.",
        "",
    ]
    if result.source_counts is not None:
        head, rows = source_table(result.source_counts)
        lines += ["### By source", "", _table_row(head), "|---|" + "---:|" * (len(head) - 1)]
        lines += [_table_row([_code_cell(source), *numbers]) for source, *numbers in rows]
        lines.append("")
    return "\n".join(lines)


def _table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code_cell(text: str) -> str:
    """Formats untrusted text as code in a table cell, where Markdown and links have no effect."""
    text = sanitize(text).replace("`", "'")
    # Backslashes before "|" are doubled. Otherwise the last one would be escaped, and "|" would end the cell.
    return "`" + re.sub(r"(\\*)\|", r"\1\1\\|", text) + "`"
