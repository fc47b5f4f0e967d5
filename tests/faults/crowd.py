"""A crowd of clients, as a process of its own: asks a server many things at once and checks every answer exactly.

    python -m tests.faults.crowd http://127.0.0.1:8000 --requests 10000 --clients 64 --seed 1

Most requests push one letter so far up (`logit_bias`) that the whole answer is known beforehand: an answer that went to
the wrong client, lost a token or was told twice is seen. Some leave: at the headers, before the first token, in the
midst; some are wrong on purpose. Prints `{"done": …}` now and then, and a summary as the last line. Raw sockets and no
heavy import: what is measured is the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import string
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
SHARED = "the cat sat on the mat. " * 4
_LETTERS = random.Random(0)
WORDS = ["".join(_LETTERS.choices("abcdefgh", k=_LETTERS.randint(1, 8))) for _ in range(500)]
"""What they write: people repeat their words, and the tokenizers library keeps each new one, up to 10,000 a thread."""
PATTERNS = ("[a-c]{3,8}", "(yes|no)", "[0-9]{2}:[0-9]{2}")
WRONG: tuple[tuple[str, bytes | dict[str, Any], int], ...] = (
    (CHAT, b"{", 400),
    (CHAT, {"messages": []}, 400),
    (CHAT, {"messages": [{"role": "user", "content": "a"}], "model": "none"}, 404),
    (COMPLETE, {"prompt": [5] * 400}, 400),
    (COMPLETE, {"prompt": "a", "temperature": -1}, 400),
    (COMPLETE, {"prompt": "a", "n": 1000}, 400),
    ("/v1/nothing", {}, 404),
)
PROGRESS = 50


class Wrong(Exception):
    """A server's answer is not what it has to be."""


class TurnedAway(Exception):
    """The server takes no more, and says so with 503."""


class Unanswered(TurnedAway):
    """It refused the connection, or closed it without an answer."""


@dataclass
class Ask:
    """One request."""

    path: str
    body: bytes | dict[str, Any]
    status: int = 200
    letter: str | None = None
    """What the answer is made of."""
    pattern: str | None = None
    """What it must match instead."""
    leaves: str | None = None
    """When the client goes away: "headers", "sent", "first" or "middle"."""

    def want(self) -> tuple[str, str, int]:
        """Return the text of each answer, why it ends, and its tokens."""
        assert isinstance(self.body, dict)
        assert self.letter is not None
        most = self.body["max_tokens"]
        text, reason = self.letter * most, "length"
        if "stop" in self.body and most >= len(self.body["stop"]):
            text, reason, most = "", "stop", len(self.body["stop"])
        return (self.body["prompt"] if self.body.get("echo") else "") + text, reason, most


@dataclass
class Crowd:
    """What all clients share."""

    host: str
    port: int
    left: int
    """Requests still to send."""
    longest: int
    """Tokens of the longest answers."""
    may_end: bool
    """Whether the server may stop in the midst, so that answers are cut and requests turned away."""
    random: random.Random
    ids: dict[str, int] = field(default_factory=dict)
    """The token of each letter."""
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[dict[str, Any]] = field(default_factory=list)
    unanswered: list[float] = field(default_factory=list)
    """When requests were sent (`time.monotonic`) whose connection was then closed, or refused, without an answer."""
    cut: int = 0
    """Answers that the server's end cut short."""

    def ask(self) -> Ask:
        """Return the next request."""
        draw = self.random
        kind = draw.random()
        if kind < 0.04:
            return Ask(*draw.choice(WRONG))
        leaves = draw.choice(("headers", "sent", "first", "middle")) if kind < 0.2 else None
        body: dict[str, Any] = {
            "temperature": draw.choice((0, 0.7, 1.0)),
            "max_tokens": draw.choice((1, 2, 4, 8, 16, self.longest)),
            "ignore_eos": True,
            "n": draw.choice((1, 1, 1, 1, 2, 3)),
        }
        letter = pattern = None
        if draw.random() < 0.04:
            pattern = draw.choice(PATTERNS)
            body |= {"response_format": {"type": "regex", "regex": pattern}, "max_tokens": 16}
        else:
            letter = draw.choice(list(self.ids))
            body["logit_bias"] = {str(self.ids[letter]): 100}
            if draw.random() < 0.1:
                body["stop"] = letter * 5
        text = draw.choice(("", SHARED, SHARED)) + " ".join(draw.choices(WORDS, k=draw.choice((1, 2, 10))))
        if draw.random() < 0.5:
            path = CHAT
            body["messages"] = [{"role": "user", "content": text}]
        else:
            path = COMPLETE
            body["prompt"] = text
            body |= {"echo": True} if letter and draw.random() < 0.2 else {}
        if leaves in ("first", "middle") or draw.random() < 0.6:
            body["stream"] = True
            body |= {"stream_options": {"include_usage": True}} if draw.random() < 0.5 else {}
        return Ask(path, body, letter=letter, pattern=pattern, leaves=leaves)

    def judge(self, ask: Ask, answers: list[tuple[str, str]], usage: dict[str, Any] | None) -> None:
        """Check the text of each answer and why it ended, and what was counted.

        Raises:
            Wrong: one of them.
        """
        body = ask.body
        assert isinstance(body, dict)
        cut = [reason == "abort" for _, reason in answers]
        if len(answers) != body["n"] or (any(cut) and not self.may_end):
            raise Wrong(f"{body['n']} answers were wanted: {answers}")
        self.cut += sum(cut)
        for text, reason in (answer for answer, is_cut in zip(answers, cut, strict=True) if not is_cut):
            if ask.letter is not None and (text, reason) != ask.want()[:2]:
                raise Wrong(f"{text!r}, which ended by {reason}; {ask.want()} was wanted")
            if ask.pattern is not None and (reason != "stop" or not re.fullmatch(ask.pattern, text)):
                raise Wrong(f"{text!r}, which ended by {reason}, does not match {ask.pattern}")
        if usage is None:
            return
        written = usage["completion_tokens"]
        if usage["total_tokens"] != usage["prompt_tokens"] + written or not usage["prompt_tokens"]:
            raise Wrong(f"usage does not add up: {usage}")
        if ask.letter is not None and not any(cut) and written != body["n"] * ask.want()[2]:
            raise Wrong(f"{written} tokens were counted, {body['n']} · {ask.want()[2]} were wanted")


class Client:
    """One client: it keeps its connection where it can.

    Args:
        crowd: that it belongs to.
    """

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def work(self) -> None:
        """Ask until nothing is left to ask, or the server takes no more."""
        crowd = self.crowd
        while crowd.left > 0:
            crowd.left -= 1
            ask, since = crowd.ask(), time.monotonic()
            try:
                outcome = await self.one(ask)
            except TurnedAway as error:
                self.leave()
                if crowd.may_end:
                    crowd.outcomes["turned away"] += 1
                    crowd.unanswered += [since] if isinstance(error, Unanswered) else []
                    return
                self.note(ask, since, error)
            except (Wrong, OSError, EOFError, ValueError, LookupError, asyncio.LimitOverrunError) as error:
                self.leave()
                self.note(ask, since, error)
            else:
                crowd.outcomes[outcome] += 1
            if sum(crowd.outcomes.values()) % PROGRESS == 0:
                print(json.dumps({"done": sum(crowd.outcomes.values())}), flush=True)

    def note(self, ask: Ask, since: float, error: Exception) -> None:
        """Keep what went wrong."""
        self.crowd.outcomes["lost"] += 1
        told = {"since": since, "at": time.monotonic(), "problem": f"{type(error).__name__}: {error}"}
        self.crowd.problems.append({**told, "path": ask.path, "body": str(ask.body)[:300]})

    async def one(self, ask: Ask) -> str:
        """Ask one thing and return how it ended."""
        raw = ask.body if isinstance(ask.body, bytes) else json.dumps(ask.body).encode()
        head = f"POST {ask.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
        request = head.encode() + b"\r\n\r\n" + raw
        await self.send(request[: len(head) // 2] if ask.leaves == "headers" else request)
        if ask.leaves in ("headers", "sent"):
            await asyncio.sleep(self.crowd.random.choice((0, 0, 0.01, 0.05)))
            self.leave()
            return "left"
        status, headers = await self.head()
        if status == 503 and self.crowd.may_end:
            raise TurnedAway
        if status != ask.status:
            raise Wrong(f"status {status}: {(await self.body(headers))[:300]!r}")
        if status != 200:
            message = json.loads(await self.body(headers))["error"]["message"]
            outcome = "refused" if message else "lost"
        elif ask.leaves == "first":
            self.leave()
            return "left"
        elif headers.get("transfer-encoding") == "chunked":
            outcome = await self.stream(ask)
        else:
            found = json.loads(await self.body(headers))
            field_ = "message" if ask.path == CHAT else "text"
            said = [(c[field_]["content"] if ask.path == CHAT else c[field_], c) for c in found["choices"]]
            if [choice["index"] for _, choice in said] != list(range(len(said))):
                raise Wrong("choices are out of order")
            self.crowd.judge(ask, [(text, choice["finish_reason"]) for text, choice in said], found["usage"])
            outcome = "answered"
        if headers.get("connection") == "close":
            self.leave()
        return outcome

    async def stream(self, ask: Ask) -> str:
        """Read a stream to its end, or leave it."""
        assert isinstance(ask.body, dict)
        texts: dict[int, str] = dict.fromkeys(range(ask.body["n"]), "")
        reasons: dict[int, str] = {}
        usage: dict[str, Any] | None = None
        stays = self.crowd.random.randrange(1, 12) if ask.leaves == "middle" else -1
        last = ""
        async for event in self.events():
            if last == "[DONE]":
                raise Wrong("something came after [DONE]")
            last = event
            stays -= 1
            if stays == 0:
                self.leave()
                return "left"
            if event == "[DONE]":
                continue
            chunk = json.loads(event)
            if "error" in chunk:
                raise Wrong(chunk["error"]["message"])
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                index = choice["index"]
                if index in reasons:
                    raise Wrong("an answer goes on after its end")
                texts[index] += choice["delta"].get("content", "") if ask.path == CHAT else choice["text"]
                if choice["finish_reason"]:
                    reasons[index] = choice["finish_reason"]
        if last != "[DONE]":
            raise Wrong(f"the stream ended without [DONE], after {last[:200]}")
        if reasons.keys() != texts.keys():
            raise Wrong(f"of {len(texts)} answers {len(reasons)} have a finish_reason")
        if "stream_options" in ask.body and usage is None:
            raise Wrong("the usage is missing")
        self.crowd.judge(ask, [(texts[i], reasons[i]) for i in texts], usage)
        return "answered"

    async def send(self, request: bytes) -> None:
        """Write, on the connection that stands or a new one."""
        try:
            if self.writer is None:
                self.reader, self.writer = await asyncio.open_connection(self.crowd.host, self.crowd.port)
            self.writer.write(request)
            await self.writer.drain()
        except OSError as error:
            raise Unanswered(str(error)) from error

    async def head(self) -> tuple[int, dict[str, str]]:
        """Read status and headers."""
        assert self.reader is not None
        try:
            raw = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, OSError) as error:
            if not getattr(error, "partial", b""):
                raise Unanswered("closed without an answer") from error
            raise
        first, *lines = raw.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines if line)
        return int(first.split()[1]), {name.lower(): value.strip().lower() for name, _, value in pairs}

    async def body(self, headers: dict[str, str]) -> bytes:
        """Read a body of known length."""
        assert self.reader is not None
        return await self.reader.readexactly(int(headers["content-length"]))

    async def events(self) -> Any:
        """Yield the data of each event of a chunked body."""
        assert self.reader is not None
        rest = b""
        while size := int(await self.reader.readline(), 16):
            rest += await self.reader.readexactly(size)
            await self.reader.readexactly(2)
            *whole, rest = rest.split(b"\n\n")
            for event in whole:
                if event.startswith(b"data: "):
                    yield event.removeprefix(b"data: ").decode()
        await self.reader.readexactly(2)
        if rest:
            raise Wrong(f"half an event at the end: {rest[:100]!r}")

    def leave(self) -> None:
        """Close the connection, in order or not."""
        if self.writer is not None:
            if self.crowd.random.random() < 0.5:
                self.writer.transport.abort()  # RST
            else:
                self.writer.close()
        self.reader = self.writer = None


async def letters(crowd: Crowd) -> dict[str, int]:
    """Ask the server for the token of each letter."""
    client, found = Client(crowd), {}
    for letter in string.ascii_lowercase:
        raw = json.dumps({"prompt": letter, "add_special_tokens": False}).encode()
        await client.send(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                          b"Content-Length: %d\r\n\r\n" % len(raw) + raw)  # fmt: skip
        _, headers = await client.head()
        (found[letter],) = json.loads(await client.body(headers))["tokens"]
    client.leave()
    return found


async def run(crowd: Crowd, clients: int) -> None:
    """Let all clients work."""
    crowd.ids = await letters(crowd)
    await asyncio.gather(*(Client(crowd).work() for _ in range(clients)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=int, default=24)
    parser.add_argument("--may-end", action="store_true", help="the server may stop in the midst")
    given = parser.parse_args()
    host, port = given.url.removeprefix("http://").split(":")
    crowd = Crowd(host, int(port), given.requests, given.longest, given.may_end, random.Random(given.seed))
    asyncio.run(run(crowd, given.clients))
    told = {"outcomes": crowd.outcomes, "problems": crowd.problems[:20], "unanswered": crowd.unanswered}
    told["cut"] = crowd.cut
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
