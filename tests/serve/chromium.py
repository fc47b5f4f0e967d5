"""A browser for tests of pages: Debian's chromium, driven by Playwright; tests skip themselves without them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Yield a browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """Yield a page that shows a URL; at the end, nothing may have gone wrong in its scripts.

    Attributes added to the page: `asked` (URLs of all requests), `complaints` (errors and console errors).
    """
    context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}, "locale": "en-GB", **options})
    context.set_default_timeout(8000)
    page = context.new_page()
    page.asked, page.complaints = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.complaints.append(message.text))
    page.goto(url)
    try:
        yield page
        noted = [text for text in page.complaints if "Failed to load resource" not in text]  # a status a test wanted
        assert not noted, noted
    finally:
        context.close()


def send(page: Any, text: str) -> None:
    """Type a text and send it."""
    page.fill("#input", text)
    page.press("#input", "Enter")


def wait_for_answer(page: Any, text: str) -> None:
    """Wait until an answer with this text is complete."""
    page.locator("article.assistant[aria-busy=false]", has_text=text).wait_for()


def ask(page: Any, text: str, answer: str) -> None:
    """Send a text and wait for its answer."""
    send(page, text)
    wait_for_answer(page, answer)


def said(page: Any) -> list[str]:
    """Return what the conversation on the page says."""
    return [text.strip() for text in page.locator(".said, .prose").all_inner_texts()]
