"""A trace in the terminal: histogram, φ, separability and the most forgotten samples."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..filtering.result import FilterResult
from ..measures.names import UNITS
from ..trace.trace import Trace
from ..utils.sanitize import sanitize
from .summary import page_summary


BINS, WIDTH, LONGEST = 20, 50, 160


def show(
    trace: Trace,
    result: FilterResult,
    console: Console,
    tokenizer: PreTrainedTokenizerBase | None,
    head: int,
) -> None:
    """Prints a decision on a trace.

    Args:
        trace ([`Trace`]):
            With records of S1+.
        result ([`FilterResult`]):
            The decision.
        console ([`rich.console.Console`]):
            Where it goes.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Turns token ids into text; without it the table has none.
        head (`int`):
            How many of the most forgotten samples are shown.
    """
    console.print(Text(page_summary(result), style="bold"))
    console.print(Text(result.reason))
    before, after = trace.first_and_last(result.step)
    console.print(Text(f"Model {sanitize(trace.manifest['model'])}, S1+ step {before.step} to {after.step}."))
    known = result.values[np.isfinite(result.values)]
    phi = result.threshold
    counts, edges = np.histogram(known, BINS)
    console.print(Text(f"\n{result.measure} forgetting [{UNITS[result.measure]}]"))
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * int(np.ceil(WIDTH * count / counts.max()))
        line = Text(f"{left:8.3f}  ")
        line.append(bar, style="red" if phi is not None and left >= phi else "blue")
        line.append(f" {count}" if count else "")
        if phi is not None and left <= phi < right:
            line.append(f"  ← φ = {phi:.3g}", style="bold")
        console.print(line)
    table = Table("row", "forgetting", "tokens", "verdict", "completion", title=f"The {head} most forgotten")
    lengths = np.diff(trace.rows.loss_offsets)
    for index in np.argsort(-np.nan_to_num(result.values, nan=-np.inf))[:head].tolist():
        tokens, loss_mask = trace.rows.sample(index)
        text = "" if tokenizer is None else tokenizer.decode(tokens[loss_mask], skip_special_tokens=True)
        verdict = "removed" if result.removed[index] else "kept"
        table.add_row(
            str(index),
            f"{result.values[index]:.3f}",
            str(lengths[index]),
            Text(verdict, style="red" if result.removed[index] else "blue"),
            Text(sanitize(text[:LONGEST] + ("…" if len(text) > LONGEST else ""))),
        )
    console.print(table)
