"""Engines over tiny random models, for the tests of every room that asks one."""

from __future__ import annotations

import io
import time
from typing import Any

import sentencepiece
import torch

from internlm.infer.blocks import Blocks
from internlm.infer.engine import Engine
from internlm.infer.request import Delta
from internlm.model.config import ModelConfig
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import train_bpe
from tests.models import random_model

TOKENIZER = train_bpe(["the cat sat on the mat. 你好 👋 END"] * 4, 300)
SHAPE = ModelConfig(
    vocab_size=300, hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=64, context_length=400
)


MODEL = random_model(SHAPE)


def sentencepiece_tokenizer(texts: list[str]) -> Tokenizer:
    """Return one with a space before every text, byte pieces and a user-defined piece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=315,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<eoa>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue(), is_json=False)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Return random ids."""
    return torch.randint(300, (length,), generator=torch.Generator().manual_seed(100 * seed + length)).tolist()


def finish(engine: Engine) -> dict[int, list[Delta]]:
    """Return the deltas of each request to come."""
    found: dict[int, list[Delta]] = {}
    while engine.is_busy:
        for delta in engine.step():
            found.setdefault(delta.id, []).append(delta)
    return found


class Dictated(Engine):
    """Writes what it is told, so that text can be tested: the most probable token is the next of `script`."""

    def __init__(self, text: str, **settings: Any) -> None:
        super().__init__(MODEL, TOKENIZER, **settings)
        table = {TOKENIZER.token_bytes(i): i for i in range(300) if i < TOKENIZER.vocab_size}
        script = iter([table[bytes([byte])] for byte in text.encode()])

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            out = torch.zeros(len(hidden), 300)
            out[:, next(script)] = 100.0
            return out

        self.model.head.logits = logits  # type: ignore[method-assign]


class SlowEngine(Engine):
    """Waits before each step, so that a test can do something meanwhile."""

    pause = 0.0
    """Seconds."""
    fail: BaseException | None = None
    """What the next step raises."""

    def step(self) -> list[Delta]:
        time.sleep(self.pause)
        if self.fail is not None:
            raise self.fail
        return super().step()


def check_blocks(blocks: Blocks) -> None:
    """Assert that every block of a cache is in one place."""
    used = {block for block, users in enumerate(blocks._users) if users}
    idle = set(blocks._idle)
    assert not used & blocks._empty, "a used block is not empty"
    assert not used & idle, "a used block is not idle"
    assert not blocks._empty & idle, "an idle block is not empty"
    assert len(used) + len(blocks._empty) + len(idle) == blocks.count, "no block is lost"
    assert set(blocks._known.values()) == set(blocks._node_of) == set(blocks._number_of), (
        "what is known is known both ways"
    )
    assert not blocks._empty & set(blocks._node_of), "an empty block holds nothing known"
