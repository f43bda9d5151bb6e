"Headless Chromium for the tests of pages: Debian's or Chrome's own binary, with no way out to any other machine."
import os, shutil
from contextlib import contextmanager

import pytest

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic"]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str:
    "Path of the browser; without one the test is skipped, or fails where REQUIRE_BROWSER is set."
    if path := next(filter(None, map(shutil.which, NAMES)), None): return path
    said = f"no browser on PATH (looked for {', '.join(NAMES)})"
    pytest.fail(said) if os.environ.get("REQUIRE_BROWSER") else pytest.skip(said)


@contextmanager
def open_browser():
    "A browser whose pages record what they ask for and complain about."
    sync_api = pytest.importorskip("playwright.sync_api")
    path = chromium()
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=ARGS)
        yield browser
        browser.close()


def watched(browser, home: str, **kwargs):
    "A page, the list of requests that went anywhere but `home` (they are cut off), and the list of console errors."
    page, away, errors = browser.new_page(**kwargs), [], []
    page.set_default_timeout(120_000)   # a loaded machine is slow, not wrong
    def gate(route):
        url = route.request.url
        if url.startswith((home, "data:", "blob:")): return route.continue_()
        away.append(url)
        route.abort()
    page.route("**/*", gate)
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    return page, away, errors
