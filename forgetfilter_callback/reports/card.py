"""TODO"""

from __future__ import annotations

from ..filtering.result import FilterResult
from ..measures.names import UNITS
from ..trace.trace import Trace
from ..utils.sanitize import sanitize


def dataset_card(result: FilterResult, trace: Trace) -> str:
    """A section for the card of the filtered dataset: what was removed, why, by which model."""
    counts = result.counts
    phi = (
        "nothing is removed but by hand"
        if result.threshold is None
        else f"{result.threshold:.4g} {UNITS[result.measure]}"
    )
    overrides = list(result.overrides.values())
    lines = [
        "## Filtering",
        "",
        f"{counts['removed']:,} of {counts['samples']:,} rows were removed with "
        "[ForgetFilter](https://arxiv.org/abs/2312.12736): a model that had learnt all rows was finetuned on safe examples, "
        "and what it forgot most was taken out. No row was read by a classifier of harm.",
        "",
        "| | |",
        "|---|---|",
        f"| measure | {result.measure} forgetting |",
        f"| φ | {phi} ({result.method}) |",
        f"| record of S1+ | step {result.step} |",
        f"| why | {result.reason} |",
        f"| decided by hand | {overrides.count('keep')} kept, {overrides.count('remove')} removed |",
        f"| without a value, kept | {counts['unknown']:,} |",
        f"| model | {_in_a_cell(trace.manifest['model'])} |",
        f"| fingerprint of the rows | {trace.manifest['fingerprint']} |",
        f"| versions | {', '.join(f'{name} {number}' for name, number in result.versions.items())} |",
        "",
        "Values, φ and the account are in `decision/`, the removed rows in `removed.jsonl`.",
        "",
    ]
    return "\n".join(lines)


def _in_a_cell(text: str) -> str:
    """As code, in which neither markup nor links mean anything."""
    return "`" + sanitize(text).replace("`", "'").replace("|", "\\|") + "`"
