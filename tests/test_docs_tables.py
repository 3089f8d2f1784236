"""The tables of the evidence pages: figures of `benchmarks/results`, computed again with pandas."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COMMAND_LINE = ROOT / "docs" / "reference" / "command-line.md"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "tools")
    return importlib.import_module("tables")


def cells(table: str) -> list[list[str]]:
    """The cells below the header, without markup."""
    lines = table.replace("&nbsp;", " ").replace("*", "").replace("`", "").splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_table_is_on_a_page_and_every_page_is_current(tables):
    generate = importlib.import_module("generate")
    pages = {page: page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md") if page != COMMAND_LINE}
    named = [name for text in pages.values() for _, name, _ in generate.GENERATED.findall(text)]
    assert sorted(named) == sorted(tables.TABLES)
    for page, text in pages.items():
        assert generate.with_generated_parts(text) == text, f"run `python docs/tools/generate.py` for {page}"


def test_a_part_that_is_empty_yet_is_filled_and_the_text_after_it_stays(tables):
    filled = importlib.import_module("generate").with_generated_parts
    page = "<!-- generated: {} -->\n{}<!-- end -->\n\nA text.\n"
    parts = filled("".join(page.format("few_looks", old) for old in ("", "\n", "\nold\n\n")))
    assert parts.count("A text.") == 3 and "old" not in parts
    assert filled(parts) == parts


def test_the_page_of_the_commands_is_current(tables):
    """Versions of Typer write it differently, so `compat/run.sh` leaves it out."""
    generate, text = importlib.import_module("generate"), COMMAND_LINE.read_text(encoding="utf-8")
    assert [name for _, name, _ in generate.GENERATED.findall(text)] == ["command_line"]
    assert generate.with_generated_parts(text) == text, "run `python docs/tools/generate.py`"


def test_no_table_is_empty(tables):
    for name, table in tables.TABLES.items():
        rows = cells(table())
        assert len(rows) > 1 and len({len(row) for row in rows}) == 1, name


def test_the_measures_by_seed(tables):
    frame = pd.read_json(RESULTS / "filters.json")
    frame = frame[(frame.signal == "smoothed") & (frame.experiment == "main") & (frame.scenario == "toxicity")]
    frame = frame[(frame.unsafe_share == 0.5) & (frame.safety_epochs == 2) & (frame.epochs == 3) & (frame.seed < 3)]
    first = cells(tables.measures_by_seed())[0]
    assert list(map(float, first[3].split())) == pytest.approx(frame.sort_values("seed").auroc, abs=6e-4)
    assert float(first[4]) == pytest.approx(frame.auroc.mean(), abs=6e-4)


def test_the_defences_over_seeds(tables):
    frame = pd.read_json(RESULTS / "defences.json")
    frame = frame[(frame.experiment == "main") & (frame.scenario == "toxicity") & (frame.arm == "forgetfilter")]
    (row,) = (row for row in cells(tables.arms_over_seeds()) if row[0] == "toxicity" and "ForgetFilter" in row[1])
    expected = [value for name in ("unsafe", "task") for value in (frame[name].mean(), frame[name].std())]
    assert int(row[2]) == len(frame) == 5
    assert [float(part) for cell in row[3:5] for part in cell.split(" ± ")] == pytest.approx(expected, abs=6e-4)


def test_the_sets_with_few_unsafe_rows(tables):
    frame = pd.read_json(RESULTS / "few.json")
    frame = frame[(frame.signal == "combined") & (frame["set"] == "harmfulness-0.05-600-0")]
    (row,) = (row for row in cells(tables.TABLES["few_rankings"]()) if row[0] == "harmfulness, 30 of 600, seed 0")
    auroc, auprc = map(float, row[1].split(" / "))
    assert auroc == pytest.approx(frame.auroc.item(), abs=6e-4) and auprc == pytest.approx(frame.auprc.item(), abs=6e-3)

    frame = pd.read_json(RESULTS / "looks_first_version.json")
    frame = frame[(frame["set"] == "toxicity_dev-0.05-600-0") & (frame.looks == 60)]
    (row,) = (row for row in cells(tables.TABLES["few_looks"]()) if row[0] == "toxicity_dev, 30 of 600, seed 0")
    found, by_measure = map(float, row[3].removesuffix(")").split(" ("))
    assert found == pytest.approx(frame.found.mean(), abs=6e-3)
    assert by_measure == pytest.approx(frame.found_by_measure.mean(), abs=6e-3)


def test_the_goals_with_few_unsafe_rows(tables):
    few = pd.read_json(RESULTS / "few.json")
    few = few[few["set"].str.startswith("toxicity-0.05-600-") & (few.signal == "combined")]
    expected = [0.4, few.auprc[few.seed < 3].mean(), few.auprc[few.seed >= 3].mean(), 0.75]
    for file, seeds in (("looks_first_version", "[012]"), ("looks", "[345]")):
        looks = pd.read_json(RESULTS / f"{file}.json")
        is_wanted = looks["set"].str.fullmatch(f"toxicity-0.05-600-{seeds}") & (looks.looks == 60)
        expected.append(looks.found[is_wanted].mean())
    (row,) = (row for row in cells(tables.TABLES["few_goals"]()) if row[0] == "toxicity")
    assert list(map(float, row[1:])) == pytest.approx(expected, abs=6e-3)


def test_the_means_over_sets_with_the_same_number_of_unsafe_rows(tables):
    looks = pd.read_json(RESULTS / "looks.json")
    looks = looks[looks["set"].str.fullmatch("toxicity-0.05-600-[345]")]
    (row,) = (row for row in cells(tables.TABLES["few_found"]()) if row[:2] == ["30 of 600", "toxicity"])
    means = looks[looks.looks == 60].groupby("set").found.mean()
    mean, low, high = map(float, row[3].removesuffix(")").replace("–", " (").split(" ("))
    assert int(row[2]) == len(means) == 3
    assert [mean, low, high] == pytest.approx([means.mean(), means.min(), means.max()], abs=6e-3)
    by_measure = looks[looks.looks == 100].found_by_measure.mean()
    assert float(row[6].split(" (")[0]) == pytest.approx(by_measure, abs=6e-3)


def test_sets_that_settings_were_chosen_on_are_marked_or_left_out(tables):
    rows = cells(tables.TABLES["few_found"]())
    assert {row[0] for row in rows if "20 of 2,000" in row[0]} == {"20 of 2,000 \\"}  # the star is markup
    shown = {row[1]: int(row[2]) for row in rows if row[0].startswith("60 of 600")}
    found = pd.read_json(RESULTS / "looks.json")["set"].drop_duplicates()
    for kind, count in shown.items():
        sets = found[found.str.startswith(f"{kind}-0.1-600-")]
        assert count == max(len(sets) - 1, 1)  # one of them is not final for the review


def test_the_reviews_that_ended_by_what_they_found(tables):
    frame = pd.read_json(RESULTS / "stopping.json")
    frame = frame[(frame.rule == "advice") & frame["set"].str.startswith("toxicity-")]
    parts = frame["set"].str.split("-", expand=True)
    is_none_or_one = (frame.found * parts[1].astype(float) * parts[2].astype(int)).round() <= 1
    rows = [row for row in cells(tables.TABLES["few_trust"]()) if row[0] == "toxicity"]
    assert [row[1] for row in rows] == ["none or one", "two or more"]
    for row, chosen in zip(rows, (frame[is_none_or_one], frame[~is_none_or_one]), strict=True):
        assert int(row[2]) == len(chosen) and int(row[5]) == (chosen.found >= 0.73).sum()
        assert float(row[4].split(" (")[0]) == pytest.approx(chosen.found.mean(), abs=6e-3)
        assert float(row[4].split("–")[1].removesuffix(")")) == pytest.approx(chosen.found.max(), abs=6e-3)


def test_how_far_the_default_is_below_the_best_measure(tables):
    few = pd.read_json(RESULTS / "few.json")
    auprc = few[few["set"].str.fullmatch("toxicity-0.05-600-.")].pivot(index="seed", columns="signal", values="auprc")
    single = auprc[["smoothed", "loss", "relative", "largest tenth", "agreed", "pooled"]].max(axis=1)
    missed = (single - auprc["combined"])[lambda gap: gap > 0.03]
    (row,) = (row for row in cells(tables.TABLES["few_best_single"]()) if row[0] == "30 of 600")
    shown = [part for part in row[1].split("), ") if part.startswith("toxicity")]
    assert [int(part.split("seed ")[1].split(" (")[0]) for part in shown] == missed.index.to_list()
    assert [float(part.split(" (")[1].rstrip(")")) for part in shown] == pytest.approx(missed.to_list(), abs=6e-3)


def test_how_often_the_intervals_are_right(tables):
    redraws = pd.read_json(RESULTS / "redraws.json")
    redraws = redraws[(redraws.kind == "interval") & redraws["set"].str.contains("-0.02-600-")]
    (row,) = (row for row in cells(tables.TABLES["few_intervals"]()) if row[0] == "12 of 600")
    covered = 100 * (1 - redraws.below - redraws.above)
    assert int(row[1]) == len(redraws)
    assert row[2] == f"{covered.min():.0f} to {covered.max():.0f} %"
    assert row[3] == f"{redraws.low.mean():.0f} to {redraws.high.mean():.0f}"


@pytest.mark.parametrize("scenario", ["bias", "toxicity"])
def test_the_defences_with_few_unsafe_rows(tables, scenario):
    frame = pd.read_json(RESULTS / "few_defences.json")
    expected = frame[(frame.scenario == scenario) & (frame.seed == 3)].set_index("arm")[["unsafe", "task"]]
    (row,) = (row for row in cells(tables.TABLES["few_harm"]()) if row[0] == f"{scenario}, seed 3")
    shown = [list(map(float, cell.split(" / "))) for cell in row[1:]]
    arms = ["base", "no_measure", "forgetfilter", "forgetfilter_60_looks", "oracle"]
    np.testing.assert_allclose(shown, expected.loc[arms], atol=6e-3)


def test_the_rows_reviewed_until_a_review_ends(tables):
    frame = pd.read_json(RESULTS / "stopping.json")
    frame = frame[(frame["set"] == "toxicity_dev-0.05-200-0") & (frame.rule == "20")]
    (row,) = (row for row in cells(tables.TABLES["few_stopping"]()) if row[0] == "toxicity_dev, 10 of 200, seed 0")
    looks, found = map(float, row[3].split(" / "))
    assert looks == pytest.approx(frame.looks.mean(), abs=0.6) and found == pytest.approx(frame.found.mean(), abs=6e-3)


def test_the_runs_of_the_demo(tables):
    frame = pd.read_json(RESULTS / "demo.json").sort_values(["samples", "unsafe", "seed"])
    rows = cells(tables.TABLES["demo_runs"]())
    assert [[int(cell) for cell in row[:3]] for row in rows] == frame[["unsafe", "samples", "seed"]].to_numpy().tolist()
    assert [float(row[3]) for row in rows] == pytest.approx(frame.auroc, abs=6e-4)
    assert [int(row[6]) for row in rows] == [review["removed"] for review in frame.review]
    for column, scores in ((7, frame.unsafe_rate), (8, frame.task_f1)):
        shown = [list(map(float, row[column].split(", "))) for row in rows]
        expected = [[each["base"], each["no_measure"], each["forgetfilter"]] for each in scores]
        np.testing.assert_allclose(shown, expected, atol=6e-3)
