"""Take the pictures of the two review pages: `python docs/tools/screenshots.py forgetfilter-demo`.

The argument is the output folder of `forgetfilter demo`, or of another run. It is not changed. Needs Chromium.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from threading import Thread
from typing import Annotated

import typer
from playwright.sync_api import Browser, sync_playwright

from forgetfilter_callback import Trace
from forgetfilter_callback.data.decode import load_decoder
from forgetfilter_callback.reports.review_page import write_review_page
from forgetfilter_callback.reports.review_server.serve import review_server
from forgetfilter_callback.trace.source_files import find_tokenizer
from forgetfilter_callback.trace.trace_folder import find_trace_folder


IMAGES = Path(__file__).parent.parent / "images"
WIDTH = 1300


def main(
    run: Annotated[Path, typer.Argument(help="Output folder of a run.")],
    images: Annotated[Path, typer.Option(help="Folder of the pictures.")] = IMAGES,
) -> None:
    decoder = load_decoder(find_tokenizer(Trace.open(run)))
    images = images.absolute()
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as driver:
        # A review writes into the trace. Verdicts of an earlier one are left out.
        copy = Path(temporary) / "out" / "_forgetfilter"
        shutil.copytree(find_trace_folder(run), copy, ignore=shutil.ignore_patterns("review"))
        os.chdir(temporary)  # the page shows the path of the trace
        trace = Trace.open("out/_forgetfilter")
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        write_review_page(trace, Path(temporary) / "review.html", decoder)
        take(browser, (Path(temporary) / "review.html").as_uri(), "#rows tr", 1000, images / "review.png")
        to_filter = "forgetfilter filter out --reviewed out/_forgetfilter/review --output reviewed"
        with review_server(trace, decoder, to_filter) as running:
            thread = Thread(target=running.server.serve_forever)
            thread.start()
            take(browser, running.address, "#similar .other", 800, images / "review_rows.png")
            running.server.shutdown()
            thread.join()
        browser.close()


def take(browser: Browser, address: str, shown: str, height: int, file: Path) -> None:
    page = browser.new_page(viewport={"width": WIDTH, "height": height})
    page.goto(address)
    page.wait_for_selector(shown)
    page.wait_for_timeout(500)  # the plots appear
    page.screenshot(path=file)
    page.close()


if __name__ == "__main__":
    typer.run(main)
