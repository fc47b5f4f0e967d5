"""`internlm web`: the server of `internlm serve` gives the chat page, and a browser opens at its address."""

from __future__ import annotations

import functools
import os
import shlex
import signal
import threading
import urllib.request
import webbrowser
from pathlib import Path

import pytest

from internlm.cli import web
from internlm.serve.api.gate import Access
from internlm.weights import transformers as folders
from internlm.weights.talk import Talk
from internlm.weights.weight import of_tensors
from tests.processes import Fork, finish, until
from tests.serve.chromium import chromium, opened
from tests.serve.servers import (
    SHAPE,
    TOKENIZER,
    address_in,
    random_model,
    serving,
    slow_engine,
    tell_files,
    until_it_serves,
)


class Browser:
    def __init__(self) -> None:
        self.opened = threading.Event()
        self.url = ""

    def open(self, url: str) -> bool:
        self.url = url
        self.opened.set()
        return True


@pytest.mark.parametrize(
    ("address", "seen"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("https://0.0.0.0:81", "https://localhost:81"),
        ("http://[::]:81", "http://localhost:81"),
    ],
)
def test_the_browser_is_opened_where_it_can_reach_the_server(
    monkeypatch: pytest.MonkeyPatch, address: str, seen: str
) -> None:
    browser = Browser()
    monkeypatch.setattr(webbrowser, "get", lambda: browser)
    web.show(address)
    assert browser.opened.wait(5)
    assert browser.url == seen


def test_without_a_browser_the_address_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(webbrowser, "get", lambda: webbrowser.GenericBrowser("w3m"))
    web.show("http://127.0.0.1:8000")
    assert "open http://127.0.0.1:8000" in capsys.readouterr().err


def test_the_page_talks_to_the_real_server_and_its_stop_ends_the_answer() -> None:
    access = Access(keys=("secret",))
    with (
        serving(slow_engine(0.05), access=access) as server,
        chromium() as browser,
        opened(browser, server.url) as page,
    ):
        page.locator("#key").fill("secret")
        page.keyboard.press("Enter")
        page.locator("#ask-key").wait_for(state="hidden")
        assert page.locator("#model").evaluate("one => one.value") == "tiny"
        page.fill("#input", "hi")
        page.press("#input", "Enter")
        assert until(lambda: server.worker.stats.running == 1)
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for()
        assert until(lambda: (server.worker.stats.running, server.worker.stats.blocks_used) == (0, 0))
        server.engine.pause = 0.0
        page.get_by_role("button", name="Answer again").click()
        page.locator(".stats").wait_for()  # the usage came: the stream was read to its end


def test_the_verb_serves_a_model_and_opens_the_browser(tmp_path: Path) -> None:
    talk = Talk(TOKENIZER, "internlm")
    folders.export(of_tensors(random_model().named_parameters()), SHAPE, tmp_path / "model", talk)
    note = tmp_path / "opened"
    script = tmp_path / "browser"
    script.write_text(f'#!/bin/sh\nprintf %s "$1" > {shlex.quote(str(note))}.part && mv {note}.part {note}\n')
    script.chmod(0o755)
    hook = functools.partial(tell_files, str(tmp_path / "told"), str(tmp_path / "said"))
    words = ["web", str(tmp_path / "model"), "--device", "cpu", "--port", "0"]
    child = Fork(*words, hook=hook, BROWSER=f"{script} %s &")
    try:
        url = address_in(until_it_serves(child, tmp_path / "said")[-1])
        assert until(note.exists)
        assert note.read_text() == url
        with urllib.request.urlopen(url, timeout=30) as response:
            assert b'<main id="main">' in response.read()
            assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        os.kill(child.pid, signal.SIGTERM)
        assert finish(child, 30)[0] == 0
    finally:
        child.kill()
