"""Chats with any OpenAI-style URL: ours, vLLM, SGLang, llama.cpp, a hosted one. Standard library only.

    client = Client("http://127.0.0.1:8000")
    with client.chat([{"role": "user", "content": "hi"}], temperature=0) as reply:
        for text in reply:
            print(text, end="")
    reply.finished, reply.usage      # "stop", {"prompt_tokens": 9, …}

Leaving the block, `reply.close()` or Ctrl-C closes the connection, which ends the answer on the server. Settings go
into the request as they are, so that a server's own are possible too.

Limits: text only, one answer to a request. Redirects are not followed: they would take the key along.
"""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from internlm.errors import EngineError

_MOST_ERROR_BYTES = 65536
_MOST_SILENCE_SECONDS = 600.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine that no other can reach."""


class Refused(EngineError):
    """The server said no, or broke an answer off with an error of its own: then the `status` is 200.

    `code` is its word for it, such as "context_length_exceeded", where it has one.
    """

    def __init__(self, message: str, url: str, status: int, code: str | None, do: str | None = None) -> None:
        super().__init__(message, where=url, do=do)
        self.status, self.code = status, code


class Client:
    """Asks a server.

    Args:
        url: of the API, such as `http://127.0.0.1:8000/v1`; a bare host gets `/v1`, and a route's name at its end goes.
        model: its name there; None: the first that the server lists.
        api_key: sent as `Authorization: Bearer`.

    Raises:
        EngineError: the URL is none, or not http(s).
    """

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            known = False
        if not known:
            raise EngineError("is no URL of a server", where="url", got=url, allowed=["http://HOST:PORT", "https://…"])
        path = re.sub(r"(/chat)?/completions$", "", parts.path.rstrip("/")) or "/v1"
        self.url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        """Of the API, without a slash at its end."""
        self._model, self._key = model, api_key
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if parts.hostname in LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy's own loopback is not ours
        self._opener = urllib.request.build_opener(*handlers)

    @property
    def model(self) -> str:
        """The name that requests bear; EngineError where none was given and the server lists none."""
        if self._model is None:
            names = self.models()
            if not names:
                raise EngineError("the server lists no model", where=self.url, do="Name one.")
            self._model = names[0]
        return self._model

    def models(self) -> list[str]:
        """Return the names of the models that the server has; errors as of `chat`."""
        url = self.url + "/models"
        with self._open(url, None) as response:
            try:
                data = response.read()
            except (OSError, http.client.HTTPException) as error:
                raise _broken(url, error) from error
        try:
            return [str(entry["id"]) for entry in json.loads(data)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise _strange(url, data[:80]) from error

    def chat(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Streamed:
        """Return the answer to a conversation, piece by piece.

        Raises:
            EngineError: the server cannot be reached or breaks off, also while reading; `Refused`: it says no.
        """
        if settings.get("n", 1) != 1:
            raise EngineError("one answer at a time", where="n", got=settings["n"], allowed=[1])
        url = self.url + "/chat/completions"
        told = {"stream": True, "stream_options": {"include_usage": True}}
        response = self._open(url, {"model": self.model, "messages": list(messages), **settings, **told})
        kind = response.headers.get("Content-Type")
        if "event-stream" not in (kind or ""):
            with response:
                raise _strange(url, kind)
        return Streamed(response, url)

    def _open(self, url: str, body: dict[str, Any] | None) -> http.client.HTTPResponse:
        """Return the response to a GET, or with a body to a POST."""
        headers = {"Content-Type": "application/json", "User-Agent": "internlm"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            data = None if body is None else json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise EngineError(f"cannot be sent as JSON: {error}", where="settings") from error
        try:
            request = urllib.request.Request(url, data, headers)
            response: http.client.HTTPResponse = self._opener.open(request, timeout=_MOST_SILENCE_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                raise _refused(url, error) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise _broken(url, reason) from error
        return response


class Streamed(Iterator[str]):
    """An answer while it comes: the pieces of its text."""

    def __init__(self, response: http.client.HTTPResponse, url: str) -> None:
        self.finished: str | None = None
        """Why it ended, once it has: "stop", "length", …"""
        self.usage: dict[str, Any] | None = None
        """Tokens of prompt and answer, at the end, where the server tells."""
        self._response, self._url = response, url
        self._pieces = self._read()

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection: the server stops writing."""
        self._pieces.close()
        self._response.close()

    def _read(self) -> Generator[str]:
        with self._response:
            for data in self._events():
                if data == "[DONE]":
                    return
                try:
                    event = json.loads(data)
                    if event.get("error"):
                        message, code = _complaint(event)
                        raise Refused(message, self._url, self._response.status, code)
                    self.usage = event.get("usage") or self.usage
                    text = ""
                    for choice in event.get("choices", ()):
                        text += (choice.get("delta") or {}).get("content") or ""
                        self.finished = choice.get("finish_reason") or self.finished
                except (ValueError, TypeError, AttributeError) as error:
                    raise _strange(self._url, data[:80]) from error
                if text:
                    yield text
        if self.finished is None:
            raise _broken(self._url, "the answer broke off")

    def _events(self) -> Iterator[str]:
        """Yield the data of each server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
        lines: list[str] = []
        while True:
            try:
                raw = self._response.readline()
                line = raw.decode().rstrip("\r\n")
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _broken(self._url, error) from error
            if line.startswith("data:"):
                lines.append(line[5:].removeprefix(" "))
            elif not line and lines:  # a blank line ends an event; so does the end of the stream
                yield "\n".join(lines)
                lines = []
            if not raw:
                return


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none: the 3xx becomes an error."""


def _refused(url: str, error: urllib.error.HTTPError) -> Refused:
    try:
        text = error.read(_MOST_ERROR_BYTES).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    code: str | None = None
    try:
        message, code = _complaint(json.loads(text))
    except ValueError:
        message = " ".join(text.split())[:200] or str(error.reason)
    do = None
    if error.code in (401, 403):
        do = "Give the server's API key."
    elif 300 <= error.code < 400:
        do = f"It says to go to {error.headers.get('Location')}: give that URL if you trust it."
    elif error.code in (429, 503):
        do = f"Try again in {error.headers.get('Retry-After', 'a few')} seconds."
    return Refused(f"the server refuses ({error.code}): {message}", url, error.code, code, do)


def _complaint(body: Any) -> tuple[str, str | None]:
    """Return the message inside an error body, of the shapes that servers give it, and its code, if it is a word."""
    inner, code = body.get("error", body) if isinstance(body, dict) else body, None
    if isinstance(inner, dict):
        code = inner.get("code")
        inner = inner.get("message") or inner.get("detail") or inner
    message = inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)[:200]
    return message, code if isinstance(code, str) else None


def _broken(url: str, reason: object) -> EngineError:
    return EngineError(
        f"no answer from the server: {reason}", where=url, do="See whether it runs and the URL is right."
    )


def _strange(url: str, got: object) -> EngineError:
    return EngineError(
        "this is no answer of an OpenAI-style API", where=url, got=repr(got)[:120], do="Check the URL (often …/v1)."
    )
