"""`internlm web`."""

from __future__ import annotations

import argparse
import sys
import threading
import urllib.parse
import webbrowser

from internlm.cli import serve

DESCRIPTION = """\
Serve a model and open the chat page in the browser.

  internlm web out
  internlm web out --port 8080

The options are those of `internlm serve`. Conversations stay in the browser, by address: keep the port to find them
again. Ctrl-C ends the server."""


add_arguments = serve.add_arguments


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    return serve.run(arguments, ready=show)


def show(url: str) -> None:
    """Open a browser at the server's address, or say where to look."""
    parts = urllib.parse.urlsplit(url)
    if parts.hostname in ("0.0.0.0", "::"):  # every address of this machine: the browser needs one
        url = f"{parts.scheme}://localhost:{parts.port}"
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        browser = None
    # A GenericBrowser runs inside the terminal (lynx, w3m): no JavaScript, and the server's messages are there.
    if browser is None or type(browser) is webbrowser.GenericBrowser:
        print(f"no browser found here: open {url}", file=sys.stderr, flush=True)
        return
    threading.Thread(target=browser.open, args=(url,), daemon=True).start()  # some browsers return when they are closed
