"""The engine against Transformers' `generate`: greedy ids of 200 random prompts, whatever happens around them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from internlm.infer.engine import Engine, Limits
from internlm.infer.request import Request
from internlm.model.config import ModelConfig
from tests.infer.engines import check_blocks
from tests.models import random_model
from tests.parity.test_llama_parity import exported

pytest.importorskip("transformers")

SHAPES = {
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "output_bias": True},
    "odd heads": {"hidden_size": 60, "num_heads": 5, "num_kv_heads": 5},
    "one key head": {"hidden_size": 42, "num_heads": 3, "num_kv_heads": 1, "head_dim": 14},
}
BASE = {"vocab_size": 97, "hidden_size": 48, "num_layers": 2, "ffn_size": 80, "context_length": 128}
NEW = 12
PROMPTS = 200
FEW, SOME = 16, 10
SLOW = {"one at a time": 8, "chunks of one": 6}
"""Settings with the most steps, and the number of prompts for each outside of the long proofs."""
WHOLE = "all at once"
"""The one setting with all prompts always. The long proofs give all prompts to all settings."""
STRESS = {
    "one at a time": Limits(batch=1),
    "all at once": Limits(batch=64),
    "blocks of one": Limits(block=1, batch=8),
    "blocks of three, chunks of seven": Limits(block=3, step_tokens=7, batch=8),
    "chunks of one": Limits(step_tokens=1, batch=4),
    "blocks of 16, chunks of 64": Limits(block=16, step_tokens=64, batch=8),
    "a cache for one text": Limits(block=4, length=80, cache_tokens=80, batch=8, step_tokens=32),
    "nothing shared": Limits(block=2, share=False, batch=8),
}
DEALT = {"odd heads": ("all at once", "blocks of one"), "one key head": ("chunks of one", "nothing shared")}
"""Shapes that have some settings only outside of the long proofs: what an engine plans knows nothing of the heads."""


def is_proof(shape: str, stress: str, paged: bool) -> bool:
    """Return whether a case is one of the long proofs."""
    # A GPU's way looks at the size of a block and at the heads, and not at who waits.
    return stress not in DEALT.get(shape, STRESS) or (
        paged and stress in ("one at a time", "blocks of 16, chunks of 64")
    )


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    """A model, prompts (a third of them begin like another one), and Transformers' answers."""
    model = random_model(ModelConfig(**BASE | SHAPES[request.param]))
    theirs = exported(model, tmp_path_factory.mktemp("engine") / "out")
    dice = random.Random(request.param)
    count = PROMPTS if request.param == "grouped" or request.config.getoption("--proof") else FEW
    prompts: list[list[int]] = []
    while len(prompts) < count:
        tokens = [dice.randrange(97) for _ in range(dice.choice([1, 2, 5, 13, 16, 31, 48]))]
        if prompts and dice.random() < 0.33:
            tokens = [*dice.choice(prompts)[:50], *tokens][:60]
        prompts.append(tokens)
    wanted: dict[tuple[int, ...], list[int]] = {}
    for length in {len(p) for p in prompts}:  # equal lengths together: nothing is padded
        batch = torch.tensor([p for p in prompts if len(p) == length])
        found = theirs.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=NEW, do_sample=False)
        wanted |= {tuple(row[:length]): row[length:] for row in found.tolist()}
    return model, prompts, [wanted[tuple(p)] for p in prompts]


way = pytest.mark.parametrize("paged", [False, True], ids=["piece by piece", "paged"])
"""The second is a GPU's way, here without its graphs and kernels."""


@way
@pytest.mark.parametrize("stress", STRESS)
def test_greedy_ids_are_those_of_generate(
    case: tuple, stress: str, paged: bool, request: pytest.FixtureRequest
) -> None:
    proof = request.config.getoption("--proof")
    model, prompts, wanted = case
    if not proof and is_proof(request.node.callspec.params["case"], stress, paged):
        pytest.skip("a long proof: --proof")
    if paged or not (proof or stress == WHOLE):
        count = FEW if proof else SLOW.get(stress, FEW)
        prompts, wanted = prompts[:count], wanted[:count]
    engine = Engine(model, limits=replace(STRESS[stress], paged=paged))
    got = [result.tokens for result in engine.generate(prompts, max_tokens=NEW, temperature=0)]
    assert got == wanted
    counters = engine.stats.counters
    if stress == "a cache for one text":
        assert counters.preemptions > len(prompts) // 20
    if stress in ("blocks of one", "blocks of three, chunks of seven"):
        assert counters.cached_tokens > counters.prompt_tokens // 20
    check_blocks(engine.blocks)
    assert engine.blocks.free == engine.blocks.count


@way
def test_prompts_that_arrive_while_others_are_answered_get_the_same_ids(
    case: tuple, paged: bool, request: pytest.FixtureRequest
) -> None:
    model, prompts, wanted = case
    if paged or not request.config.getoption("--proof"):
        prompts, wanted = prompts[:FEW], wanted[:FEW]
    dice = random.Random(1)
    engine = Engine(model, limits=Limits(block=4, cache_tokens=512, step_tokens=24, batch=6, paged=paged))
    waiting = list(enumerate(prompts))
    place: dict[int, int] = {}
    got: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
    dropped: set[int] = set()
    while waiting or engine.is_busy:
        if waiting and dice.random() < 0.5:
            index, tokens = waiting.pop()
            place[engine.add(Request(tokens=tokens, max_tokens=NEW, temperature=0))] = index
        if dice.random() < 0.02 and place:
            gone = dice.choice(list(place))
            if len(got[place[gone]]) < NEW:
                dropped.add(place[gone])
                engine.abort(gone)
        for delta in engine.step():
            got[place[delta.id]] += delta.tokens
    for index, tokens in enumerate(wanted):
        assert got[index] == (tokens[: len(got[index])] if index in dropped else tokens)
    assert 0 < len(dropped) < len(prompts) // 2
    check_blocks(engine.blocks)
    assert engine.blocks.free == engine.blocks.count


@way
def test_several_answers_to_one_prompt_are_those_of_generate(case: tuple, paged: bool) -> None:
    model, prompts, wanted = case
    engine = Engine(model, limits=Limits(block=3, batch=8, step_tokens=40, paged=paged))
    requests = [Request(tokens=p, max_tokens=NEW, temperature=0, n=3) for p in prompts[:SOME]]
    got = [result.tokens for result in engine.generate(requests)]
    assert got == [tokens for tokens in wanted[:SOME] for _ in range(3)]


@way
def test_probabilities_of_a_given_text_are_those_of_the_reference(case: tuple, tmp_path: Path, paged: bool) -> None:
    model, prompts, wanted = case
    theirs = exported(model, tmp_path / "out")
    engine = Engine(model, limits=Limits(block=3, step_tokens=11, paged=paged))
    for prompt, answer in list(zip(prompts, wanted, strict=True))[:SOME]:
        text = [*prompt, *answer]
        with torch.no_grad():
            rows = theirs(torch.tensor([text])).logits[0].log_softmax(-1)
        expected = rows[:-1].gather(1, torch.tensor(text[1:])[:, None]).squeeze(1)
        assert (engine.score(text) - expected).abs().max() < 1e-4
