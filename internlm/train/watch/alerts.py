"""Messages to people: what happens to a run goes to webhooks, and a run never waits for them.

    alerts = Alerts.open(config, run)
    alerts.tell("spike", "loss 9.1 lies 20 spreads above the last 128")     # any thread; returns at once
    alerts.close(5.0)                                                       # what is not sent by then is dropped

Of a kind one message is sent in `interval_s`, whichever process of the run says it and however often it is started
again: the time of the last is that of the file RUN/alerts/<kind>. A message that cannot be sent is one warning per
webhook, without its address.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import html
import http.client
import json
import logging
import os
import queue
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from internlm.config import require, section
from internlm.errors import ConfigError, first_line
from internlm.log import duration
from internlm.train.stop import Stopped

logger = logging.getLogger(__name__)

Kind = Literal["start", "spike", "skipped", "straggler", "stall", "checkpoint", "failure", "preempted", "end"]

FOLDER = "alerts"
_HELD = 64
"""Messages that wait for a webhook; more are dropped."""
_TRIES = 3
_FIRST_PAUSE_S = 1.0
"""Between two tries; twice as long before each further one."""
_OF_ANY_RANK = ("stall", "failure")
"""What only the rank that it happens to may know; the rest is told by rank 0."""
_MARKS = {"failure": "✖", "stall": "✖", "start": "▶", "end": "✔"}


@section
class WebhookConfig:
    """An address that messages are sent to."""

    url: str
    """An http(s) address, or `$NAME`: the environment variable that holds it. What gives access belongs in one:
    the recipe is written into the run folder and its checkpoints."""
    kind: Literal["feishu", "slack", "json"] = "json"
    """Format of the messages: `feishu` (Lark too), `slack`, or plain `json`."""
    secret: str | None = None
    """Feishu: signs the messages. `$NAME` as above."""
    events: tuple[Kind, ...] = ("spike", "skipped", "straggler", "stall", "checkpoint", "failure", "preempted", "end")
    """What is told: `start`, `spike`, `skipped` (a step without update), `straggler`, `stall`, `checkpoint` (one could
    not be written), `failure`, `preempted` (asked to end before its time), `end`."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("$", "http://", "https://")):
            raise ConfigError("must be an http(s) address, or $NAME", where="alerts.webhooks.url")
        if self.secret is not None and self.kind != "feishu":
            raise ConfigError("is for kind feishu only", where="alerts.webhooks.secret")


@section
class AlertsConfig:
    """Who is told what happens."""

    webhooks: tuple[WebhookConfig, ...] = ()
    """Where messages go."""
    interval_s: float = 300.0
    """Of each kind one message in so long a time; the next says how many were left out."""
    timeout_s: float = 10.0
    """For one try to send one."""

    def __post_init__(self) -> None:
        if not self.interval_s >= 0:  # what is not a number neither
            raise ConfigError("must not be negative", where="alerts.interval_s", got=self.interval_s)
        require(self, "alerts", ("timeout_s",), lambda seconds: seconds > 0, "must be above 0")


@dataclass(frozen=True)
class Message:
    """What happened, where and when."""

    kind: str
    text: str
    run: str
    step: int
    host: str
    rank: int
    time: float
    """Seconds since 1970."""
    left_out: int
    """Messages of this kind that this process did not send since the last."""

    def __str__(self) -> str:
        more = f"\n{self.left_out} more of this kind since the last message" if self.left_out else ""
        where = f"run {self.run} · step {self.step} · {self.host} rank {self.rank}"
        return f"{_MARKS.get(self.kind, '⚠')} {self.kind}: {self.text}\n{where}{more}"


class Alerts:
    """The webhooks of a run, see `open`. Without one nothing is done."""

    def __init__(self, config: AlertsConfig | None = None, run: Path = Path("."), rank: int = 0) -> None:
        self.config, self.run, self.rank = config or AlertsConfig(), run, rank
        self.step: Callable[[], int] = lambda: 0
        """Says at which step the run is."""
        self._hooks = [
            _Webhook(f"alerts.webhooks[{number}]", hook, self.config.timeout_s)
            for number, hook in enumerate(self.config.webhooks)
        ]
        self._told: dict[str, float] = {}
        self._left_out: Counter[str] = Counter()
        self._failure: Exception | None = None
        """The last that was told."""
        self._lock = threading.Lock()

    @classmethod
    def open(cls, config: AlertsConfig, run: Path, rank: int = 0) -> Alerts:
        """Return the webhooks of a section, with addresses and secrets taken from the environment.

        Raises:
            ConfigError: on rank 0, a variable is not set, or holds no address; other ranks leave such a webhook out.
        """
        found = []
        for number, hook in enumerate(config.webhooks):
            place = f"alerts.webhooks[{number}]"
            try:
                url, secret = _resolve(hook.url, f"{place}.url"), _resolve(hook.secret, f"{place}.secret")
                if not url or urllib.parse.urlsplit(url).scheme not in ("http", "https"):
                    raise ConfigError(f"{hook.url} holds no http(s) address", where=f"{place}.url")
            except ConfigError:
                if rank == 0:
                    raise
                continue
            found.append(replace(hook, url=url, secret=secret))
        return cls(replace(config, webhooks=tuple(found)), run, rank)

    def tell(self, kind: Kind, text: str) -> None:
        """Send a message to whom it concerns, soon. Any thread may call it; it neither waits nor raises."""
        hooks = [hook for hook in self._hooks if kind in hook.config.events]
        if not hooks or (self.rank and kind not in _OF_ANY_RANK):
            return
        with self._lock:
            if not self._is_due(kind):
                self._left_out[kind] += 1
                return
            left_out = self._left_out.pop(kind, 0)
        where = str(self.run), self.step(), socket.gethostname(), self.rank
        for hook in hooks:
            hook.put(Message(kind, text, *where, time.time(), left_out))

    @contextlib.contextmanager
    def around(self, total: int) -> Iterator[None]:
        """Tell how a training of `total` steps begins and how it ends, and send what is left to send."""
        begun = time.monotonic()
        try:
            with self.failing():
                self.tell("start", f"begins at step {self.step()} of {total}")
                yield
                self.tell("end", f"done: {total} steps, the last after {duration(time.monotonic() - begun)}")
        except Stopped as stopped:
            self.tell("preempted", f"stopped at step {self.step()} of {total}, with a checkpoint: {stopped}")
            raise
        finally:
            self.close()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Tell of an error that ends the block, and wait until it is sent. Blocks may lie in each other."""
        try:
            yield
        except Stopped:
            raise
        except Exception as error:
            if self._failure is None or self._failure not in (error, error.__cause__, error.__context__):
                self._failure = error
                self.tell("failure", f"{type(error).__name__}: {first_line(error)[:500]}")
                self.close()
            raise

    def close(self, seconds: float = 5.0) -> None:
        """Wait until all is sent, but no longer than that. Messages may still be told afterwards."""
        until = time.monotonic() + seconds
        for hook in self._hooks:
            hook.flush(until)

    def _is_due(self, kind: str) -> bool:
        """Return whether a message of this kind is sent now, and note that it is."""
        if kind == "end":
            return True
        now = time.monotonic()
        if kind in self._told and now - self._told[kind] < self.config.interval_s:
            return False
        self._told[kind] = now
        return _claim(self.run / FOLDER / kind, self.config.interval_s)


def _resolve(value: str | None, place: str) -> str | None:
    """Return a value, or that of the environment variable it names."""
    if value is None or not value.startswith("$"):
        return value
    name = value[1:].strip("{}")
    if not os.environ.get(name):
        raise ConfigError(f"the environment variable {name} is not set", where=place, do="Export it, or remove it.")
    return os.environ[name].strip()


def _claim(path: Path, interval_s: float) -> bool:
    """Return whether no process made this claim within the interval; of several that ask at once one is told so.

    Where the folder cannot be written the answer is yes: rather a message twice than none.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if 0 <= time.time() - path.stat().st_mtime < interval_s:
                return False
            aside = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}")
            os.rename(path, aside)  # of several, one succeeds
            aside.unlink()
        except FileNotFoundError:
            pass
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return True
    except OSError:
        return True
    return False


class _Webhook:
    """One address, with a queue and a thread of its own: one that hangs delays no other."""

    def __init__(self, place: str, config: WebhookConfig, timeout_s: float) -> None:
        self.config, self.timeout_s = config, timeout_s
        self.name = f"{place} ({config.kind} at {urllib.parse.urlsplit(config.url).hostname})"
        self._queue: queue.Queue[Message] = queue.Queue(_HELD)
        self._is_known_to_fail = False
        self._hurries = threading.Event()
        """Set when the run ends: no more pauses."""
        threading.Thread(target=self._work, name="alerts", daemon=True).start()

    def put(self, message: Message) -> None:
        """Take a message that the thread will send."""
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self._warn("messages are dropped: too many wait")

    def flush(self, until: float) -> None:
        """Wait for what is queued, up to a moment of the monotonic clock."""
        self._hurries.set()
        while self._queue.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.01)
        if self._queue.unfinished_tasks:
            self._warn(f"{self._queue.unfinished_tasks} messages were not sent before the end")
        self._hurries.clear()

    def _work(self) -> None:
        while True:
            message = self._queue.get()
            try:
                self._send(message)
            except Exception as error:  # whatever is wrong with it, the run goes on
                self._warn(f"failed: {type(error).__name__}")
            finally:
                self._queue.task_done()

    def _send(self, message: Message) -> None:
        for attempt in range(_TRIES):
            if attempt:
                self._hurries.wait(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            problem, is_final = self._post(message)
            if not problem or is_final:
                break
        if problem:
            self._warn(f"a message was not sent: {problem}")

    def _post(self, message: Message) -> tuple[str, bool]:
        """Send a message once; return what went wrong, "" if nothing, and whether it would again."""
        body = json.dumps(form(message, self.config), ensure_ascii=False).encode()
        head = {"Content-Type": "application/json; charset=utf-8", "User-Agent": "internlm"}
        request = urllib.request.Request(self.config.url, body, head)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                said = answer.read(65536)
        except urllib.error.HTTPError as error:
            error.close()
            return f"HTTP status {error.code}", 400 <= error.code < 500 and error.code not in (408, 429)
        except urllib.error.URLError as error:
            return str(error.reason), False
        except (OSError, http.client.HTTPException) as error:  # some hold the address: their kind is enough
            return type(error).__name__, False
        return (_refusal(said), True) if self.config.kind == "feishu" else ("", False)

    def _warn(self, what: str) -> None:
        if not self._is_known_to_fail:
            self._is_known_to_fail = True
            logger.warning("warning: %s: %s; further ones of it are not logged", self.name, what)


def form(message: Message, config: WebhookConfig) -> dict[str, Any]:
    """Return the body of a message in the format of its target."""
    if config.kind == "slack":
        return {"text": html.escape(str(message), quote=False)}
    if config.kind == "json":
        return vars(message)
    body: dict[str, Any] = {"msg_type": "text", "content": {"text": str(message)}}
    if config.secret is not None:
        stamp = str(int(time.time()))
        # The text that is signed is the key, and the message is empty: so their documentation has it.
        key = f"{stamp}\n{config.secret}".encode()
        body |= {"timestamp": stamp, "sign": base64.b64encode(hmac.new(key, b"", hashlib.sha256).digest()).decode()}
    return body


def _refusal(answer: bytes) -> str:
    """Return why Feishu refuses a message; it does so with HTTP status 200. "" where it does not."""
    with contextlib.suppress(ValueError):
        said = json.loads(answer)
        if isinstance(said, dict) and (code := said.get("code", said.get("StatusCode", 0))) != 0:
            return f"code {code}, {str(said.get('msg', ''))[:200]}"
    return ""
