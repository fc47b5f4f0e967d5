"""Messages about a run: in the format of their target, seldom enough, and never waited for."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from internlm import config, disk, storage
from internlm import recipe as recipes
from internlm.checkpoint import listing
from internlm.checkpoint.listing import CheckpointConfig
from internlm.cli import main
from internlm.errors import ConfigError, InternLMError, StorageError, TrainingError
from internlm.recipe import Recipe
from internlm.train.stop import FILE, Stopped
from internlm.train.trainer import Trainer
from internlm.train.watch import alerts as module
from internlm.train.watch.alerts import Alerts, AlertsConfig, Message, WebhookConfig, form
from tests.processes import free_port, until

Make = Callable[..., Recipe]
TOKEN = "hook-4711-secret"


class Server(ThreadingHTTPServer):
    """Takes messages; answers with the statuses it is given, then 200, each after a delay."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.tries = 0
        self.statuses: list[int] = []
        self.answer = b"{}"
        self.delay_s = 0.0
        self.over = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{TOKEN}"

    def wait_for(self, count: int) -> list[dict[str, Any]]:
        assert until(lambda: len(self.bodies) >= count), self.bodies
        return self.bodies


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.tries += 1
        self.server.over.wait(self.server.delay_s)
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        if status == 200:
            self.server.bodies.append(body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(self.server.answer)

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.01)
    server = Server()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "internlm")
    return caplog


def alerts(url: str, run: Path, **changes: Any) -> Alerts:
    config = AlertsConfig(
        webhooks=(
            WebhookConfig(
                url=url, events=changes.pop("events", ("spike", "failure", "end")), **changes.pop("hook", {})
            ),
        ),
        interval_s=changes.pop("interval_s", 0.0),
        timeout_s=changes.pop("timeout_s", 5.0),
    )
    return Alerts.open(config, run, **changes)


def test_a_message_says_what_happened_where_and_when(server: Server, tmp_path: Path) -> None:
    told = alerts(server.url, tmp_path / "run")
    told.step = lambda: 42
    told.tell("spike", "loss 9 is high")
    told.tell("checkpoint", "nobody asked for this kind")
    told.close()
    (body,) = server.bodies
    assert body.pop("time") == pytest.approx(time.time(), abs=30)
    assert body == {
        "kind": "spike", "text": "loss 9 is high", "run": str(tmp_path / "run"), "step": 42,
        "host": socket.gethostname(), "rank": 0, "left_out": 0,
    }  # fmt: skip


MESSAGE = Message("failure", "a < b & c", "runs/a", 7, "node3", 5, 0.0, 2)


def test_each_target_gets_its_own_format() -> None:
    slack = form(MESSAGE, WebhookConfig(url="http://x", kind="slack"))
    assert slack == {"text": slack["text"]}
    assert "failure: a &lt; b &amp; c" in slack["text"]
    assert "run runs/a · step 7 · node3 rank 5" in slack["text"]
    assert "2 more of this kind" in slack["text"]
    feishu = form(MESSAGE, WebhookConfig(url="http://x", kind="feishu"))
    assert feishu == {"msg_type": "text", "content": {"text": str(MESSAGE)}}


def test_feishu_messages_are_signed_as_its_documentation_has_it() -> None:
    body = form(MESSAGE, WebhookConfig(url="http://x", kind="feishu", secret="demo"))
    key = f"{body['timestamp']}\ndemo".encode("ascii")
    assert body["sign"] == base64.b64encode(hmac.new(key, digestmod=hashlib.sha256).digest()).decode()
    assert abs(int(body["timestamp"]) - time.time()) < 30


def test_what_feishu_refuses_with_status_200_is_a_failure(
    server: Server, tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    server.answer = b'{"code": 19021, "msg": "sign match fail"}'
    told = alerts(server.url, tmp_path, hook={"kind": "feishu"})
    told.tell("spike", "x")
    told.close()
    assert "sign match fail" in heard.text
    assert server.tries == 1, "to try again would not help"


def test_of_a_kind_one_message_is_sent_in_an_interval_and_the_rest_is_counted(server: Server, tmp_path: Path) -> None:
    told = alerts(server.url, tmp_path, interval_s=60)
    for number in range(5):
        told.tell("spike", f"number {number}")
    told.tell("failure", "of another kind")
    told._told["spike"] -= 60  # a minute later
    os.utime(tmp_path / module.FOLDER / "spike", (0, 0))
    told.tell("spike", "later")
    told.close()
    assert sorted((b["text"], b["left_out"]) for b in server.bodies) == [
        ("later", 4), ("number 0", 0), ("of another kind", 0)
    ]  # fmt: skip


def test_of_many_processes_that_fail_at_once_one_says_so_and_none_after_a_restart(
    server: Server, tmp_path: Path
) -> None:
    everyone = [alerts(server.url, tmp_path, interval_s=60, rank=rank) for rank in range(16)]
    threads = [threading.Thread(target=one.tell, args=("failure", "all lost")) for one in everyone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in everyone:
        one.close()
    assert len(server.bodies) == 1
    again = alerts(server.url, tmp_path, interval_s=60)
    again.tell("failure", "the next process fails as well")
    again.tell("end", "but the end is always told")
    again.close()
    assert [body["kind"] for body in server.bodies] == ["failure", "end"]
    os.utime(tmp_path / module.FOLDER / "failure", (0, 0))
    later = alerts(server.url, tmp_path, interval_s=60)
    later.tell("failure", "long after")
    later.close()
    assert len(server.bodies) == 3


def test_where_the_time_of_the_last_message_cannot_be_kept_messages_are_sent(server: Server, tmp_path: Path) -> None:
    (tmp_path / module.FOLDER).write_text("not a folder")
    for _ in range(2):
        told = alerts(server.url, tmp_path, interval_s=60)
        told.tell("failure", "x")
        told.tell("failure", "too soon for this process")
        told.close()
    assert len(server.bodies) == 2


def test_what_all_ranks_see_is_told_by_the_first_only(server: Server, tmp_path: Path) -> None:
    told = alerts(server.url, tmp_path, rank=3)
    told.tell("spike", "x")
    told.tell("failure", "only rank 3 knows")
    told.close()
    assert [(body["kind"], body["rank"]) for body in server.bodies] == [("failure", 3)]


def test_a_server_in_trouble_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [500, 429]
    told = alerts(server.url, tmp_path)
    told.tell("spike", "x")
    assert server.wait_for(1)[0]["text"] == "x"
    assert server.tries == 3


@pytest.mark.parametrize("status", [500, 404])
def test_a_failure_is_one_warning_without_the_address(
    server: Server, tmp_path: Path, heard: pytest.LogCaptureFixture, status: int
) -> None:
    server.statuses = [status] * 100
    told = alerts(server.url, tmp_path)
    for _ in range(3):
        told.tell("spike", "x")
    told.close()
    assert len(heard.records) == 1
    assert f"HTTP status {status}" in heard.text
    assert "alerts.webhooks[0] (json at 127.0.0.1)" in heard.text
    assert TOKEN not in heard.text
    assert server.tries == (3 if status == 404 else 9), "4xx: no second try"


@pytest.mark.parametrize("path", [f"/{TOKEN}", f"/{TOKEN} with space", f"/{TOKEN}\u4e2d"])
def test_a_closed_port_or_a_broken_address_is_one_warning(
    server: Server, tmp_path: Path, heard: pytest.LogCaptureFixture, path: str
) -> None:
    told = alerts(f"http://127.0.0.1:{free_port()}{path}", tmp_path)
    for _ in range(3):
        told.tell("spike", "x")
    told.close()
    assert len(heard.records) == 1
    assert TOKEN not in heard.text


def test_a_hanging_server_is_not_waited_for(server: Server, tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    server.delay_s = 60
    told = alerts(server.url, tmp_path, timeout_s=60)
    begun = time.monotonic()
    for _ in range(200):  # more than the queue holds
        told.tell("spike", "x")
    told.close(0.3)
    assert time.monotonic() - begun < 20
    assert len(heard.records) == 1
    assert TOKEN not in heard.text


def test_a_slow_server_gets_the_last_message_before_the_end(server: Server, tmp_path: Path) -> None:
    server.delay_s = 0.5
    told = alerts(server.url, tmp_path)
    told.tell("end", "x")
    told.close(30)
    assert len(server.bodies) == 1


def test_addresses_come_from_the_environment_and_are_written_nowhere(
    recipe: Make, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOOK", server.url)
    value = recipe(alerts={"webhooks": [{"url": "$HOOK", "events": ["start", "end"]}]}, train__tokens=2 * 256)
    recipes.prepare(value).fit()
    assert [(body["kind"], body["step"]) for body in server.bodies] == [("start", 0), ("end", 2)]
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("hook", "match"),
    [
        ({"url": "$NO_SUCH_HOOK"}, "environment variable NO_SUCH_HOOK is not set"),
        ({"url": "$NOT_AN_ADDRESS"}, "NOT_AN_ADDRESS holds no http"),
        ({"url": "ftp://x"}, "must be an http"),
        ({"url": "http://x", "kind": "pager"}, "kind"),
        ({"url": "http://x", "secret": "s"}, "feishu only"),
        ({"url": "http://x", "events": ["spikes"]}, "spike"),
    ],
)
def test_mistakes_in_the_section_are_named(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, hook: dict[str, Any], match: str
) -> None:
    monkeypatch.setenv("NOT_AN_ADDRESS", "hello")
    with pytest.raises(ConfigError, match=match):
        recipes.prepare(recipe(alerts={"webhooks": [hook]}))


def test_a_variable_that_only_rank_0_has_is_no_error_elsewhere(tmp_path: Path) -> None:
    alerts("$NO_SUCH_HOOK", tmp_path, rank=1).tell("failure", "nobody hears it")


EVERYTHING = ["start", "spike", "skipped", "straggler", "stall", "checkpoint", "failure", "preempted", "end"]


def watched(recipe: Make, server: Server, **changes: Any) -> Trainer:
    section = {"webhooks": [{"url": server.url, "events": EVERYTHING}], "interval_s": 0}
    return recipes.prepare(recipe(alerts=section, **changes))


def test_a_run_tells_of_its_spikes_skipped_steps_and_failed_checkpoints(
    recipe: Make, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = watched(recipe, server, train__tokens=6 * 256, checkpoint={"every_steps": 4})
    sums = trainer.stepper._sums

    def spoilt(loss: torch.Tensor) -> Any:
        return [value * (math.nan if trainer.progress.step == 1 else 1) for value in sums(loss)]  # of step 2

    monkeypatch.setattr(trainer.stepper, "_sums", spoilt)
    trainer.stepper.spikes.add = lambda _: 20.0 if trainer.progress.step == 3 else None  # type: ignore[method-assign]
    space = disk.require_space

    def full(*arguments: Any) -> None:
        if trainer.progress.step == 4:
            raise StorageError("the disk is full")
        space(*arguments)

    monkeypatch.setattr(disk, "require_space", full)
    trainer.checkpoints = CheckpointConfig(every_steps=4, background=False)
    trainer.fit()
    assert [(body["kind"], body["step"]) for body in server.bodies] == [
        ("start", 0), ("skipped", 2), ("spike", 3), ("checkpoint", 4), ("end", 6)
    ]  # fmt: skip
    assert "20.0 spreads" in server.bodies[2]["text"]
    assert "step-00000004 could not be written: the disk is full" in server.bodies[3]["text"]


def test_a_run_that_fails_says_why_before_it_ends(recipe: Make, server: Server) -> None:
    trainer = watched(recipe, server)

    def broken() -> dict[str, float]:
        raise TrainingError("the GPU fell off the bus")

    trainer.stepper.step = broken  # type: ignore[method-assign]
    with pytest.raises(TrainingError):
        trainer.fit()
    assert [body["kind"] for body in server.bodies] == ["start", "failure"]
    assert "GPU fell off the bus" in server.bodies[1]["text"]


def test_a_run_that_fails_before_it_trains_says_why(recipe: Make, server: Server, corpus: Path, tmp_path: Path) -> None:
    watched(recipe, server, train__tokens=256).fit()
    newest = listing.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    (newest / storage.MANIFEST).write_text("{")
    for changes, said in (
        ({"data__train": {"a": {"path": "nowhere"}}}, "StorageError: nowhere: no such folder"),
        ({}, "damaged, all of them"),
        ({"init_from": "nowhere", "run": str(tmp_path / "other")}, "init_from: no such folder"),
    ):
        server.bodies.clear()
        with pytest.raises(InternLMError):
            watched(recipe, server, **changes)
        assert [(body["kind"], body["step"]) for body in server.bodies] == [("failure", 0)]
        assert said in server.bodies[0]["text"]


@pytest.mark.parametrize("where", ["before the first step", "in a step", "after the last"])
def test_a_run_that_fails_says_so_once_wherever_it_fails(
    recipe: Make, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def broken(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("the cup is full") if where == "in a step" else StorageError("the cup is full")

    names = {
        "before the first step": "trainer.MetricsFile",
        "in a step": "step.Stepper.step",
        "after the last": "trainer.plot.loss_curve",
    }
    monkeypatch.setattr(f"internlm.train.{names[where]}", broken)
    section = {"webhooks": [{"url": server.url, "events": ["failure"]}], "interval_s": 0}
    (tmp_path / "r.yaml").write_text(config.dump(recipe(alerts=section, train__tokens=256)))
    assert main(["train", str(tmp_path / "r.yaml")]) == 1
    assert [body["kind"] for body in server.bodies] == ["failure"]
    assert "the cup is full" in server.bodies[0]["text"]


def test_a_run_that_is_asked_to_end_says_so(recipe: Make, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm.train.stop._LOOK_EVERY_S", 0.0)
    trainer = watched(recipe, server)
    (trainer.run / FILE).touch()
    with pytest.raises(Stopped):
        trainer.fit()
    assert [body["kind"] for body in server.bodies] == ["start", "preempted"]
    assert "step 1 of 20" in server.bodies[1]["text"]


def test_a_run_tells_that_it_stands_still_and_which_rank_is_slow(recipe: Make, server: Server) -> None:
    trainer = watched(recipe, server)
    trainer.stragglers.look = lambda table: ({}, "rank 5 on node2 is slow")  # type: ignore[method-assign]
    trainer._step_and_trace()
    trainer.watch._told(None)  # another rank has said it
    trainer.watch._told("nothing in 20m after step 1")
    assert [(body["kind"], body["text"], body["step"]) for body in server.bodies] == [
        ("straggler", "rank 5 on node2 is slow", 1), ("stall", "nothing in 20m after step 1", 1)
    ]  # fmt: skip


def test_a_hanging_server_does_not_slow_the_training_down(recipe: Make, server: Server) -> None:
    server.delay_s = 60
    trainer = watched(recipe, server)
    begun = time.monotonic()
    for _ in range(10):
        trainer.stepper.step()
        trainer.stepper._answer(9.0, 20.0)
    assert time.monotonic() - begun < 20
    assert until(lambda: server.tries)
    assert server.tries == 1


def test_the_section_can_be_written_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("webhooks:\n- {url: $HOOK, kind: slack, events: [start, end]}\n")
    loaded = config.load(AlertsConfig, tmp_path / "r.yaml").value
    assert loaded.webhooks == (WebhookConfig(url="$HOOK", kind="slack", events=("start", "end")),)
    (tmp_path / "again.yaml").write_text(config.dump(loaded))
    assert config.load(AlertsConfig, tmp_path / "again.yaml").value == loaded


def test_the_recipes_of_the_documentation_are_valid(recipe: Make) -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    trees = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]
    shown: dict[str, Any] = {name: value for tree in trees for name, value in tree.items()}
    value = recipe(track=shown["track"], alerts=shown["alerts"])
    assert [hook.kind for hook in value.alerts.webhooks] == ["feishu", "slack", "json"]
    assert value.track.mlflow is not None
