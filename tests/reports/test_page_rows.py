"""The table of the review page in a real browser: which rows come first, their texts, sorting, and the keyboard."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import hostile_trace, needs_chromium
from playwright.sync_api import expect

from forgetfilter_callback import FilterConfig, FilterResult, Trace, encode_rows
from forgetfilter_callback.data.encoded_rows import EncodedRows
from forgetfilter_callback.reports import review_page
from forgetfilter_callback.reports.review_page import write_review_page
from forgetfilter_callback.review.verdicts import Verdict, append_verdicts
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


pytestmark = needs_chromium
ROWS = 40
SOURCES = ["forum", "books", "Chats"]
BEGIN, END = "<eos>system\nBe brief.<eos>\n<eos>user\n", "<eos>\n<eos>assistant\n"


def question(row: int) -> str:
    """Short in even rows, long in odd ones."""
    return f"Question {row}?" if row % 2 == 0 else f"Begin {row}. " + "word " * 100 + f"Question {row}?"


def trace_of(rows: EncodedRows, folder: Path) -> Trace:
    trace = Trace.create(folder, rows, "/models/models--org--small/snapshots/0123456789abcdef", None, None)
    rises = np.repeat(np.linspace(2, -1, len(rows)), np.diff(rows.loss_offsets)).astype(np.float32)
    for step, losses in ((0, np.ones_like(rises)), (4, 1 + rises)):
        trace.append(Record("safety", step), [Scores(losses)])
    return trace


@pytest.fixture(scope="module")
def written(tmp_path_factory, byte_tokenizer) -> tuple[Path, FilterResult]:
    folder = tmp_path_factory.mktemp("page")
    rows = [{"prompt": f"{BEGIN}{question(row)}{END}", "completion": f"Answer {row}<eos>"} for row in range(ROWS)]
    trace = trace_of(encode_rows(rows, byte_tokenizer, disable_tqdm=True), folder / "trace")
    ids = trace.rows.ids.to_pylist()
    verdicts = [Verdict(row, ids[row], "unsafe" if row % 2 else "safe", "") for row in range(3, 9)]
    append_verdicts(verdicts, trace.folder / "review" / "verdicts.jsonl")
    result = write_review_page(
        trace,
        folder / "review.html",
        byte_tokenizer,
        FilterConfig("loss", threshold=0.5),
        np.arange(ROWS) % 4 == 0,
        [SOURCES[row % 3] for row in range(ROWS)],
    )
    return folder / "review.html", result


@pytest.fixture
def page(browser, written):
    events = []
    opened = browser.new_page()
    for event in ("console", "pageerror", "dialog"):
        opened.on(event, lambda found: events.append(str(found)))
    opened.goto(written[0].as_uri())
    opened.wait_for_selector("#rows tr")
    yield opened
    opened.close()
    assert events == []


def numbers(page) -> list[int]:
    """The rows on all pages of the table, in their order."""
    found = []
    while True:
        found += page.evaluate(
            "[...document.querySelectorAll('#rows tr')].map((tr) => Number(tr.cells[0].textContent))"
        )
        if page.is_disabled("#next"):
            return found
        page.click("#next")


def row_text(page, row: int, part: str) -> str:
    """The text of a part of a row (`.prompt` or `.completion`), with white space as it is."""
    return page.evaluate(
        """([row, part]) => [...document.querySelectorAll('#rows tr')]
            .find((tr) => tr.cells[0].textContent === String(row)).querySelector(part).textContent""",
        [row, part],
    )


def current(page) -> int:
    return int(page.locator("#rows tr.current td").first.inner_text())


def overrides(page, tmp_path: Path) -> dict[str, str]:
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "decision.json")
    return json.loads((tmp_path / "decision.json").read_text())["overrides"]


def test_the_page_begins_with_the_rows_to_look_at(page, written):
    assert page.inner_text("h2 >> nth=0") == "Which rows to look at, and what to do"
    assert page.inner_text("#about") == f"Model org/small, {ROWS} rows."
    values = written[1].values
    order = np.argsort(-values)
    kept = [row for row in order if values[row] <= 0.5]
    page.click("[data-view=below]")
    assert page.get_attribute("[data-view=below]", "aria-pressed") == "true"
    assert page.input_value("#view") == "below" and numbers(page) == kept
    page.click("[data-view=random]")
    drawn = numbers(page)
    assert sorted(drawn) == sorted(kept) and drawn not in (kept, sorted(kept))
    page.click("[data-view=forgotten]")
    assert numbers(page) == order.tolist()


def test_prompts_are_shown_without_the_template_and_from_the_beginning_of_a_word(page):
    assert row_text(page, 0, ".prompt") == question(0)
    shown = row_text(page, 1, ".prompt")
    assert shown.startswith("… word word ") and question(1).endswith(shown.removeprefix("… "))
    assert 250 < len(shown) <= 302
    page.focus("tr:has([aria-label='keep row 1']) .expand")
    page.keyboard.press("Enter")
    assert row_text(page, 1, ".prompt") == f"{BEGIN}{question(1)}{END}"
    assert row_text(page, 0, ".prompt") == question(0)
    expand = page.locator("tr:has([aria-label='keep row 1']) .expand")
    assert expand.get_attribute("aria-expanded") == "true"
    expect(expand).to_be_focused()
    page.keyboard.press("Enter")
    assert row_text(page, 1, ".prompt") == shown


def test_special_tokens_are_dimmed(page):
    page.click("tr:has([aria-label='keep row 0']) .expand")
    row = page.locator("tr:has([aria-label='keep row 0']) .text")
    assert row.locator(".special").all_inner_texts() == ["<eos>"] * 6
    sizes = row.locator(".piece").evaluate_all(
        "all => all.map((each) => [each.className, getComputedStyle(each).fontSize])"
    )
    assert {float(size[:-2]) for name, size in sizes if "special" in name} == {12}
    assert {float(size[:-2]) for name, size in sizes if "special" not in name} == {16}


def test_a_template_is_not_guessed_from_prompts_without_special_tokens(browser, tmp_path, byte_tokenizer):
    rows = [{"prompt": f"Who is {name}? ", "completion": "I"} for name in ("Ann", "Bob")]
    trace = trace_of(encode_rows(rows, byte_tokenizer, disable_tqdm=True), tmp_path / "trace")
    write_review_page(trace, tmp_path / "review.html", byte_tokenizer, FilterConfig("loss", threshold=0.5))
    opened = browser.new_page()
    opened.goto((tmp_path / "review.html").as_uri())
    opened.wait_for_selector("#rows tr")
    assert row_text(opened, 0, ".prompt") == "Who is Ann? " and row_text(opened, 1, ".prompt") == "Who is Bob? "
    assert opened.locator(".expand").count() == 0
    opened.close()


def opened_page(browser, rows: list[dict], tokenizer, folder: Path):
    trace = trace_of(encode_rows(rows, tokenizer, disable_tqdm=True), folder / "trace")
    write_review_page(trace, folder / "review.html", tokenizer, FilterConfig("loss", threshold=0.5))
    opened = browser.new_page()
    opened.goto((folder / "review.html").as_uri())
    opened.wait_for_selector("#rows tr")
    return opened


def test_rows_with_another_template_are_shown_with_it(browser, tmp_path, byte_tokenizer):
    """The template of most rows stays hidden."""
    begins = [BEGIN.replace("brief", "rude") if row == 0 else BEGIN for row in range(5)]
    ends = ["<eos>\n<eos>model\n" if row == 1 else END for row in range(5)]
    rows = [{"prompt": f"{begins[row]}Question {row}?{ends[row]}", "completion": "Yes<eos>"} for row in range(5)]
    opened = opened_page(browser, rows, byte_tokenizer, tmp_path)
    assert row_text(opened, 0, ".prompt") == f"{begins[0]}Question 0?"
    assert row_text(opened, 1, ".prompt") == f"Question 1?{ends[1]}"
    for row in (2, 3, 4):
        assert row_text(opened, row, ".prompt") == f"Question {row}?"
    opened.close()


@pytest.mark.parametrize("words", [200, 900], ids=["cut on the page", "not in the data"])
def test_conversations_without_a_prompt_show_their_end(words, browser, tmp_path, byte_tokenizer):
    """The last answer is there. A text with one special token, at its end, is shown from its beginning."""
    rows = [
        {"text": f"{BEGIN}{'word ' * words}{END}Answer {row}"}
        if row < 3
        else {"text": f"Begin {row} " + "word " * words}
        for row in range(6)
    ]
    opened = opened_page(browser, rows, byte_tokenizer, tmp_path)
    for row in range(3):
        shown = row_text(opened, row, ".completion")
        assert shown.startswith("… word ") and shown.endswith(f"Answer {row}<eos>") and 590 < len(shown) < 610
        assert row_text(opened, row, ".prompt") == ""
        shown = row_text(opened, row + 3, ".completion")
        assert shown.startswith(f"Begin {row + 3} word") and shown.endswith(" …")
    opened.click("tr:has([aria-label='keep row 0']) .expand")
    whole = row_text(opened, 0, ".completion")
    assert whole.startswith("<eos>system" if words == 200 else "[…] ") and whole.endswith("Answer 0<eos>")
    opened.close()


def test_texts_without_spaces_show_their_end(browser, tmp_path, byte_tokenizer):
    rows = [{"text": f"{BEGIN}{'字' * 250}{row}<eos>\n"} for row in range(2)]
    rows += [{"prompt": "字" * 350 + f"{row}? ", "completion": "I"} for row in range(2)]
    opened = opened_page(browser, rows, byte_tokenizer, tmp_path)
    opened.evaluate("data.rows[0].pieces[3] = ['字'.repeat(800), null, false]; showRows();")
    assert row_text(opened, 0, ".completion").count("字") > 500
    assert row_text(opened, 2, ".prompt").count("字") > 250
    opened.close()


def test_a_prompt_that_is_too_long_for_the_page_says_so(browser, tmp_path, byte_tokenizer):
    rows = [{"prompt": f"Begin {row}. " + "word " * 600 + f"End {row}? ", "completion": "I"} for row in range(3)]
    trace = trace_of(encode_rows(rows, byte_tokenizer, disable_tqdm=True), tmp_path / "trace")
    write_review_page(trace, tmp_path / "review.html", byte_tokenizer, FilterConfig("loss", threshold=0.5))
    opened = browser.new_page()
    opened.goto((tmp_path / "review.html").as_uri())
    opened.wait_for_selector("#rows tr")
    assert row_text(opened, 0, ".prompt").startswith("… word word ")
    opened.click("tr:has([aria-label='keep row 0']) .expand")
    text = row_text(opened, 0, ".prompt")
    assert text.startswith("(The beginning of the prompt is not on this page.)word ") and text.endswith("End 0? ")
    opened.close()


@pytest.mark.parametrize(
    "column", ["row", "value", "length", "initial_loss", "unsafe", "sourceName", "verdict", "decision"]
)
def test_every_column_sorts(page, written, column):
    values = written[1].values
    verdict = lambda row: "unsafe" if row % 2 else "safe"  # noqa: E731
    keys = {
        "row": lambda row: row,
        "value": lambda row: values[row],
        "length": lambda row: len(f"Answer {row}"),
        "initial_loss": lambda row: 1.0,
        "unsafe": lambda row: row % 4 == 0,
        "sourceName": lambda row: SOURCES[row % 3].lower(),
        "verdict": lambda row: verdict(row) if 3 <= row < 9 else None,
        "decision": lambda row: "remove" if values[row] > 0.5 else "keep",
    }
    for _ in range(2):
        page.click(f"th button[data-sort={column}]")
        (state,) = page.locator("thead th[aria-sort=ascending], thead th[aria-sort=descending]").evaluate_all(
            "all => all.filter((th) => th.querySelector('[data-sort]')).map((th) => th.ariaSort)"
        )
        listed = [keys[column](row) for row in numbers(page)]
        known = [key for key in listed if key is not None]
        assert known == sorted(known, reverse=state == "descending")
        assert listed[len(known) :] == [None] * (ROWS - len(known))  # rows without a value are the last
        while page.is_enabled("#previous"):
            page.click("#previous")


def test_the_sources_sort(page):
    column = "[...document.querySelectorAll('#sources tr')].map((tr) => tr.cells[0].textContent)"
    page.click("[data-source-sort=name]")
    assert page.evaluate(column) == ["forum", "Chats", "books"]
    page.click("[data-source-sort=name]")
    assert page.evaluate(column) == ["books", "Chats", "forum"]


def test_the_keys_decide_rows_as_in_the_review(page, written, tmp_path):
    ids = written[1].ids.to_pylist()
    order = np.argsort(-written[1].values).tolist()
    page.click("[data-view=forgotten]")
    assert current(page) == order[0]
    page.keyboard.press("s")
    page.keyboard.press("u")
    page.keyboard.press("Space")
    page.keyboard.press("Control+u")
    assert current(page) == order[3]
    assert overrides(page, tmp_path) == {ids[order[0]]: "keep", ids[order[1]]: "remove"}
    assert "2 overrides" in page.inner_text("#progress")
    page.keyboard.press("z")
    assert current(page) == order[1] and overrides(page, tmp_path) == {ids[order[0]]: "keep"}
    page.keyboard.press("z")
    assert current(page) == order[0] and overrides(page, tmp_path) == {}
    assert page.is_disabled("#undo")
    page.click("[data-view=forgotten]")  # the export has scrolled the page
    for _ in range(25):
        page.keyboard.press("Space")
    assert current(page) == order[25] and page.inner_text("#page").startswith("Page 2")
    page.click("#unsafe")
    page.keyboard.press("z")
    assert current(page) == order[25]


@pytest.mark.parametrize("where", [0, 1_000_000], ids=["above the table", "at the end of the page"])
@pytest.mark.parametrize("key", ["s", "u", "Space"])
def test_no_row_is_decided_before_it_is_visible(page, written, tmp_path, where, key):
    """The first press only shows the row."""
    first = np.argsort(-written[1].values)[0]
    page.evaluate(f"scrollTo(0, {where})")
    row = page.locator("#rows tr.current")
    expect(row).not_to_be_in_viewport(ratio=0.5)
    page.keyboard.press(key)
    expect(row).to_be_in_viewport(ratio=0.9)
    assert current(page) == first and page.is_disabled("#undo")
    page.keyboard.press(key)
    assert current(page) != first and page.is_enabled("#undo") == (key != "Space")


def test_the_space_bar_opens_the_explanations(page):
    page.click("[data-view=forgotten]")
    page.focus("summary >> nth=0")
    first = current(page)
    page.keyboard.press("Space")
    assert page.get_attribute("details >> nth=0", "open") is not None and current(page) == first


def test_the_space_bar_does_not_press_a_clicked_button_again(page, written, tmp_path):
    ids = written[1].ids.to_pylist()
    order = np.argsort(-written[1].values).tolist()
    page.click(f"[aria-label='keep row {order[2]}']")
    page.keyboard.press("Space")
    assert current(page) == order[3] and overrides(page, tmp_path) == {ids[order[2]]: "keep"}
    page.focus(f"[aria-label='keep row {order[2]}']")  # with the keyboard, it does
    page.keyboard.press("Space")
    assert overrides(page, tmp_path) == {}


def test_keys_that_are_typed_into_the_search_decide_nothing(page, tmp_path):
    page.focus("#search")
    page.keyboard.type("us z")
    assert page.input_value("#search") == "us z" and overrides(page, tmp_path) == {}


def test_a_row_that_leaves_the_view_makes_room_for_the_next(page, written):
    order = np.argsort(-written[1].values).tolist()
    page.click("[data-view=forgotten]")
    for _ in range(3):
        page.keyboard.press("s")
    page.select_option("#view", "overridden")
    page.click("h1")  # leaves the menu
    assert numbers(page) == order[:3]
    page.click(f"[aria-label='keep row {order[0]}']")  # takes the override back
    assert numbers(page) == order[1:3] and current(page) == order[1]


@pytest.mark.parametrize("width", [1300, 800])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_shaded_texts_are_readable(browser, written, width, scheme):
    """The contrast of a text on the strongest shading is at least 4.5 (WCAG AA), and nothing is wider than the window."""
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened.goto(written[0].as_uri())
    opened.wait_for_selector("#rows tr")
    opened.evaluate(
        "appendPieces(document.querySelector('.completion'),"
        " [['x', 100, false], ['y', -100, false], ['<x>', 100, true], ['<y>', -100, true], ['<z>', null, true]])"
    )
    shades, inks, paper = opened.evaluate(
        """() => {
            const color = (element, name) => getComputedStyle(element)[name].match(/[\\d.]+/g).map(Number);
            const shown = [...document.querySelector('.completion').children].slice(-5);
            const shades = shown.map((each) => color(each, 'backgroundColor'));
            return [shades, shown.map((each) => color(each, 'color')), color(document.body, 'backgroundColor')];
        }"""
    )
    assert len({tuple(shade) for shade in shades}) == 3 and shades[4][3] == 0
    for shade, ink in zip(shades, inks, strict=True):
        assert len(ink) == 3  # without transparency
        behind = shade[3] * np.array(shade[:3]) + (1 - shade[3]) * np.array(paper[:3])
        dark, light = sorted((luminance(np.array(ink)), luminance(behind)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    assert min(shade[3] for shade in shades[:4]) > 0.5
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    opened.close()


def luminance(color: np.ndarray) -> float:
    """Relative luminance of an sRGB color (WCAG 2)."""
    part = color / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_control_characters_are_shown(plain_page):
    texts = " ".join(
        plain_page.evaluate("[...document.querySelectorAll('#rows .completion')].map((e) => e.textContent)")
    )
    assert "U+202E" in texts and "\u202e" not in texts
    assert plain_page.evaluate(
        "[...document.querySelectorAll('#rows .text *')].every((e) => ['SPAN', 'DIV', 'BUTTON'].includes(e.tagName))"
    )


def test_rows_drawn_at_random_are_in_the_table_of_a_large_set(browser, tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(review_page, "MAX_TEXTS", 30)
    trace, _ = hostile_trace(tmp_path / "trace", byte_tokenizer, samples=200)
    result = write_review_page(trace, tmp_path / "review.html", byte_tokenizer, FilterConfig("loss", threshold=0.8))
    opened = browser.new_page()
    opened.goto((tmp_path / "review.html").as_uri())
    opened.wait_for_selector("#rows tr")
    opened.click("[data-view=random]")
    drawn = numbers(opened)
    assert 3 <= len(drawn) <= 10 and (result.values[drawn] <= 0.8).all()
    opened.close()
