"""The table by source in the terminal and in the card: hostile names stay data, and hundreds of sources stay short."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from helpers import HOSTILE, hostile_trace
from markdown_it import MarkdownIt
from rich.console import Console

from forgetfilter_callback import FilterConfig, FilterResult, Trace, find_forgotten
from forgetfilter_callback.filtering.by_source import count_by_source
from forgetfilter_callback.reports.dataset_card import dataset_card
from forgetfilter_callback.reports.terminal import show


NAMES = [
    *HOSTILE, "[bold red]x[/bold red]", "[link=https://example.org]y[/link]", "a|b", r"a\|b", r"a\\|b",
    "`code`", "a\nb\r\nc",
    "# Approved", "| x | 1 | 2 |", "![i](https://example.org)", "\x9b31m", "\ud800", "  padded  ", "漢字" * 30,
]  # fmt: skip


@pytest.fixture(scope="module")
def trace(tmp_path_factory, byte_tokenizer) -> Trace:
    return hostile_trace(tmp_path_factory.mktemp("trace") / "trace", byte_tokenizer, samples=200)[0]


def with_sources(trace: Trace, names: list[str]) -> FilterResult:
    result = find_forgotten(trace, FilterConfig("loss"))
    sources = [names[row % len(names)] for row in range(len(result.ids))]
    return replace(result, source_counts=count_by_source(result, sources))


def cells_of(row: str) -> list[str]:
    """The cells of a Markdown row by the rule of GitHub: a backslash escapes the character after it, also a backslash."""
    return [cell.strip() for cell in re.findall(r"((?:\\.|[^\\|])*)\|", row.removeprefix("|"))]


def printed(trace: Trace, result: FilterResult, width: int) -> str:
    stream = io.StringIO()
    show(trace, result, Console(file=stream, width=width, force_terminal=True, color_system=None), None, 0)
    return stream.getvalue()


def test_hostile_names_stay_in_their_cells_of_the_card(trace):
    result = with_sources(trace, NAMES[:18])
    for result in (with_sources(trace, NAMES[:18]), with_sources(trace, NAMES[18:])):
        section = dataset_card(result, trace).split("### By source\n\n")[1]
        rows = [cells_of(line) for line in section.strip().split("\n")[2:]]
        assert [len(row) for row in rows] == [5] * len(result.source_counts)
        assert [int(row[1]) for row in rows] == [each.rows for each in result.source_counts]
        tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(section)
        inline = [child.type for token in tokens for child in token.children or []]
        assert set(inline) == {"text", "code_inline"} and inline.count("code_inline") == len(rows)
        assert {token.type for token in tokens} <= {
            f"{name}_{end}" for name in ("table", "thead", "tbody", "tr", "th", "td") for end in ("open", "close")
        } | {"inline"}


@pytest.mark.parametrize("width", [80, 120])
def test_hostile_names_are_text_in_the_terminal(trace, width):
    for names in (NAMES[:18], NAMES[18:]):
        text = printed(trace, with_sources(trace, names), width)
        assert not {"\x1b", "\x9b", "\x07", "\x00", "\r", "\u202e", "\u2066"} & set(text)
        assert max(map(len, text.splitlines())) <= width
    assert "[bold red]x[/bold red]" in printed(trace, with_sources(trace, NAMES[:18]), 120)


def test_hundreds_of_sources_are_summed_up(trace):
    result = with_sources(trace, [f"source {number}" for number in range(150)])
    removed = int(result.removed.sum())
    listed = sum(each.removed for each in result.source_counts[:20])
    card = [cells_of(line) for line in dataset_card(result, trace).strip().split("\n")[-21:]]
    assert card[-1] == ["`130 more sources`", *_numbers(result, 20)]
    assert sum(int(row[3]) for row in card) == removed and sum(int(row[1]) for row in card) == 200
    (line,) = [line for line in printed(trace, result, 100).split("\n") if "130 more sources" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["130 more sources", *_numbers(result, 20)]
    assert int(card[-1][3]) == removed - listed > 0


def _numbers(result: FilterResult, start: int) -> list[str]:
    rows = sum(each.rows for each in result.source_counts[start:])
    removed = sum(each.removed for each in result.source_counts[start:])
    return [str(rows), str(rows - removed), str(removed), f"{100 * removed / rows:.1f}"]


def test_results_without_sources_have_no_table(trace):
    result = find_forgotten(trace, FilterConfig("loss"))
    assert "By source" not in dataset_card(result, trace) and "By source" not in printed(trace, result, 80)
    assert np.isfinite(result.values).all()
