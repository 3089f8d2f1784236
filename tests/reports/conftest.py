"""A browser for the tests of the two pages."""

from __future__ import annotations

import pytest
from helpers import CHROMIUM
from playwright.sync_api import sync_playwright


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        # Chromium's sandbox does not work in containers.
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()
