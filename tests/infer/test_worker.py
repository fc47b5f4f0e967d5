"""The engine on a thread: many callers, a bounded queue, an orderly end, and the end of the thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from internlm.errors import EngineError
from internlm.infer.engine import Engine, Limits
from internlm.infer.request import Delta, Request
from internlm.infer.worker import Busy, Stopping, Worker
from internlm.model.config import ModelConfig
from internlm.model.transformer import build

SHAPE = ModelConfig(vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, ffn_size=16, context_length=128)
MODEL = build(SHAPE, 0)


class Slow(Engine):
    pause = 0.0
    fail: BaseException | None = None

    def step(self) -> list[Delta]:
        time.sleep(self.pause)
        if self.fail is not None:
            raise self.fail
        return super().step()


class Receiver:
    """Keeps what it is given, by request."""

    def __init__(self) -> None:
        self.calls: list[list[Delta]] = []
        self.news = threading.Condition()

    def __call__(self, deltas: list[Delta]) -> None:
        with self.news:
            self.calls.append(deltas)
            self.news.notify_all()

    def of(self, id_: int) -> list[Delta]:
        return [delta for call in self.calls for delta in call if delta.id == id_]

    def wait(self, *ids: int, answers: int = 1) -> None:
        def ended() -> bool:
            return all(sum(d.finished is not None for d in self.of(id_)) == answers for id_ in ids)

        with self.news:
            assert self.news.wait_for(ended, 20)


@pytest.fixture
def engine() -> Slow:
    return Slow(MODEL, limits=Limits(batch=4))


@pytest.fixture
def worker(engine: Slow) -> Iterator[Worker]:
    worker = Worker(engine, max_waiting=4)
    yield worker
    worker.close()


def ask(length: int = 5, seed: int = 0, **settings: object) -> Request:
    return Request(tokens=list(range(3, 8)), max_tokens=length, seed=seed, **settings)  # type: ignore[arg-type]


def test_answers_from_many_threads_are_those_of_the_engine_alone(worker: Worker) -> None:
    expected = [Engine(MODEL).generate([ask(8, seed)])[0].tokens for seed in range(8)]
    receivers = [Receiver() for _ in range(8)]
    ids: dict[int, int] = {}

    def submit(seed: int) -> None:
        ids[seed] = worker.submit(ask(8, seed), receivers[seed])

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids.values())) == 8
    for seed, receiver in enumerate(receivers):
        receiver.wait(ids[seed])
        assert [t for d in receiver.of(ids[seed]) for t in d.tokens] == expected[seed]
        assert {d.id for call in receiver.calls for d in call} == {ids[seed]}


def test_a_receiver_is_called_once_a_step_for_all_its_requests(worker: Worker, engine: Slow) -> None:
    engine.pause = 0.02
    receiver = Receiver()
    ids = [worker.submit(ask(6, seed), receiver) for seed in range(3)]
    receiver.wait(*ids)
    assert any(len({delta.id for delta in call}) == 3 for call in receiver.calls)
    assert len(receiver.calls) <= 6 + 3


def test_every_answer_of_a_request_ends_once(worker: Worker) -> None:
    receiver = Receiver()
    id_ = worker.submit(ask(4, n=3), receiver)
    receiver.wait(id_, answers=3)
    assert sorted(d.index for d in receiver.of(id_) if d.finished) == [0, 1, 2]


def test_an_abort_ends_what_runs_and_what_waits(worker: Worker, engine: Slow) -> None:
    engine.pause = 0.02
    receiver = Receiver()
    ids = [worker.submit(ask(100, seed), receiver) for seed in range(6)]
    time.sleep(0.1)
    for id_ in ids:
        worker.abort(id_)
    receiver.wait(*ids)
    assert {receiver.of(id_)[-1].finished for id_ in ids} == {"abort"}
    worker.abort(ids[0])
    worker.abort(12345)
    last = worker.submit(ask(2), receiver)
    receiver.wait(last)
    assert engine.stats.blocks_used == 0
    assert (worker.stats.running, worker.stats.waiting) == (0, 0)


def test_a_full_queue_refuses_and_takes_again_when_it_is_emptier(worker: Worker, engine: Slow) -> None:
    engine.pause = 0.02
    receiver = Receiver()
    ids = [worker.submit(ask(50), receiver) for _ in range(8)]
    with pytest.raises(Busy, match="which is the limit"):
        worker.submit(ask(), receiver)
    assert worker.stats.running + worker.stats.waiting == 8
    for id_ in ids:
        worker.abort(id_)
    receiver.wait(*ids)
    receiver.wait(worker.submit(ask(1), receiver))


def test_a_request_that_cannot_be_served_is_refused_at_once(worker: Worker) -> None:
    with pytest.raises(EngineError, match="too many"):
        worker.submit(Request(tokens=[1] * 200), Receiver())
    assert worker.stats.waiting == 0


def test_draining_lets_answers_end_and_refuses_new_ones(worker: Worker, engine: Slow) -> None:
    engine.pause = 0.01
    receiver = Receiver()
    id_ = worker.submit(ask(10), receiver)
    assert worker.drain(20) == 0
    assert receiver.of(id_)[-1].finished == "length"
    assert worker.health.draining
    with pytest.raises(Stopping):
        worker.submit(ask(), receiver)


def test_what_has_not_ended_when_the_time_is_over_is_aborted(worker: Worker, engine: Slow) -> None:
    engine.pause = 0.05
    receiver = Receiver()
    id_ = worker.submit(ask(100), receiver)
    assert worker.drain(0.2) == 1
    assert receiver.of(id_)[-1].finished == "abort"


def test_a_thread_that_dies_ends_every_answer_and_is_unhealthy(worker: Worker, engine: Slow) -> None:
    engine.pause = 0.02
    receiver = Receiver()
    ids = [worker.submit(ask(100, n=2), receiver), worker.submit(ask(100), receiver)]
    time.sleep(0.1)
    assert worker.health.is_good
    engine.fail = MemoryError("gone")
    receiver.wait(ids[0], answers=2)
    receiver.wait(ids[1])
    last = receiver.of(ids[0])[-1]
    assert last.finished == "error"
    assert "MemoryError: gone" in str(last.problem)
    worker._thread.join(5)
    assert not worker.health.is_good
    with pytest.raises(Stopping, match="has died"):
        worker.submit(ask(), receiver)


def test_a_step_that_takes_too_long_is_a_stall_and_sleeping_is_none(engine: Slow) -> None:
    worker = Worker(engine, stall_seconds=0.1)
    time.sleep(0.3)
    assert worker.health.is_good, "without work there is nothing to be late with"
    engine.pause = 0.6
    receiver = Receiver()
    id_ = worker.submit(ask(1), receiver)
    time.sleep(0.3)
    assert worker.health.stalled
    receiver.wait(id_)
    time.sleep(0.1)
    assert worker.health.is_good
    worker.close()


def test_a_receiver_that_fails_harms_nobody_else(worker: Worker, engine: Slow) -> None:
    def broken(deltas: list[Delta]) -> None:
        raise RuntimeError("the loop is closed")

    engine.pause = 0.01
    receiver = Receiver()
    worker.submit(ask(100), broken)
    good = worker.submit(ask(10, 3), receiver)
    receiver.wait(good)
    assert receiver.of(good)[-1].finished == "length"
    assert worker.drain(5) == 0, "the request without a receiver was aborted"


def test_the_wait_before_the_first_step_is_noted_once_a_request(engine: Slow) -> None:
    engine.pause = 0.02
    waits: list[float] = []
    worker = Worker(engine, note_wait=waits.append)
    receiver = Receiver()
    ids = [worker.submit(ask(10), receiver) for _ in range(6)]
    receiver.wait(*ids)
    assert len(waits) == 6
    assert max(waits) > 0.1 > min(waits)
    worker.close()
