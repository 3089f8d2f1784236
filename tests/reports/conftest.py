"""A browser for the tests of the two pages."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import CHROMIUM, hostile_trace
from playwright.sync_api import sync_playwright

from forgetfilter_callback import FilterConfig
from forgetfilter_callback.measures import common
from forgetfilter_callback.reports.review_page import write_review_page
from forgetfilter_callback.trace.stored_column import StoredColumn


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        # Chromium's sandbox does not work in containers.
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def loss_reads(monkeypatch) -> list[int]:
    """How many losses each read of a record returned. A part of a record has at most 500."""
    monkeypatch.setattr(common, "WINDOW_TOKENS", 500)
    read, lengths = StoredColumn.__getitem__, []

    def remember(column: StoredColumn, span: slice) -> np.ndarray:
        values = read(column, span)
        if values.dtype == np.float32:
            lengths.append(len(values))
        return values

    monkeypatch.setattr(StoredColumn, "__getitem__", remember)
    return lengths


@pytest.fixture
def plain_page(browser, tmp_path_factory, byte_tokenizer):
    """The page of a trace without sources and verdicts."""
    tmp_path = tmp_path_factory.mktemp("plain")  # `tmp_path` has the name of the test, and the page names the folder
    trace, _ = hostile_trace(tmp_path / "trace", byte_tokenizer, samples=30)
    write_review_page(trace, tmp_path / "review.html", byte_tokenizer, FilterConfig("loss"))
    opened = browser.new_page()
    opened.goto((tmp_path / "review.html").as_uri())
    opened.wait_for_selector("#rows tr")
    yield opened
    opened.close()
