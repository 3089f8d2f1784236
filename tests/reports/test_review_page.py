"""The review page in a real browser: its contents, the exported decision, and that sample texts are never executed."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from helpers import HOSTILE, hostile_trace, needs_chromium
from playwright.sync_api import expect
from sklearn.metrics import precision_score, recall_score

from forgetfilter_callback import FilterConfig, FilterResult, ReviewQueue, Trace, find_forgotten
from forgetfilter_callback.errors import DecisionError
from forgetfilter_callback.measures.common import mean_losses
from forgetfilter_callback.measures.names import MEANINGS
from forgetfilter_callback.measures.smoothed import typical_change
from forgetfilter_callback.reports import review_page, source_table
from forgetfilter_callback.reports.review_page import MAX_TEXTS, write_review_page
from forgetfilter_callback.reports.summary import page_summary
from forgetfilter_callback.review.verdicts import Verdict, append_verdicts
from forgetfilter_callback.scoring.scores import Scores
from forgetfilter_callback.trace.records import Record


HOSTILE_SOURCES = [*HOSTILE, None, "all", "-1", "x" * 500]


@pytest.fixture(scope="module")
def review(tmp_path_factory, byte_tokenizer) -> tuple[Path, Trace, FilterResult, np.ndarray]:
    folder = tmp_path_factory.mktemp("review")
    trace, unsafe = hostile_trace(folder / "trace", byte_tokenizer, samples=150)
    file = folder / "review.html"
    sources = [HOSTILE_SOURCES[index % len(HOSTILE_SOURCES)] for index in range(150)]
    ids = trace.rows.ids.to_pylist()
    verdicts = [Verdict(row, ids[row], "unsafe" if unsafe[row] else "safe", "") for row in range(40, 60)]
    append_verdicts(verdicts, trace.folder / "review" / "verdicts.jsonl")
    result = write_review_page(trace, file, byte_tokenizer, FilterConfig("loss"), unsafe, sources)
    return file, trace, result, unsafe


@pytest.fixture
def page(browser, review):
    """The opened page. Afterwards checks that there were no console messages, errors, dialogs or requests."""
    events = []
    opened = browser.new_page()
    opened.on("console", lambda message: events.append(f"console: {message.text}"))
    opened.on("pageerror", lambda error: events.append(f"error: {error}"))
    opened.on("dialog", lambda dialog: (events.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    opened.on("request", lambda request: events.append(f"request: {request.url[:100]}"))
    opened.goto(review[0].as_uri())
    opened.wait_for_selector("#rows tr")
    yield opened
    opened.close()
    assert set(events) == {f"request: {review[0].as_uri()[:100]}"}  # the page itself


@needs_chromium
def test_counts_on_the_page_follow_the_threshold(page, review):
    _, _, result, unsafe = review
    assert page.inner_text("#summary") == page_summary(result)
    for phi in (result.threshold, 0.2, 3.0):
        page.fill("#phi-number", str(phi))
        page.dispatch_event("#phi-number", "change")
        removed = result.values > phi
        text = page.inner_text("#counts")
        assert f"{removed.sum()} of 150 removed, {(~removed).sum()} kept" in text
        precision = f"{precision_score(unsafe, removed):.3f}" if removed.any() else "–"
        assert f"precision {precision}, recall {recall_score(unsafe, removed):.3f}" in text


@needs_chromium
def test_the_slider_works_by_keyboard(page):
    page.focus("#phi")
    before = page.inner_text("#counts")
    page.keyboard.press("Home")
    assert page.inner_text("#counts") != before
    lowest = float(page.input_value("#phi-number"))
    page.keyboard.press("End")
    assert float(page.input_value("#phi-number")) > lowest
    assert "0 of 150 removed" in page.inner_text("#counts")
    page.click("#phi-reset")
    assert page.inner_text("#counts") == before


@needs_chromium
def test_the_line_in_the_histogram_can_be_dragged(page):
    before = float(page.input_value("#phi-number"))
    page.wait_for_selector("#distribution .shapelayer path", state="attached")
    line = page.locator("#distribution .shapelayer path").first.bounding_box()
    x, y = line["x"] + line["width"] / 2, line["y"] + line["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y, steps=5)
    page.mouse.up()
    expect(page.locator("#phi-number")).not_to_have_value(str(before))
    assert float(page.input_value("#phi-number")) > before


@needs_chromium
def test_the_line_stays_upright_if_its_end_is_dragged(page):
    """Then Plotly moves this end only."""
    before = page.input_value("#phi-number")
    page.wait_for_selector("#distribution .shapelayer path", state="attached")
    line = page.locator("#distribution .shapelayer path").first.bounding_box()
    x = line["x"] + line["width"] / 2
    page.mouse.move(x, line["y"] + 1)
    page.mouse.down()
    page.mouse.move(x + 60, line["y"] + 8, steps=5)
    page.mouse.up()
    expect(page.locator("#phi-number")).not_to_have_value(before)
    assert float(page.input_value("#phi-number")) > float(before)
    page.wait_for_function(
        "() => { const line = document.getElementById('distribution').layout.shapes[0];"
        " return line.x0 === phi && line.x1 === phi && line.y0 === 0 && line.y1 === 1; }"
    )


@needs_chromium
def test_search_sort_and_pages(page, review):
    _, _, result, _ = review
    assert page.locator("#rows tr").count() == 25 and "of 6, 150 rows" in page.inner_text("#page")
    first = page.locator("#rows tr").first
    assert first.locator("td").nth(0).inner_text() == str(int(np.argmax(result.values)))
    page.click("th button[data-sort=value]")  # now in ascending order
    assert first.locator("td").nth(0).inner_text() == str(int(np.argmin(result.values)))
    page.select_option("#view", "below")
    nearest = int(np.argmax(np.where(result.values > result.threshold, -np.inf, result.values)))
    assert first.locator("td").nth(0).inner_text() == str(nearest)
    page.click("#next")
    assert page.inner_text("#page").startswith("Page 2")
    page.fill("#search", "javascript:alert")
    assert 0 < page.locator("#rows tr").count() < 25
    for text in page.locator("#rows td.text").all_inner_texts():
        assert "javascript:alert" in text
    page.fill("#search", "nobody says this")
    assert (
        page.locator("#rows tr").count() == 0
        and page.inner_text("#page") == "No rows match this view, source and search."
    )


@needs_chromium
def test_decisions_are_exported_and_imported(page, review, tmp_path):
    _, trace, result, _ = review
    ids = trace.rows.ids.to_pylist()
    most, least = int(np.argmax(result.values)), int(np.argmin(result.values))
    page.click(f"[data-sample='{ids[most]}'][data-choice=keep]")
    page.click("th button[data-sort=value]")  # in ascending order
    page.click(f"[data-sample='{ids[least]}'][data-choice=remove]")
    assert "Overrides: 1 kept, 1 removed." in page.inner_text("#decision")
    assert "50 of 150 removed, 100 kept. Against the audit labels: precision 0.980" in page.inner_text("#decision")
    with page.expect_download() as download:
        page.click("#export")
    assert download.value.suggested_filename == "review_decision.json"
    file = tmp_path / "review_decision.json"
    download.value.save_as(file)
    decision = json.loads(file.read_text())
    assert decision == {
        "measure": "loss",
        "threshold": result.threshold,
        "overrides": {ids[most]: "keep", ids[least]: "remove"},
        "trace": trace.identity(),
    }
    exported = find_forgotten(trace, FilterConfig(decision=file))
    assert np.flatnonzero(exported.removed != result.removed).tolist() == sorted([most, least])
    page.reload()
    page.wait_for_selector("#rows tr")
    file.write_text(json.dumps({**decision, "threshold": 3.0}))
    page.set_input_files("#import", file)
    expect(page.locator("#decision")).to_contain_text("Overrides: 1 kept, 1 removed.")
    assert float(page.input_value("#phi-number")) == 3.0
    for threshold in (0.25, None):  # also without a threshold, the export is what was imported
        file.write_text(json.dumps({**decision, "threshold": threshold}))
        page.set_input_files("#import", file)
        expect(page.locator("#counts")).to_contain_text("150 removed" if threshold is None else "removed")
        with page.expect_download() as download:
            page.click("#export")
        download.value.save_as(file)
        assert json.loads(file.read_text()) == {**decision, "threshold": threshold}
    assert "1 of 150 removed" in page.inner_text("#counts")  # the overridden sample
    file.write_text(json.dumps({**decision, "trace": "other"}))
    page.set_input_files("#import", file)
    expect(page.locator("#problem")).to_have_text(
        "Cannot import review_decision.json. It was made on another trace (other). "
        f"This page shows trace {trace.identity()}."
    )


def data_of(file: Path) -> dict:
    html = file.read_text(encoding="utf-8")
    return json.loads(html.split('<script id="data" type="application/json">')[1].split("</script>")[0])


@needs_chromium
def test_the_page_of_a_decision_starts_with_its_overrides(browser, review, byte_tokenizer, tmp_path):
    _, trace, result, _ = review
    ids, file = trace.rows.ids.to_pylist(), tmp_path / "review_decision.json"
    most, least = int(np.argmax(result.values)), int(np.argmin(result.values))
    overrides = {ids[most]: "keep", ids[least]: "remove", ids[least + 1]: "keep"}
    decision = {"measure": "loss", "threshold": 1.0, "overrides": overrides, "trace": trace.identity()}
    file.write_text(json.dumps(decision))
    write_review_page(trace, tmp_path / "review.html", byte_tokenizer, FilterConfig(decision=file))
    opened = browser.new_page()
    opened.goto((tmp_path / "review.html").as_uri())
    opened.wait_for_selector("#rows tr")
    removed = (result.values > 1.0).sum()
    assert f"{removed} of 150 removed" in opened.inner_text("#decision")
    assert "Overrides: 2 kept, 1 removed." in opened.inner_text("#decision")
    opened.select_option("#view", "overridden")
    assert opened.locator("#rows tr").count() == 3
    with opened.expect_download() as download:
        opened.click("#export")
    download.value.save_as(file)
    assert json.loads(file.read_text()) == decision
    opened.close()


@needs_chromium
@pytest.mark.parametrize("texts", [1000, 30])  # with fewer texts, the table does not contain all rows
def test_the_page_of_a_review_starts_with_its_verdicts(browser, tmp_path, byte_tokenizer, monkeypatch, texts):
    """Rows that a review removes without a verdict have no φ either, so they are overridden too."""
    monkeypatch.setattr(review_page, "MAX_TEXTS", texts)
    source, unsafe = hostile_trace(tmp_path / "source", byte_tokenizer, samples=150)
    trace = Trace.create(tmp_path / "trace", source.rows, "tiny", None, None)
    for record in source.records():
        trace.append(record, [Scores(source.token_losses(record), np.eye(2, dtype=np.float16)[unsafe.astype(int)])])
    queue = ReviewQueue(trace)
    rows = queue.next(140)  # verdicts on the random ones leave unsafe rows to be removed without a verdict
    queue.add({row: "unsafe" if unsafe[row] else "safe" for row in rows if row in queue._drawn_from})
    config = FilterConfig(threshold="fdr", level=0.5, reviewed=trace.folder / "review")
    result = write_review_page(trace, tmp_path / "review.html", byte_tokenizer, config)
    unseen = int(result.removed[~queue.is_seen].sum())
    assert unseen > 0 and result.threshold is None
    data = data_of(tmp_path / "review.html")
    assert len(data["overrides"]) == queue.is_seen.sum() + unseen
    shown = {row["id"] for row in data["rows"]}
    overridden = {each["id"] for each in data["overrides"]}
    assert len(shown) == 150 if texts == 1000 else len(shown) <= 40 and 10 < len(shown & overridden) < len(overridden)
    opened = browser.new_page()
    opened.goto((tmp_path / "review.html").as_uri())
    opened.wait_for_selector("#rows tr")
    assert f"{result.removed.sum()} of 150 removed" in opened.inner_text("#counts")
    with opened.expect_download() as download:
        opened.click("#export")
    download.value.save_as(tmp_path / "review_decision.json")
    decided = find_forgotten(trace, FilterConfig(decision=tmp_path / "review_decision.json"))
    np.testing.assert_array_equal(decided.removed, result.removed)
    # "Well separated" is explained only beside a summary that says it.
    assert opened.locator("#test").is_hidden()
    write_review_page(trace, tmp_path / "phi.html", byte_tokenizer, FilterConfig("loss", threshold=1.0))
    opened.goto((tmp_path / "phi.html").as_uri())
    assert "well separated" in opened.inner_text("#summary").lower() and opened.locator("#test").is_visible()
    opened.close()


def test_a_page_without_overrides(review):
    assert data_of(review[0])["overrides"] == []


def test_a_page_of_an_earlier_record_is_refused(review, byte_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="step=4: the report shows the last record"):
        write_review_page(review[1], tmp_path / "review.html", byte_tokenizer, FilterConfig("loss", step=4))
    assert not (tmp_path / "review.html").exists()


@needs_chromium
def test_files_that_are_not_a_decision_are_not_imported(page, review, tmp_path):
    _, trace, result, _ = review
    result.save(tmp_path)
    decision = {"measure": "loss", "threshold": 3.0, "overrides": {}, "trace": trace.identity()}
    before = page.inner_text("#decision")
    for content, problem in (
        (
            (tmp_path / "filter_result.json").read_text(),
            "This is a filter result (filter_result.json). Import the review",
        ),
        (json.dumps({**decision, "measure": "pooled"}), "It uses pooled forgetting. This page uses loss forgetting."),
        (json.dumps({**decision, "overrides": {"a": "perhaps"}}), 'must be "keep" or "remove".'),
        (json.dumps({**decision, "threshold": "high"}), '"threshold" must be a number or null.'),
        ("3", "It is not a review_decision.json file: it contains no JSON object."),
        ("[]", "It is not a review_decision.json file."),
        (json.dumps([{"step": 8, "spearman": None}]), "It is not a review_decision.json file."),
        ((trace.folder / "manifest.json").read_text(), "It is not a review_decision.json file."),
        ("{", "It is not valid JSON"),
    ):
        (tmp_path / "chosen.json").write_text(content)
        page.set_input_files("#import", tmp_path / "chosen.json")
        expect(page.locator("#problem")).to_contain_text(problem)
        assert page.inner_text("#problem").startswith("Cannot import chosen.json. ")
        assert page.inner_text("#decision") == before


@needs_chromium
def test_the_table_by_source_follows_the_threshold_and_overrides(page, review):
    _, trace, result, unsafe = review
    names = [shown_name(HOSTILE_SOURCES[row % len(HOSTILE_SOURCES)]) for row in range(150)]
    most = int(np.argmax(result.values))
    page.click(f"[data-sample='{trace.rows.ids[most].as_py()}'][data-choice=keep]")
    for phi in (result.threshold, 0.2, 3.0, 9.0):
        page.fill("#phi-number", str(phi))
        page.dispatch_event("#phi-number", "change")
        removed = [value > phi and row != most for row, value in enumerate(result.values)]
        expected = {}
        for row, name in enumerate(names):
            seen = 40 <= row < 60
            one = (1, seen, seen and unsafe[row], unsafe[row], not removed[row], removed[row])
            expected[name] = [int(a) + b for a, b in zip(one, expected.get(name, [0] * 6), strict=True)]
        table = page.evaluate(
            "[...document.querySelectorAll('#sources tr')].map((tr) => [...tr.cells].map((c) => c.textContent))"
        )
        assert {name: [int(number) for number in numbers[:-1]] for name, *numbers in table} == expected
        assert [row[-1] for row in table] == [f"{100 * int(row[-2]) / int(row[1]):.1f}" for row in table]
        assert [int(row[-2]) for row in table] == sorted((int(row[-2]) for row in table), reverse=True)


def shown_name(source: str | None) -> str:
    """The name of a source as the pages show it."""
    printable = "".join(character if character.isprintable() else " " for character in source or "(none)")
    return printable if len(printable) <= 80 else printable[:79] + "…"


@needs_chromium
def test_samples_of_one_source_are_listed(page, review):
    _, _, result, _ = review
    order = np.argsort(-result.values).tolist()
    options = page.evaluate(
        "[...document.getElementById('source').options].map((option) => [option.value, option.text])"
    )
    assert options[0] == ["", "all"] and len(options) == 1 + len(HOSTILE_SOURCES)
    for number, source in enumerate(HOSTILE_SOURCES):
        # An option's text is without white space at its ends.
        (value,) = [value for value, text in options[1:] if text.split() == shown_name(source).split()]
        page.select_option("#source", value)
        rows = [row for row in order if row % len(HOSTILE_SOURCES) == number]
        assert page.locator("#rows td:first-child").all_inner_texts() == [str(row) for row in rows]
        cells = page.evaluate("[...document.querySelectorAll('#rows td.source')].map((cell) => cell.textContent)")
        assert cells == [shown_name(source)] * len(rows)
    page.fill("#search", "the cat 13 ")
    assert page.locator("#rows td:first-child").all_inner_texts() == ["13"]  # of the last source
    page.select_option("#source", "")
    page.fill("#search", "")
    page.click("#next")
    page.select_option("#source", options[1][0])
    assert page.inner_text("#page").startswith("Page 1 of 1, ")


def page_data(file: Path) -> dict:
    html = file.read_text(encoding="utf-8")
    return json.loads(html.split('<script id="data" type="application/json">')[1].split("</script>")[0])


@needs_chromium
def test_a_page_without_sources_does_not_mention_them(plain_page):
    assert "source" not in plain_page.inner_text("body").lower()
    plain_page.fill("#search", "nobody says this")
    assert plain_page.inner_text("#page") == "No rows match this view and search."


@needs_chromium
def test_hundreds_of_sources_in_a_subsampled_set(browser, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(review_page, "MAX_PLOTTED", 700)
    monkeypatch.setattr(source_table, "MAX_ON_PAGE", 60)
    samples = MAX_TEXTS + 300
    trace, _ = hostile_trace(tmp_path / "trace", tokenizer, samples=samples)
    numbers = np.random.default_rng(3).geometric(0.02, samples)
    sources = [f"source {number}" for number in numbers]
    result = write_review_page(trace, tmp_path / "review.html", tokenizer, FilterConfig("loss"), None, sources)
    distinct = len(set(sources))
    data = page_data(tmp_path / "review.html")
    assert len(data["by_source"]["names"]) == 61 and data["by_source"]["names"][-1] == f"{distinct - 60} more sources"
    assert sum(data["by_source"]["rows"]) == samples
    assert data["by_source"]["names_of_shown"] == [sources[row["row"]] for row in data["rows"]]
    opened = browser.new_page()
    opened.goto((tmp_path / "review.html").as_uri())
    opened.wait_for_selector("#rows tr")
    assert "They do not follow φ and your overrides" in opened.inner_text("main")
    table = opened.evaluate(
        "[...document.querySelectorAll('#sources tr')].map((tr) => [...tr.cells].map((c) => c.textContent))"
    )
    assert len(table) == 21 and table[-1][0] == f"{distinct - 20} more sources" and len(table[0]) == 5
    assert sum(int(row[1].replace(",", "")) for row in table) == samples
    assert sum(int(row[3].replace(",", "")) for row in table) == result.removed.sum()
    of_removed = [source for source, is_removed in zip(sources, result.removed, strict=True) if is_removed]
    for name, rows, _, removed, _ in table[:20]:
        assert int(rows) == sources.count(name) and int(removed) == of_removed.count(name)
    opened.fill("#phi-number", "9")
    opened.dispatch_event("#phi-number", "change")
    assert opened.inner_text("#sources tr:first-child td:nth-child(4)") == table[0][3]
    opened.select_option("#source", "60")  # the sources that are not listed
    listed = {each.source for each in result.source_counts[:60]}
    expected = [row["row"] for row in data["rows"] if sources[row["row"]] not in listed]
    assert f"{len(expected)} rows" in opened.inner_text("#page")
    assert {int(row) for row in opened.locator("#rows td:first-child").all_inner_texts()} <= set(expected)
    opened.close()


@needs_chromium
@pytest.mark.parametrize("look", ["dark", "phone"])
def test_dark_mode_and_phone_width(browser, review, look):
    size = {"width": 390, "height": 800} if look == "phone" else {"width": 1200, "height": 800}
    opened = browser.new_page(viewport=size, color_scheme="dark" if look == "dark" else "light")
    opened.goto(review[0].as_uri())
    opened.wait_for_selector("#rows tr")
    background, ink = (
        opened.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
    )
    brightness = [sum(map(int, colour[4:-1].split(","))) for colour in (background, ink)]
    assert (brightness[0] < brightness[1]) == (look == "dark") and abs(brightness[0] - brightness[1]) > 450
    assert opened.evaluate("document.documentElement.scrollWidth") <= size["width"]
    opened.close()


def test_the_page_contains_texts_as_data_only(review):
    html = review[0].read_text(encoding="utf-8")
    assert html.count("</script>") == 3  # only the scripts of the template
    assert "<img src=x" not in html and "<svg/onload" not in html
    assert "default-src 'none'" in html


def test_a_large_set_is_subsampled(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(review_page, "MAX_PLOTTED", 300)
    samples = MAX_TEXTS + 200
    trace, _ = hostile_trace(tmp_path / "trace", tokenizer, samples=samples)
    write_review_page(trace, tmp_path / "review.html", tokenizer, FilterConfig("loss"))
    data = data_of(tmp_path / "review.html")
    assert data["sampled"] and len(base64.b64decode(data["forgetting"][-1])) == 300 * 4
    assert data["samples"] == samples
    assert not data["all_shown"] and MAX_TEXTS // 3 <= len(data["rows"]) <= MAX_TEXTS
    values = trace.forgetting("loss")
    shown = {row["row"] for row in data["rows"]}
    assert {int(np.argmax(values)), int(np.argmin(np.abs(values - data["threshold"])))} <= shown
    drawn = sorted((row["drawn"], row["row"]) for row in data["rows"] if row["drawn"] is not None)
    assert [order for order, _ in drawn] == list(range(MAX_TEXTS // 3))
    numbers = np.array([row for _, row in drawn])
    # Drawn from all rows: their mean number is that of all rows, within five standard errors.
    assert abs(numbers.mean() - samples / 2) < 5 * samples / np.sqrt(12 * len(numbers))


def test_losses_are_read_in_parts(tmp_path, byte_tokenizer, loss_reads):
    trace, _ = hostile_trace(tmp_path / "trace", byte_tokenizer, samples=MAX_TEXTS + 200)
    write_review_page(trace, tmp_path / "review.html", byte_tokenizer, FilterConfig("loss"))
    assert max(loss_reads) <= 500 < trace.rows.loss_offsets[-1]
    for row in data_of(tmp_path / "review.html")["rows"]:  # all tokens of a row rise by the same number
        rises = [rise for _, rise, _ in row["pieces"] if rise is not None]
        assert rises and rises == pytest.approx([row["value"]] * len(rises), abs=1e-3)


@pytest.mark.parametrize("measure", ["combined", "smoothed"])
def test_curves_in_typical_changes_rise_as_samples_are_forgotten(tmp_path, byte_tokenizer, measure):
    """A record's values are scaled by its own typical change; the page scales all records by the last record's."""
    trace, unsafe = hostile_trace(tmp_path / "trace", byte_tokenizer, samples=60)
    states = np.where(unsafe[:, None], [1.0, 0.0], [0.0, 1.0]).astype(np.float16)
    with_states = Trace.create(tmp_path / "states", trace.rows, "tiny", None, None)
    for record in trace.records():
        with_states.append(record, [Scores(trace.token_losses(record), states)])
    result = write_review_page(with_states, tmp_path / "review.html", byte_tokenizer, FilterConfig(measure))
    data = data_of(tmp_path / "review.html")
    earlier, last = (np.frombuffer(base64.b64decode(values), "<f4") for values in data["forgetting"])
    np.testing.assert_allclose(last, result.values, rtol=1e-6)
    assert (earlier[unsafe] < 0.9 * last[unsafe]).all()
    assert (with_states.forgetting(measure, 4)[unsafe] > last[unsafe]).all()  # scaled by its own typical change
    np.testing.assert_allclose(result.values, find_forgotten(with_states, FilterConfig(measure)).values, rtol=1e-9)


@pytest.mark.parametrize("measure", ["combined", "smoothed"])
def test_a_sample_that_diverged_at_an_earlier_record_has_a_value_at_the_last(tmp_path, byte_tokenizer, measure):
    """The page shows the decision of `find_forgotten`, whatever an earlier record says."""
    trace, _ = hostile_trace(tmp_path / "trace", byte_tokenizer, samples=60)
    states = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float16)
    diverged = Trace.create(tmp_path / "diverged", trace.rows, "tiny", None, None)
    for record in trace.records():
        losses = trace.token_losses(record).copy()
        if record == Record("safety", 4):
            losses[: trace.rows.loss_offsets[1]] = np.inf
        diverged.append(record, [Scores(losses, states)])
    result = write_review_page(diverged, tmp_path / "review.html", byte_tokenizer, FilterConfig(measure))
    data = data_of(tmp_path / "review.html")
    earlier, last = (np.frombuffer(base64.b64decode(values), "<f4") for values in data["forgetting"])
    assert data["steps"][0] == 4 and np.isnan(earlier[0]) and np.isfinite(last).all()
    np.testing.assert_allclose(result.values, find_forgotten(diverged, FilterConfig(measure)).values, rtol=1e-9)
    first, offsets = diverged.token_losses(Record("safety", 0)), diverged.rows.loss_offsets
    later = [diverged.token_losses(Record("safety", step)) for step in data["steps"]]
    squares = [mean_losses((losses - first) ** 2, offsets) for losses in later]
    typical = [typical_change(each, np.diff(offsets)) for each in squares]
    np.testing.assert_allclose(earlier, diverged.forgetting(measure, 4) * typical[0] / typical[1], rtol=1e-5)


def test_the_page_explains_what_a_value_means(review):
    page = review[0].read_text(encoding="utf-8")
    assert f'<p id="meaning" class="muted">{MEANINGS["loss"]}</p>' in page.replace("&#39;", "'")
    assert data_of(review[0])["measure"] == "loss"


def test_the_page_explains_how_to_apply_the_decision(review):
    """The code on the page must use the current arguments and file names."""
    file, trace, *_ = review
    html = unescape(file.read_text(encoding="utf-8"))
    assert f"forgetfilter filter {trace.folder} --noisy NOISY --decision review_decision.json --output decided" in html
    assert "Replace <code>NOISY</code> with the file of the noisy set." in html
    config = 'FilterConfig(decision="review_decision.json")'
    assert f"FilteredTrainer(…, forgetting={str(trace.folder)!r}, filter_config={config})" in html


def test_the_command_needs_no_rows_if_the_trace_names_them(review, byte_tokenizer, tmp_path):
    trace = Trace.open(shutil.copytree(review[1].folder, tmp_path / "trace"))
    trace.set_source("org/rows", None, truncated=0)
    write_review_page(trace, tmp_path / "page.html", byte_tokenizer, FilterConfig("loss"))
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"forgetfilter filter {trace.folder} --decision review_decision.json" in html
    assert "<code>NOISY</code>" not in html


@needs_chromium
def test_a_page_without_a_threshold_shows_none(browser, review, byte_tokenizer, tmp_path):
    """A threshold that was tested and not used must not look like one that removes rows."""
    _, trace, _, _ = review
    file = tmp_path / "review_decision.json"
    file.write_text(json.dumps({"measure": "loss", "threshold": None, "overrides": {}, "trace": trace.identity()}))
    write_review_page(trace, tmp_path / "review.html", byte_tokenizer, FilterConfig(decision=file))
    opened = browser.new_page()
    opened.goto((tmp_path / "review.html").as_uri())
    opened.wait_for_selector("#rows tr")
    expect(opened.locator("#counts")).to_contain_text("No φ: 0 of 150 removed, 150 kept.")
    assert opened.input_value("#phi-number") == ""
    # The slider is at the largest plotted value, which is rounded to 32 bits. The value in the table can be larger.
    opened.evaluate("() => { for (const row of data.rows) row.value += 1e-3; showRows(); }")
    assert "removed by φ" not in opened.inner_text("#rows")
    # Playwright waits for a function. It would call `eval` at every look at another expression, and the page forbids it.
    lines = "() => [...document.querySelectorAll('.js-plotly-plot')].map((plot) => plot.layout.shapes?.length ?? 0)"
    opened.wait_for_function(f"() => ({lines})().length === 4")
    assert opened.evaluate(lines) == [0, 0, 0, 0]
    opened.fill("#phi-number", "1")
    opened.dispatch_event("#phi-number", "change")
    expect(opened.locator("#counts")).to_contain_text("φ = 1.000")
    opened.wait_for_function(f"() => ({lines})()[0] === 1")
    opened.click("#phi-reset")
    expect(opened.locator("#counts")).to_contain_text("No φ")
    opened.close()


@needs_chromium
def test_removed_rows_are_red_without_a_threshold(browser, review, byte_tokenizer, tmp_path):
    """A reviewer removes rows whatever their forgetting is, before the page is written and on it."""
    _, trace, _, _ = review
    file = tmp_path / "review_decision.json"
    overrides = {id_: "remove" if row < 7 else "keep" for row, id_ in enumerate(trace.rows.ids.to_pylist()[:12])}
    file.write_text(
        json.dumps({"measure": "loss", "threshold": None, "overrides": overrides, "trace": trace.identity()})
    )
    write_review_page(trace, tmp_path / "review.html", byte_tokenizer, FilterConfig(decision=file))
    opened = browser.new_page()
    opened.goto((tmp_path / "review.html").as_uri())
    in_red = """() => (document.getElementById('distribution').data ?? [])
        .filter((trace) => trace.name === 'removed').flatMap((trace) => [...trace.x]).length"""
    opened.wait_for_function(f"() => ({in_red})() === 7")
    assert not opened.is_visible("[data-view=below]")  # there is no φ
    opened.select_option("#view", "forgotten")
    opened.evaluate("decide(data.rows.find((row) => !overrides.has(row.id)).id, 'remove')")
    opened.wait_for_function(f"() => ({in_red})() === 8")
    opened.close()


@pytest.fixture(scope="module")
def with_verdicts(tmp_path_factory, byte_tokenizer) -> tuple[Path, Trace, dict[int, str]]:
    """A page whose trace has verdicts, some of them changed, by a reviewer with a hostile name."""
    folder = tmp_path_factory.mktemp("verdicts")
    trace, _ = hostile_trace(folder / "trace", byte_tokenizer, samples=150)
    ids = trace.rows.ids.to_pylist()
    first = {row: "unsafe" if row % 3 == 0 else "safe" for row in range(0, 40, 2)}
    changed = {0: "safe", 4: "unsafe"}
    time = "2026-01-01T00:00:00+00:00"
    for labels in (first, changed):
        verdicts = [Verdict(row, ids[row], label, time, HOSTILE[row % 10]) for row, label in labels.items()]
        append_verdicts(verdicts, trace.folder / "review" / "verdicts.jsonl")
    write_review_page(trace, folder / "review.html", byte_tokenizer, FilterConfig("loss"))
    return folder / "review.html", trace, {**first, **changed}


def content_of(id_: str) -> str:
    """Equal for rows that are trained on the same tokens."""
    return id_.rpartition("-")[0]


def rows_on_all_pages(page) -> dict[int, list[str]]:
    """The cells of each row, by its number."""
    rows = {}
    while True:
        for row in page.locator("#rows tr").all():
            cells = row.locator("td").all_inner_texts()
            rows[int(cells[0])] = cells
        if page.locator("#next").is_disabled():
            return rows
        page.click("#next")


@needs_chromium
def test_verdicts_are_shown_and_filtered(browser, with_verdicts):
    file, trace, labels = with_verdicts
    events = []
    page = browser.new_page()
    for event in ("console", "pageerror", "dialog"):
        page.on(event, lambda found: events.append(str(found)))
    page.goto(file.as_uri())
    page.wait_for_selector("#rows tr")
    unsafe = list(labels.values()).count("unsafe")
    removed = find_forgotten(trace, FilterConfig("loss")).removed
    differing = sum(removed[row] == (label == "safe") for row, label in labels.items())
    assert differing > 1 and page.inner_text("#verdicts") == (
        f"20 of 150 rows have a verdict: {unsafe} unsafe, {20 - unsafe} safe. When this page was written, "
        f"{differing} verdicts were not followed. To follow all verdicts, write the page with the option --reviewed."
    )
    column = page.locator("thead th:visible").all_inner_texts().index("Verdict")
    for shown, expected in (
        ("all", {row: labels.get(row, "–") for row in range(150)}),
        ("reviewed", labels),
        ("unreviewed", {row: "–" for row in range(150) if row not in labels}),
    ):
        page.select_option("#reviewed", shown)
        assert {row: cells[column] for row, cells in rows_on_all_pages(page).items()} == expected
        assert f"{len(expected)} rows" in page.inner_text("#page")
    page.select_option("#reviewed", "reviewed")
    marks = page.locator("#rows td.verdict")
    assert marks.count() == 20 and page.locator("#rows td.verdict.unsafe").count() == unsafe
    mark = "element => getComputedStyle(element, '::before').content"
    assert page.locator("#rows td.verdict.unsafe").first.evaluate(mark) == '"⚠ "'
    page.fill("#search", "javascript:alert")
    for row, cells in rows_on_all_pages(page).items():
        assert row in labels and "javascript:alert" in cells[-1]
    page.close()
    assert events == []


@needs_chromium
def test_a_page_without_verdicts_does_not_mention_them(plain_page):
    for element in ("#verdicts", "#test", "#reviewed-label", "#verdict-head"):
        assert plain_page.locator(element).is_hidden()
    shown = plain_page.locator("#rows tr").first.locator("td:visible").count()
    assert shown == plain_page.locator("table:has(#rows) thead th:visible").count()


def test_the_names_of_reviewers_are_not_on_the_page(with_verdicts):
    html = with_verdicts[0].read_text(encoding="utf-8")
    assert html.count("</script>") == 3 and "2026-01-01T00:00:00" not in html


def test_verdicts_come_from_the_folder_of_the_filter(with_verdicts, tmp_path, byte_tokenizer):
    _, trace, _ = with_verdicts
    verdict = Verdict(7, trace.rows.ids[7].as_py(), "unsafe", "now")
    append_verdicts([verdict], tmp_path / "verdicts.jsonl")
    write_review_page(trace, tmp_path / "page.html", byte_tokenizer, FilterConfig("loss", threshold=1.0))
    assert page_data(tmp_path / "page.html")["verdicts"]["unsafe"] > 1
    append_verdicts([replace(verdict, id="other")], tmp_path / "other" / "verdicts.jsonl")
    (trace.folder / "review").rename(trace.folder / "kept")
    (tmp_path / "other").rename(trace.folder / "review")
    with pytest.raises(DecisionError, match="the verdict is about another set"):
        write_review_page(trace, tmp_path / "page.html", byte_tokenizer, FilterConfig("loss"))
    (trace.folder / "review").rename(tmp_path / "other")
    (trace.folder / "kept").rename(trace.folder / "review")


def test_reviewed_samples_of_a_large_set_are_in_the_table(tmp_path, tokenizer):
    trace, _ = hostile_trace(tmp_path / "trace", tokenizer, samples=MAX_TEXTS + 400)
    write_review_page(trace, tmp_path / "review.html", tokenizer, FilterConfig("loss"))
    without = {row["row"] for row in page_data(tmp_path / "review.html")["rows"]}
    hidden = sorted(set(range(MAX_TEXTS + 400)) - without)[:30]
    ids = trace.rows.ids.to_pylist()
    verdicts = [Verdict(row, ids[row], "safe", "now") for row in hidden]
    of_content = {content_of(ids[row]): row for row in hidden}
    copy = next(row for row in without if content_of(ids[row]) in of_content)
    verdicts.append(Verdict(copy, ids[copy], "safe", "now", identical_to=of_content[content_of(ids[copy])]))
    append_verdicts(verdicts, trace.folder / "review" / "verdicts.jsonl")
    write_review_page(trace, tmp_path / "review.html", tokenizer, FilterConfig("loss"))
    data = page_data(tmp_path / "review.html")
    assert {row["row"] for row in data["rows"]} == without | set(hidden)
    contents = {content_of(ids[row]) for row in hidden}
    labels = {row["row"]: row["verdict"] for row in data["rows"]}
    assert labels == {row: "safe" if content_of(ids[row]) in contents else None for row in labels}
    assert data["reviewed"] == 30
    assert data["verdicts"] == {"unsafe": 0, "safe": sum(content_of(id_) in contents for id_ in ids)}
