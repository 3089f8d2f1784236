"""`--source-column`: tables by source of `run`, `filter`, `show` and `report`, against loops over the rows."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from datasets import Dataset
from helpers import call, refused, run_options, texts
from markdown_it import MarkdownIt

from forgetfilter_callback import FilterResult, ReviewQueue, RunConfig, Trace, run


SOURCES = ["forum", "vendor | A", None, 7]


def rows_with_sources() -> list[dict[str, object]]:
    rows = [{**row, "source": SOURCES[index % 4]} for index, row in enumerate(texts(12, seed=1))]
    return [*rows, {**rows[0], "source": "forum"}, {**rows[1], "source": "forum"}]  # duplicates


@pytest.fixture(scope="module")
def with_sources(files, tmp_path_factory) -> dict[str, Path]:
    noisy = tmp_path_factory.mktemp("sources") / "noisy.jsonl"
    noisy.write_text("".join(json.dumps(row) + "\n" for row in rows_with_sources()))
    return {**files, "noisy": noisy}


@pytest.fixture(scope="module")
def run_result(with_sources, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    options = (*run_options(with_sources, output), "--fraction", 0.25, "--source-column", "source", "--json")
    return output, call("run", *options)


def brute_force(rows, removed, seen=(), unsafe=()) -> dict[str, tuple[int, ...]]:
    """Source to its numbers of rows, of seen, unsafe, kept and removed rows."""
    table: dict[str, tuple[int, ...]] = {}
    for number, row in enumerate(rows):
        name = "(none)" if row["source"] is None else str(row["source"])
        one = (1, number in seen, number in unsafe, not removed[number], bool(removed[number]))
        table[name] = tuple(int(a) + b for a, b in zip(one, table.get(name, (0,) * 5), strict=True))
    return table


def of_json(text: str) -> dict[str, tuple[int, ...]]:
    names = ("rows", "seen", "unsafe_found", "kept", "removed")
    return {each["source"]: tuple(each[name] for name in names) for each in json.loads(text)["source_counts"]}


def of_card(file: Path) -> dict[str, list[str]]:
    """The rows of the last table of a card, as a Markdown parser reads it."""
    tokens = MarkdownIt().enable("table").parse(file.read_text(encoding="utf-8").split("### By source")[1])
    cells = [after for before, after in pairwise(tokens) if before.type == "td_open"]
    width = sum(token.type == "th_open" for token in tokens)
    texts_of_cells = [(cell.children[0] if cell.children else cell).content for cell in cells]
    rows = [texts_of_cells[start : start + width] for start in range(0, len(cells), width)]
    return {name: numbers for name, *numbers in rows}


def as_cells(table: dict[str, tuple[int, ...]], is_seen: bool) -> dict[str, list[str]]:
    return {
        name: [str(n) for n in ((rows, seen, unsafe) if is_seen else (rows,)) + (kept, removed)]
        + [f"{100 * removed / rows:.1f}"]
        for name, (rows, seen, unsafe, kept, removed) in table.items()
    }


def test_run_writes_the_table_and_prints_it_as_json(run_result, with_sources):
    output, result = run_result
    assert result.exit_code == 0, result.output
    stored = FilterResult.load(output / "filter_result")
    expected = brute_force(rows_with_sources(), stored.removed)
    assert stored.removed.sum() == 4 and of_json(result.stdout) == expected
    assert of_card(output / "card.md") == as_cells(expected, is_seen=False)


def test_later_commands_use_the_column_of_the_run(run_result, tmp_path):
    output, _ = run_result
    filtered = call("filter", output, "--output", tmp_path / "filtered", "--fraction", 0.5, "--json")
    expected = brute_force(rows_with_sources(), FilterResult.load(tmp_path / "filtered" / "filter_result").removed)
    assert of_json(filtered.stdout) == expected == of_json(call("show", output, "--fraction", 0.5, "--json").stdout)
    assert of_card(tmp_path / "filtered" / "card.md") == as_cells(expected, is_seen=False)
    page = tmp_path / "page.html"
    assert call("report", output, "--fraction", 0.5, "--audit-column", "unsafe", "--output", page).exit_code == 0
    data = json.loads(page.read_text().split('<script id="data" type="application/json">')[1].split("</script>")[0])
    assert dict(zip(data["by_source"]["names"], data["by_source"]["rows"], strict=True)) == {
        name: counts[0] for name, counts in expected.items()
    }
    labeled = dict(zip(data["by_source"]["names"], data["by_source"]["unsafe_labeled"], strict=True))
    assert labeled == {"forum": 1, "vendor | A": 3, "(none)": 0, "7": 3}


def test_verdicts_are_counted_by_source(run_result, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(run_result[0], output)
    verdicts = {0: "safe", 1: "unsafe", 5: "unsafe", 7: "safe", 13: "unsafe"}
    queue = ReviewQueue(Trace.open(output / "_forgetfilter"))
    queue.add(verdicts)
    unsafe = {row for row, label in verdicts.items() if label == "unsafe"}
    for options in (("--fraction", 0.5), ("--reviewed", output / "_forgetfilter" / "review")):
        filtered = call("filter", output, "--output", tmp_path / "filtered", *options, "--json")
        removed = FilterResult.load(tmp_path / "filtered" / "filter_result").removed
        expected = brute_force(rows_with_sources(), removed, {**verdicts, 12: "safe"}, unsafe)  # row 12 equals row 0
        assert of_json(filtered.stdout) == expected
        assert of_card(tmp_path / "filtered" / "card.md") == as_cells(expected, is_seen=True)
    result = FilterResult.load(tmp_path / "filtered" / "filter_result")  # the one by verdicts needs no others
    table = result.by_source([row["source"] for row in rows_with_sources()])
    assert dict(zip(table.index, table["unsafe_found"], strict=True)) == {n: c[2] for n, c in expected.items()}


def test_verdicts_of_another_review_do_not_count(run_result, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(run_result[0], output)
    trace = Trace.open(output / "_forgetfilter")
    ReviewQueue(trace).add({0: "unsafe", 2: "unsafe", 3: "safe"})
    ReviewQueue(trace, tmp_path / "second").add({5: "unsafe", 7: "safe"})
    options = ("--reviewed", tmp_path / "second", "--json")
    filtered = call("filter", output, "--output", tmp_path / "filtered", *options)
    removed = FilterResult.load(tmp_path / "filtered" / "filter_result").removed
    expected = brute_force(rows_with_sources(), removed, {5: "unsafe", 7: "safe"}, {5})
    assert of_json(filtered.stdout) == expected == of_json(call("show", output, *options).stdout)


def shown_table(text: str) -> list[list[str]]:
    lines = text.split("By source")[1].split("most forgotten rows")[0].splitlines()
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines if line.startswith("│")]


def test_show_prints_the_table(run_result):
    output, result = run_result
    shown = call("show", output, "--fraction", 0.25)
    assert shown.exit_code == 0, shown.output
    expected = as_cells(of_json(result.stdout), is_seen=False)
    assert shown_table(shown.output) == [[name, *expected[name]] for name in of_json(result.stdout)]
    assert "By source" not in call("show", output, "--fraction", 0.25, "--json").output


@pytest.mark.parametrize("extension", ["jsonl", "csv", "parquet"])
def test_rows_in_another_order_and_format(extension, run_result, tmp_path):
    """The rows are matched to the trace by their tokens. `filter` writes them in the order of the file."""
    shuffled = [rows_with_sources()[row] for row in (5, 13, 0, 12, 9, 3, 1, 2, 11, 4, 10, 6, 8, 7)]
    noisy = tmp_path / f"noisy.{extension}"
    if extension == "jsonl":
        noisy.write_text("".join(json.dumps(row) + "\n" for row in shuffled))
    else:
        dataset = Dataset.from_list([{**row, "source": str(row["source"] or "")} for row in shuffled])
        (dataset.to_csv if extension == "csv" else dataset.to_parquet)(noisy)
    options = ("--fraction", 0.25, "--noisy", noisy, "--source-column", "source", "--json")
    shown = of_json(call("show", run_result[0], *options).stdout)
    filtered = call("filter", run_result[0], *options, "--output", tmp_path / "filtered")
    removed = FilterResult.load(tmp_path / "filtered" / "filter_result").removed
    expected = brute_force([{**row, "source": row["source"] or None} for row in shuffled], removed)
    # Equal rows are forgotten equally, so it does not matter which of them is which.
    assert shown == of_json(filtered.stdout) == expected


def test_the_column_of_the_run_is_not_read_from_other_files(run_result, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(run_result[0], output)
    trace = Trace.open(output / "_forgetfilter")
    gone, changed = tmp_path / "gone.jsonl", tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps({**row, "source": "x"}) + "\n" for row in rows_with_sources()))
    for source, reason in (
        (gone, f"{gone} does not exist. Pass the rows from where they are now (--noisy)."),
        (changed, f"and {changed} is another file. To read it, pass --source-column source."),
    ):
        trace.set_source(str(source), trace.manifest["source_digest"], 0, "source")
        shown = call("show", output, "--fraction", 0.25)
        assert shown.exit_code == 0 and "By source" not in shown.output
        assert "there is no table by source, because " in shown.stderr and reason in shown.stderr
    asked = call("show", output, "--fraction", 0.25, "--source-column", "source", "--json")
    assert [each["source"] for each in json.loads(asked.stdout)["source_counts"]] == ["x"]
    trace.set_source(str(gone), None, 0)
    refused(call("show", output, "--source-column", "source"), "does not exist. Pass the noisy set from where it is")


def test_a_missing_column_is_reported_before_anything_is_written(run_result, with_sources, files, tmp_path):
    for command in (
        ("run", *run_options(with_sources, tmp_path / "out")),
        ("filter", run_result[0], "--output", tmp_path / "out"),
        ("show", run_result[0]),
        ("report", run_result[0], "--output", tmp_path / "out"),
        ("review", run_result[0], "--no-browser"),
        ("show", run_result[0], "--noisy", files["noisy"]),
    ):
        refused(
            call(*command, "--source-column", "colour"),
            "The rows have no column 'colour', or it is empty in all of them. The first row has the columns prompt, "
            "completion, unsafe, note",
        )
    assert not (tmp_path / "out" / "sessions").exists() and not (tmp_path / "out" / "config.yaml").exists()
    refused(
        call("show", run_result[0], "--source-column", "source", "--noisy", with_sources["safety"]),
        "The rows have no column 'source'",
    )
    with pytest.raises(ValueError, match=r"source_column=3 must be text\."):
        RunConfig("m", "n", "s", "o", source_column=3)


def test_run_in_python_returns_the_counts(with_sources, tmp_path):
    config = RunConfig(
        str(with_sources["model"]), str(with_sources["noisy"]), str(with_sources["safety"]), str(tmp_path / "out"),
        training={"max_steps": 1}, safety_training={"max_steps": 1}, source_column="source",
    )  # fmt: skip
    result = run(config)
    counts = {each.source: (each.rows, 0, 0, each.kept, each.removed) for each in result.source_counts}
    assert counts == brute_force(rows_with_sources(), result.removed)
    assert Trace.open(tmp_path / "out" / "_forgetfilter").manifest["source_column"] == "source"
