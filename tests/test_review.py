"""The review page in a real browser: what it shows, what is decided on it, and that no text of a sample does anything."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import forgetfilter_callback.review
import numpy as np
import pytest
from conftest import hostile_trace
from playwright.sync_api import expect, sync_playwright
from sklearn.metrics import precision_score, recall_score
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from forgetfilter_callback import FilterResult, Trace
from forgetfilter_callback.reports.review_page import MAX_TEXTS, write_review_page
from forgetfilter_callback.reports.summary import page_summary
from forgetfilter_callback.reports.token_text import split_text
from forgetfilter_callback.scoring.scores import Scores


CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def review(tmp_path_factory, byte_tokenizer) -> tuple[Path, Trace, FilterResult, np.ndarray]:
    folder = tmp_path_factory.mktemp("review")
    trace, unsafe = hostile_trace(folder / "trace", byte_tokenizer, samples=150)
    file = folder / "review.html"
    return file, trace, write_review_page(trace, file, byte_tokenizer, measure="loss", unsafe=unsafe), unsafe


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        # In a container there is no sandbox to be had.
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser, review):
    """The page, opened; afterwards nothing may have been complained of, asked for or popped up."""
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
    assert set(events) == {f"request: {review[0].as_uri()[:100]}"}  # of the page itself


@needs_chromium
def test_what_the_page_says_follows_phi(page, review):
    _, _, result, unsafe = review
    assert page.inner_text("#summary") == page_summary(result)
    assert "well separated" in page_summary(result)
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
def test_search_sort_and_pages(page, review):
    _, _, result, _ = review
    assert page.locator("#rows tr").count() == 25 and "of 6, 150 samples" in page.inner_text("#page")
    first = page.locator("#rows tr").first
    assert first.locator("td").nth(0).inner_text() == str(int(np.argmax(result.values)))
    page.click("th button[data-sort=value]")  # now the least first
    assert first.locator("td").nth(0).inner_text() == str(int(np.argmin(result.values)))
    page.select_option("#view", "borderline")
    nearest = int(np.argmin(np.abs(result.values - result.threshold)))
    assert first.locator("td").nth(0).inner_text() == str(nearest)
    page.click("#next")
    assert page.inner_text("#page").startswith("Page 2")
    page.fill("#search", "javascript:alert")
    assert 0 < page.locator("#rows tr").count() < 25
    for text in page.locator("#rows td.text").all_inner_texts():
        assert "javascript:alert" in text
    page.fill("#search", "nobody says this")
    assert page.locator("#rows tr").count() == 0 and page.inner_text("#page").startswith("No sample")


@needs_chromium
def test_what_is_decided_goes_out_and_in_again(page, review, tmp_path):
    _, trace, result, _ = review
    ids = trace.rows.ids.to_pylist()
    most, least = int(np.argmax(result.values)), int(np.argmin(result.values))
    page.locator(f"select[data-sample='{ids[most]}']").select_option("keep")
    page.select_option("#view", "kept")
    page.locator(f"select[data-sample='{ids[least]}']").select_option("remove")
    assert "By hand: 1 kept, 1 removed." in page.inner_text("#decision")
    assert "50 of 150 removed, 100 kept. Against the audit column: precision 0.980" in page.inner_text("#decision")
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "decision.json"
    download.value.save_as(file)
    decision = json.loads(file.read_text())
    assert decision == {
        "measure": "loss",
        "threshold": result.threshold,
        "overrides": {ids[most]: "keep", ids[least]: "remove"},
        "trace": trace.identity(),
    }
    page.reload()
    page.wait_for_selector("#rows tr")
    file.write_text(json.dumps({**decision, "threshold": 3.0}))
    page.set_input_files("#import", file)
    expect(page.locator("#decision")).to_contain_text("By hand: 1 kept, 1 removed")
    assert float(page.input_value("#phi-number")) == 3.0
    file.write_text(json.dumps({**decision, "trace": "other"}))
    page.set_input_files("#import", file)
    expect(page.locator("#problem")).to_contain_text("another trace")


@needs_chromium
@pytest.mark.parametrize("look", ["dark", "phone"])
def test_dark_mode_and_a_phones_width(browser, review, look):
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


def test_texts_stand_in_the_page_as_data_only(review):
    html = review[0].read_text(encoding="utf-8")
    assert html.count("</script>") == 3  # those of the template: no text of a sample ends one
    assert "<img src=x" not in html and "<svg/onload" not in html
    assert "default-src 'none'" in html


def test_a_large_set_is_sampled_and_says_so(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(forgetfilter_callback.review, "MOST_VALUES", 300)
    samples = MAX_TEXTS + 200
    trace, _ = hostile_trace(tmp_path / "trace", tokenizer, samples=samples)
    write_review_page(trace, tmp_path / "review.html", tokenizer, measure="loss")
    html = (tmp_path / "review.html").read_text(encoding="utf-8")
    data = json.loads(html.split('<script id="data" type="application/json">')[1].split("</script>")[0])
    assert data["sampled"] and len(base64.b64decode(data["forgetting"][-1])) == 300 * 4
    assert data["samples"] == samples
    assert not data["all_shown"] and MAX_TEXTS // 3 <= len(data["rows"]) <= MAX_TEXTS
    values = trace.forgetting("loss")
    shown = {row["row"] for row in data["rows"]}
    assert {int(np.argmax(values)), int(np.argmin(values)), int(np.argmin(np.abs(values - data["threshold"])))} <= shown


def test_curves_of_smoothed_rise_while_samples_are_forgotten(tmp_path, byte_tokenizer):
    """Each record's values are measured by its own typical change; the page draws all of them by that of the last."""
    trace, unsafe = hostile_trace(tmp_path / "trace", byte_tokenizer, samples=60)
    states = np.where(unsafe[:, None], [1.0, 0.0], [0.0, 1.0]).astype(np.float16)
    with_states = Trace.create(tmp_path / "states", trace.rows, "tiny", None, None)
    for record in trace.records():
        with_states.append(record, [Scores(trace.token_losses(record), states)])
    result = write_review_page(with_states, tmp_path / "review.html", byte_tokenizer, measure="smoothed")
    html = (tmp_path / "review.html").read_text(encoding="utf-8")
    data = json.loads(html.split('<script id="data" type="application/json">')[1].split("</script>")[0])
    earlier, last = (np.frombuffer(base64.b64decode(values), "<f4") for values in data["forgetting"])
    np.testing.assert_allclose(last, result.values, rtol=1e-6)
    assert (earlier[unsafe] < 0.9 * last[unsafe]).all()
    assert (with_states.forgetting("smoothed", 4)[unsafe] > last[unsafe]).all()  # by its own typical change


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's first: a decoder that leaves out the space in front."""
    words = {word: place for place, word in enumerate(["<unk>", "▁the", "▁cat", "▁dog", "s", "▁naive"])}
    raw = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    raw.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_pieces_of_a_text_are_the_text(kind, byte_tokenizer):
    if kind == "bytes":
        tokenizer = byte_tokenizer
        tokens = np.array(tokenizer("the cat naïve 👩‍👩‍👧 dog")["input_ids"], np.int32)
    else:
        tokenizer, tokens = metaspace_tokenizer(), np.array([1, 2, 4, 1, 3, 4, 5], np.int32)
    loss_mask = np.arange(len(tokens)) >= 2
    prompt, pieces = split_text(tokenizer, tokens, loss_mask, np.arange(loss_mask.sum(), dtype=np.float32))
    assert prompt + "".join(piece for piece, _ in pieces) == tokenizer.decode(tokens)
    assert pieces[0][1] == 0.0 and all(rise is not None for _, rise in pieces)
    assert len(pieces) > 4
