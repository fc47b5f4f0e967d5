"""Fixtures that every room shares: a tiny corpus in shards, and recipes over it."""

from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["INTERNLM_ALLOCATOR"] = "off"  # tests measure nothing: no restarts

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm import config, plot, runtime, storage
from internlm.data import shards
from internlm.recipe import Recipe
from internlm.text.training import train_bpe
from internlm.train import trainer

# Each worker imports all tests, and many processes are started: bytecode is kept whatever the machine is set to.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

for ignored in (signal.SIGINT, signal.SIGHUP):  # as a shell's background jobs and nohup have them: children would too
    if signal.getsignal(ignored) == signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proof", action="store_true", help="run the long proofs in full length")
    parser.addoption("--shuffle", type=int, metavar="SEED", help="files, and tests within each, in a random order")


MEASURED = functools.cache(runtime.measure_peak)


LONGEST = (
    "tests/story/test_story.py",
    "tests/parallel/test_layouts.py",
    "tests/launch/test_launch.py",
    "tests/parallel/test_optimizer_shard.py",
    "tests/test_mutants.py",
    "tests/launch/",
    "tests/faults/",
    "tests/checkpoint/test_remote.py",
    "tests/story/",
    "tests/parity/test_engine_parity.py",
    "tests/parallel/",
    "tests/infer/test_engine",
    "tests/serve/test_",
    "tests/weights/test_remote_code.py",
    "tests/train/",
)
"""Begun first, the longest at the head, so that no worker ends with one of them alone; what starts so belongs to it."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((place for place, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST))

    items.sort(key=place)
    if not config.getoption("--proof"):
        for item in items:
            if item.get_closest_marker("proof"):
                item.add_marker(pytest.mark.skip("a long proof: --proof"))
    seed = config.getoption("--shuffle")
    if seed is not None:
        dice, files = random.Random(seed), defaultdict(list)
        dice.shuffle(items)
        for item in items:
            files[item.path].append(item)
        items[:] = [item for file in files.values() for item in file]


def pytest_collection_finish() -> None:
    """What is imported stays: engines collect garbage when they are given weights, and need not look at all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_is_measured_or_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer measures its machine (0.2 s) and draws its losses (0.4 s): once is enough, for who asks for `plots`.

    Where the last checkpoint cannot be written it tries again at once: a real disk is given 21 s.
    """
    monkeypatch.setattr(runtime, "measure_peak", MEASURED)
    monkeypatch.setattr(trainer, "SAVE_AGAIN_AFTER_S", (0.0,) * len(trainer.SAVE_AGAIN_AFTER_S))
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(plot, "loss_curve", lambda *_: None)


@pytest.fixture(autouse=True)
def _the_log_is_given_back() -> Iterator[None]:
    """A verb that runs in this process sends the log to a stream of its own: the next test looks for it elsewhere."""
    logger = logging.getLogger("internlm")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def plots() -> None:
    """Let trainers draw their losses."""


def texts(seed: int, count: int) -> list[str]:
    """Sentences with a pattern that a small model can learn: every word is followed by its successor."""
    generator = random.Random(seed)
    lines = []
    for _ in range(count):
        start = generator.randrange(len(WORDS))
        lines.append(" ".join(WORDS[(start + i) % len(WORDS)] for i in range(generator.randrange(3, 40))) + ".")
    return lines


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with shards `a`, `b` and `held`, all of one tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = train_bpe(texts(0, 50), 280)
    for name, seed, count in (("a", 1, 60), ("b", 2, 30), ("held", 3, 10)):
        with storage.writing(folder / name, shards.KIND) as out:
            writer = shards.ShardWriter(out.path, "00000", tokenizer.vocab_size)
            for text in texts(seed, count):
                ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
                writer.add(ids, None, len(text.encode()))
            (out.path / "tokenizer").mkdir()
            tokenizer.save(out.path / "tokenizer")
            out.meta.update(
                shards.meta(
                    [writer.close()],
                    vocab_size=tokenizer.vocab_size,
                    fingerprint=tokenizer.fingerprint,
                    bos_id=tokenizer.bos_id,
                    eos_id=tokenizer.eos_id,
                    template=None,
                )
            )
    return folder


def recipe_over(corpus: Path, folder: Path, /, **changes: Any) -> Recipe:
    """Return a recipe over the corpus for a run in a folder, with dotted changes."""
    tree: dict[str, Any] = {
        "run": str(folder),
        "model": {"vocab_size": 280, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 64},
        "data": {
            "seq_len": 32,
            "train": {"a": {"path": str(corpus / "a"), "weight": 2}, "b": {"path": str(corpus / "b"), "weight": 1}},
            "validation": {"held": {"path": str(corpus / "held")}},
        },
        "train": {"tokens": 20 * 256, "batch_tokens": 256, "log_every_steps": 1},
        "optim": {"lr": 3e-3},
        "runtime": {"device": "cpu"},
    }
    for key, value in changes.items():
        at = tree
        *path, last = key.split("__")
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return config.decode(Recipe, tree)


@pytest.fixture
def recipe(corpus: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Return a function that makes recipes over the corpus, with dotted changes."""
    return functools.partial(recipe_over, corpus, tmp_path / "run")
