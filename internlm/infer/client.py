"""The same requests to any OpenAI-style URL: ours, vLLM, SGLang, llama.cpp, a hosted one. Standard library only.

    client = Client("http://127.0.0.1:8000")
    with client.chat([{"role": "user", "content": "hi"}], temperature=0) as reply:
        for text in reply:
            print(text, end="")
    reply.finished, reply.usage      # "stop", {"prompt_tokens": 9, …}

Leaving the block, `reply.close()` or Ctrl-C closes the connection, which ends the answer on the server. Settings go
into the request as they are (`temperature=`, `max_tokens=`, `stop=`, …), so that a server's own are possible too.

Limits: text only (no tool calls), one answer to a request. Redirects are not followed: they would take the key along.
"""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from internlm.errors import EngineError

_MOST_ERROR_BYTES = 65536
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine that no other can reach."""


@dataclass(frozen=True)
class TokenScore:
    """How probable a token of a text was."""

    text: str
    logprob: float | None
    """Natural logarithm; None for a first token, which follows nothing."""
    top: Mapping[str, float]
    """The most probable tokens and their log-probabilities; how many is the server's choice."""


class Refused(EngineError):
    """The server said no, or broke an answer off with an error of its own.

    Args:
        message: what it says.
        url: what was asked.
        status: of the response; 200 where the error came in the midst of a stream.
        code: its word for it, such as "context_length_exceeded", where it has one.
        do: the next step.
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
        timeout: longest silence in seconds.

    Raises:
        EngineError: the URL is none, or not http(s).
    """

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None, timeout: float = 600.0) -> None:
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
        self.timeout = timeout
        self._model, self._key = model, api_key
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if parts.hostname in LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy's own loopback is not ours
        self._opener = urllib.request.build_opener(*handlers)

    @property
    def model(self) -> str:
        """The name that requests bear.

        Raises:
            EngineError: none was given and the server lists none.
        """
        if self._model is None:
            names = self.models()
            if not names:
                raise EngineError("the server lists no model", where=self.url, do="Name one.")
            self._model = names[0]
        return self._model

    def models(self) -> list[str]:
        """Return the names of the models that the server has.

        Raises:
            EngineError: it cannot be reached, refuses, or answers in another form.
        """
        found = self._ask("/models")
        try:
            return [str(entry["id"]) for entry in found["data"]]
        except (KeyError, TypeError) as error:
            raise _strange(self.url + "/models", found) from error

    def chat(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Streamed:
        """Return the answer to a conversation, piece by piece.

        Args:
            messages: `{"role": …, "content": …}`.
            settings: as of the API's chat completions.

        Raises:
            EngineError: the server cannot be reached or refuses (`Refused`); while reading: it broke off, or reports an
                error (`Refused`).
        """
        return self._stream("/chat/completions", {"messages": list(messages), **settings})

    def complete(self, prompt: str | Sequence[int], **settings: Any) -> Streamed:
        """Return how a text, or its ids, goes on, piece by piece; settings and errors as of `chat`."""
        return self._stream("/completions", {"prompt": prompt if isinstance(prompt, str) else list(prompt), **settings})

    def score(self, prompt: str | Sequence[int]) -> list[TokenScore]:
        """Return how probable each token of a text, or of its ids, was.

        Raises:
            EngineError: the server cannot be reached, refuses, or does not tell (it needs `echo` with `logprobs`).
        """
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        # One token is written and left out again: some servers refuse to write none.
        body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        found = self._ask("/completions", body)
        try:
            told = found["choices"][0]["logprobs"]
            texts, logprobs = told["tokens"], told["token_logprobs"]
            tops = told.get("top_logprobs") or [{}] * len(texts)
            count = (found.get("usage") or {}).get("prompt_tokens", len(texts) - 1)
            scores = [TokenScore(t, p, top or {}) for t, p, top in zip(texts, logprobs, tops, strict=True)]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise _strange(self.url + "/completions", found) from error
        if len(scores) < count:
            problem = f"tells of {len(scores)} tokens, and the prompt has {count}"
            raise EngineError(problem, where=self.url, do="The server must support `echo` together with `logprobs`.")
        return scores[:count]

    def _stream(self, path: str, body: dict[str, Any]) -> Streamed:
        if body.get("n", 1) != 1:
            raise EngineError("one answer at a time", where="n", got=body["n"], allowed=[1])
        body = {"model": self.model, **body, "stream": True, "stream_options": {"include_usage": True}}
        response = self._open(path, body)
        if "event-stream" not in response.headers.get("Content-Type", ""):
            with response:
                raise _strange(self.url + path, response.headers.get("Content-Type"))
        return Streamed(response, self.url + path)

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON that comes back."""
        with self._open(path, body) as response:
            try:
                data = response.read()
            except (OSError, http.client.HTTPException) as error:
                raise _broken(self.url + path, error) from error
        try:
            return json.loads(data)
        except ValueError as error:
            raise _strange(self.url + path, data[:80]) from error

    def _open(self, path: str, body: dict[str, Any] | None) -> http.client.HTTPResponse:
        """Return the response to a GET, or with a body to a POST."""
        headers = {"Content-Type": "application/json", "User-Agent": "internlm"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            data = None if body is None else json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise EngineError(f"cannot be sent as JSON: {error}", where="settings") from error
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            response: http.client.HTTPResponse = self._opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise _refused(self.url + path, error) from error
        except urllib.error.URLError as error:
            raise _broken(self.url + path, error.reason) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _broken(self.url + path, error) from error
        return response


class Streamed(Iterator[str]):
    """An answer while it comes: the pieces of its text."""

    def __init__(self, response: http.client.HTTPResponse, url: str) -> None:
        self.finished: str | None = None
        """Why it ended, once it has: "stop", "length", …"""
        self.usage: dict[str, Any] | None = None
        """Tokens of prompt and answer, where the server tells; it comes last."""
        self._response, self._url = response, url
        self._pieces = self._read()

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; nothing more comes, and the server stops writing."""
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
                        raise Refused(_message(event), self._url, self._response.status, _code(event))
                    self.usage = event.get("usage") or self.usage
                    text = ""
                    for choice in event.get("choices", ()):
                        text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
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
    """Return what a status other than 2xx means."""
    try:
        text = error.read(_MOST_ERROR_BYTES).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    code: str | None = None
    try:
        body = json.loads(text)
        message, code = _message(body), _code(body)
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


def _message(body: Any) -> str:
    """Return the complaint inside an error body, of the shapes that servers give it."""
    inner = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(inner, dict):
        inner = inner.get("message") or inner.get("detail") or inner
    return inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)[:200]


def _code(body: Any) -> str | None:
    """Return the code inside an error body, if it is a word."""
    inner = body.get("error", body) if isinstance(body, dict) else body
    found = inner.get("code") if isinstance(inner, dict) else None
    return found if isinstance(found, str) else None


def _broken(url: str, reason: object) -> EngineError:
    return EngineError(
        f"no answer from the server: {reason}", where=url, do="See whether it runs and the URL is right."
    )


def _strange(url: str, got: object) -> EngineError:
    return EngineError(
        "this is no answer of an OpenAI-style API", where=url, got=repr(got)[:120], do="Check the URL (often …/v1)."
    )
