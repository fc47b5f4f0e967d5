"""The chat page that the server shows at `/`: static files, read once.

    for path, file in web.files().items():
        serve(path, file.content, file.kind)

The page talks to the server that gave it (`GET /v1/models`, `POST /v1/chat/completions`) and to nothing else, as its
Content-Security-Policy says. Only the paths listed here exist, so a request can name no other file. They hold nothing
secret and are served without a key: the page itself asks for one.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass

KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""Media type by ending. What has another ending is no part of the page."""


@dataclass(frozen=True)
class File:
    """One file of the page."""

    content: bytes
    kind: str
    """Value of the Content-Type header."""


def files() -> dict[str, File]:
    """Return the files of the page by their path on the server; `/` is the page itself."""
    found = {}
    for entry in importlib.resources.files(__name__).iterdir():
        kind = KINDS.get(entry.name.rpartition(".")[2])
        if kind is not None:
            found["/" + entry.name] = File(entry.read_bytes(), kind)
    found["/"] = found.pop("/index.html")
    return found
