"""Read the results of the benchmarks and format Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
Row = dict[str, Any]


@cache
def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: Iterable[str], rows: Iterable[Iterable[str]], texts: int = 1) -> str:
    """A table whose first `texts` columns are text; the others are figures, which are aligned on the right."""
    names = list(header)
    lines = [names, [*["---"] * texts, *["---:"] * (len(names) - texts)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def decimal(value: float | None, digits: int = 3) -> str:
    """A number without its leading zero, as in `.967`."""
    if value is None:
        return "–"
    text = str(Decimal(str(value)).quantize(Decimal(10) ** -digits, ROUND_HALF_UP))
    return text.removeprefix("0") if digits else text


def find(rows: list[Row], key: str, **wanted: Any) -> Any:
    matching = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return matching[0][key] if matching else None
