"""Which tokens the sampling rules leave, against Transformers' warpers on random logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm.infer.request import Request, Rules
from internlm.infer.sample import History, choose

pytest.importorskip("transformers")
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 60
rules = st.builds(
    lambda temperature, top_k, top_p, min_p: Rules(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([0, 1, 5, VOCAB - 1, VOCAB, 1000]),
    st.sampled_from([0.01, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)


def distribution(logits: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Return theirs, in the order that we apply the rules in."""
    ids, scores = torch.zeros(1, 1, dtype=torch.long), logits[None].double()
    scores = TemperatureLogitsWarper(rules.temperature)(ids, scores)
    if rules.top_k:
        scores = TopKLogitsWarper(rules.top_k)(ids, scores)
    if rules.top_p < 1:
        scores = TopPLogitsWarper(rules.top_p)(ids, scores)
    if rules.min_p:
        scores = MinPLogitsWarper(rules.min_p)(ids, scores)
    return scores.softmax(-1)[0]


@settings(max_examples=50, deadline=None)
@given(rules, st.integers(0, 10**6), st.sampled_from([0.5, 3.0]))
def test_each_token_comes_over_the_share_of_draws_that_theirs_gives_it(rules: Rules, seed: int, scale: float) -> None:
    """The draws are an even grid, so that counts are shares but for one at either end of each token's stretch."""
    logits = scale * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
    expected = distribution(logits, rules)
    count = 2000
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    chosen = choose(logits.expand(count, -1).clone(), [rules] * count, draws)
    shares = torch.bincount(chosen, minlength=VOCAB).double() / count
    assert not shares[expected == 0].any(), "a token that theirs excludes"
    assert (shares - expected).abs().max() <= 1.01 / count


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), st.floats(0.1, 5.0), st.integers(0, 10**6))
def test_the_repetition_penalty_is_theirs(tokens: list[int], penalty: float, seed: int) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits[None].clone())[0]
    half = len(tokens) // 2
    history = History(Request(tokens=tokens[:half], repetition_penalty=penalty), VOCAB, torch.device("cpu"))
    for token in tokens[half:]:
        history.add(token)
    history.penalise(logits)
    assert torch.allclose(logits, expected, atol=1e-6)
