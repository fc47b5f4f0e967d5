"""The engine on a thread: many callers, a bounded queue, an orderly end, and the end of the thread."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest

from internlm.errors import EngineError
from internlm.infer.engine import Engine, Limits
from internlm.infer.request import Delta, Request
from internlm.infer.schedule import Text
from internlm.infer.worker import Busy, Stopping, Worker
from internlm.model.config import ModelConfig
from tests.infer.engines import SlowEngine
from tests.models import random_model

SHAPE = ModelConfig(vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, ffn_size=16, context_length=128)
MODEL = random_model(SHAPE)


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
def engine() -> SlowEngine:
    return SlowEngine(MODEL, limits=Limits(batch=4))


@pytest.fixture
def worker(engine: SlowEngine) -> Iterator[Worker]:
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


def test_a_receiver_is_called_once_a_step_for_all_its_requests(worker: Worker, engine: SlowEngine) -> None:
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


def test_an_abort_ends_what_runs_and_what_waits(worker: Worker, engine: SlowEngine) -> None:
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


def test_a_full_queue_refuses_and_takes_again_when_it_is_emptier(worker: Worker, engine: SlowEngine) -> None:
    engine.pause = 0.02
    receiver = Receiver()
    ids = [worker.submit(ask(50), receiver) for _ in range(8)]
    with pytest.raises(Busy, match="are the limit"):
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


def test_draining_lets_answers_end_and_refuses_new_ones(worker: Worker, engine: SlowEngine) -> None:
    engine.pause = 0.01
    receiver = Receiver()
    id_ = worker.submit(ask(10), receiver)
    assert worker.drain(20) == 0
    assert receiver.of(id_)[-1].finished == "length"
    assert worker.health.draining
    with pytest.raises(Stopping):
        worker.submit(ask(), receiver)


def test_what_has_not_ended_when_the_time_is_over_is_aborted(worker: Worker, engine: SlowEngine) -> None:
    engine.pause = 0.05
    receiver = Receiver()
    id_ = worker.submit(ask(100), receiver)
    assert worker.drain(0.2) == 1
    assert receiver.of(id_)[-1].finished == "abort"


def test_a_thread_that_dies_ends_every_answer_and_is_unhealthy(worker: Worker, engine: SlowEngine) -> None:
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


def test_a_step_that_takes_too_long_is_a_stall_and_sleeping_is_none(
    engine: SlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internlm.infer.worker._STALL_SECONDS", 0.1)
    worker = Worker(engine)
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


def test_a_receiver_that_fails_harms_nobody_else(worker: Worker, engine: SlowEngine) -> None:
    def broken(deltas: list[Delta]) -> None:
        raise RuntimeError("the loop is closed")

    engine.pause = 0.01
    receiver = Receiver()
    worker.submit(ask(100), broken)
    good = worker.submit(ask(10, 3), receiver)
    receiver.wait(good)
    assert receiver.of(good)[-1].finished == "length"
    assert worker.drain(5) == 0, "the request without a receiver was aborted"


def test_a_receiver_that_fails_is_told_of_the_end_alone(worker: Worker, engine: SlowEngine) -> None:
    calls: list[list[Delta]] = []

    def broken(deltas: list[Delta]) -> None:
        calls.append(deltas)
        raise RuntimeError("the loop is closed")

    engine.pause = 0.01
    worker.submit(ask(100), broken)
    assert worker.drain(20) == 0
    assert [call[0].finished for call in calls] == [None, "abort"]


def test_the_first_delta_says_how_long_its_request_waited(worker: Worker, engine: SlowEngine) -> None:
    engine.pause = 0.02
    receiver = Receiver()
    ids = [worker.submit(ask(10), receiver) for _ in range(6)]
    receiver.wait(*ids)
    waits = [receiver.of(id_)[0].waited or 0.0 for id_ in ids]
    assert max(waits) > 0.1 > min(waits)
    assert all(delta.waited is None for id_ in ids for delta in receiver.of(id_)[1:])


def test_a_request_for_more_answers_than_are_left_is_refused(worker: Worker, engine: SlowEngine) -> None:
    engine.pause = 0.02
    receiver = Receiver()
    first = worker.submit(ask(100, n=5), receiver)
    with pytest.raises(Busy, match="5 answers are under way or wait, and 8 are the limit"):
        worker.submit(ask(1, n=4), receiver)
    second = worker.submit(ask(1, n=3), receiver)
    for id_ in (first, second):
        worker.abort(id_)
    receiver.wait(first, answers=5)
    receiver.wait(second, answers=3)
    alone = worker.submit(ask(1, n=20), receiver)  # it could never be taken otherwise
    receiver.wait(alone, answers=20)


def test_a_prompt_that_changes_after_it_was_submitted_is_answered_as_it_was(worker: Worker, engine: SlowEngine) -> None:
    engine.pause = 0.1
    receiver = Receiver()
    asked = {"max_tokens": 4, "temperature": 0}
    worker.submit(ask(6), receiver)
    time.sleep(0.05)
    tokens = [1, 2]
    id_ = worker.submit(Request(tokens=tokens, **asked), receiver)
    tokens.clear()
    receiver.wait(id_)
    (wanted,) = Engine(MODEL).generate([[1, 2]], **asked)
    assert [token for delta in receiver.of(id_) for token in delta.tokens] == wanted.tokens


def test_a_prompt_is_looked_through_once(worker: Worker, engine: SlowEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = engine.check(ask(3))
    monkeypatch.setattr(Request, "check", lambda request: pytest.fail("it was checked"))
    receiver = Receiver()
    receiver.wait(worker.submit(checked, receiver))
    assert engine.check(checked) is checked


def test_a_request_that_the_engine_does_not_take_after_all_ends_alone(
    worker: Worker, engine: SlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = Receiver()
    good = worker.submit(ask(6), receiver)
    add = engine.scheduler.add

    def fails(text: Text) -> None:
        if text.request.n == 2:
            raise MemoryError("no room")
        add(text)

    monkeypatch.setattr(engine.scheduler, "add", fails)
    bad = worker.submit(ask(6, n=2), receiver)
    receiver.wait(good)
    receiver.wait(bad, answers=2)
    assert [(d.finished, d.index) for d in receiver.of(bad)] == [("error", 0), ("error", 1)]
    assert receiver.of(bad)[0].problem == "MemoryError: no room"
    assert receiver.of(good)[-1].finished == "length"
    assert worker.drain(5) == 0


def test_a_receiver_may_submit_and_abort(worker: Worker) -> None:
    receiver, chain = Receiver(), []

    def next_one(deltas: list[Delta]) -> None:
        if deltas[-1].finished == "length" and len(chain) < 5:
            chain.append(worker.submit(ask(2), next_one))
        elif len(chain) == 5 and deltas[-1].id == chain[-1] and not deltas[-1].finished:
            worker.abort(chain[-1])
        receiver(deltas)

    chain.append(worker.submit(ask(2), next_one))
    with receiver.news:
        assert receiver.news.wait_for(lambda: len(chain) == 5 and bool(receiver.of(chain[-1])), 20)
    receiver.wait(*chain)


@pytest.mark.parametrize("end", ["drain", "close", "die"])
@pytest.mark.parametrize("seed", range(3))
def test_whatever_threads_do_every_answer_ends_exactly_once(end: str, seed: int) -> None:
    engine = SlowEngine(MODEL, limits=Limits(batch=4, length=24, cache_tokens=32, block=4))
    worker = Worker(engine, max_waiting=6)
    receiver, taken, refused = Receiver(), {}, []
    stop = threading.Event()

    def client(number: int) -> None:
        dice = random.Random(100 * seed + number)
        mine: list[int] = []
        while not stop.is_set():
            try:
                request = ask(dice.randint(1, 12), n=dice.randint(1, 2), timeout=dice.choice([None, 0.001, 9.0]))
                id_ = worker.submit(request, receiver)
            except (Busy, Stopping) as error:
                refused.append(type(error))
                time.sleep(0.002)
                continue
            taken[id_] = request.n
            mine.append(id_)
            if dice.random() < 0.4:
                worker.abort(dice.choice(mine))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    if end == "die":
        engine.fail = SystemError("the ground is gone")
    enders = [threading.Thread(target=worker.drain if end == "drain" else worker.close, args=(5,) * (end == "drain"))
              for _ in range(2)]  # fmt: skip
    for thread in enders:
        thread.start()
    for thread in enders:
        thread.join(30)
        assert not thread.is_alive()
    for _ in range(1000):
        if Stopping in refused:
            break
        time.sleep(0.005)
    assert Stopping in refused, "who asks now is told"
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    worker.close()
    worker._thread.join(10)
    assert len(taken) > 10
    for id_, count in taken.items():
        ends = sorted(delta.index for delta in receiver.of(id_) if delta.finished)
        assert ends == list(range(count)), "one end for each answer"
    assert (worker._jobs, worker._load) == ({}, 0)
    if end != "die":
        assert engine.blocks.free == engine.blocks.count
        assert {d.finished for call in receiver.calls for d in call} <= {None, "length", "abort", "timeout"}
    assert not worker.health.is_good
    worker.abort(next(iter(taken)))  # of a worker that is gone
    with pytest.raises(Stopping):
        worker.submit(ask(), receiver)
