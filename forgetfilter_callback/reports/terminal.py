"""Terminal report: histogram, φ, separability and the most forgotten samples."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.decode import Decoder, completion_text
from ..filtering.by_source import SourceCounts
from ..filtering.result import FilterResult
from ..measures.names import MEANINGS, UNITS
from ..trace.trace import Trace
from ..utils.paths import short_model_name
from ..utils.sanitize_text import sanitize
from .source_table import source_table
from .summary import page_summary


BINS = 20
# Characters of the longest bar, and of what is beside it: a value, a count and φ.
BAR_WIDTH, BESIDE_BAR = 50, 34
MAX_COMPLETION_LENGTH = 500  # characters


def show(
    trace: Trace,
    result: FilterResult,
    console: Console,
    tokenizer: Decoder | None,
    head: int,
) -> None:
    """Prints a filter result.

    Args:
        trace ([`Trace`]):
            The trace that `result` was computed from.
        result ([`FilterResult`]):
            The filter result.
        console ([`rich.console.Console`]):
            The console to print to.
        tokenizer ([`tokenizers.Tokenizer`], [`~transformers.PreTrainedTokenizerBase`] or `None`):
            Decodes the completions. If `None`, the completions are left empty.
        head (`int`):
            How many of the most forgotten samples to list.
    """
    console.print(Text(page_summary(result), style="bold"))
    if result.threshold is not None:  # otherwise, the summary contains the reason
        console.print(Text(f"Reason for φ: {result.reason}."))
    before, after = trace.first_and_last(result.step)
    model = sanitize(short_model_name(trace.manifest["model"]))
    console.print(Text(f"Model {model}, safety session, step {before.step} to step {after.step}."), soft_wrap=True)
    known = result.values[np.isfinite(result.values)]
    phi = result.threshold
    counts, edges = np.histogram(known, BINS)
    console.print(Text(f"\n{result.measure} forgetting [{UNITS[result.measure]}]"))
    console.print(Text(MEANINGS[result.measure]))
    width = max(1, min(BAR_WIDTH, console.width - BESIDE_BAR))
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * int(np.ceil(width * count / counts.max()))
        line = Text(f"{left:8.3f}  ")
        line.append(bar, style="red" if phi is not None and left >= phi else "blue")
        line.append(f" {count}" if count else "")
        if phi is not None and left <= phi < right:
            line.append(f"  ← φ = {phi:.3g}", style="bold")
        console.print(line)
    if result.source_counts is not None:
        console.print()
        console.print(_table_by_source(result.source_counts))
    console.print()
    table = Table(title="The most forgotten rows", expand=True)
    for name in ("row", "forgetting", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("decision", no_wrap=True)
    # One line a row, so that the list fits on a screen. The other columns keep their width.
    table.add_column("completion", no_wrap=True, overflow="ellipsis", ratio=1)
    lengths = np.diff(trace.rows.loss_offsets)
    for index in np.argsort(-np.nan_to_num(result.values, nan=-np.inf))[:head].tolist():
        tokens, loss_mask = trace.rows.sample(index)
        text = "" if tokenizer is None else completion_text(tokenizer, tokens, loss_mask)
        decision = "removed" if result.removed[index] else "kept"
        table.add_row(
            str(index),
            f"{result.values[index]:.3f}",
            str(lengths[index]),
            Text(decision, style="red" if result.removed[index] else "blue"),
            Text(" ".join(sanitize(text[:MAX_COMPLETION_LENGTH]).split())),
        )
    console.print(table)


def _table_by_source(counts: list[SourceCounts]) -> Table:
    head, rows = source_table(counts)
    table = Table(title="By source")
    table.add_column(head[0], overflow="fold")
    for name in head[1:]:
        table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for source, *numbers in rows:
        table.add_row(Text(source), *numbers)
    return table
