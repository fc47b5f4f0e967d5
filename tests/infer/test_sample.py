"""The sampling rules against their definitions, and the draw against its distribution."""

from __future__ import annotations

import pytest
import torch

from internlm.infer.request import Request, Rules
from internlm.infer.sample import NOT_FINITE, History, chances, choose, draw

VOCAB = 12


def draw_many(logits: torch.Tensor, rules: Rules, count: int, seed: int = 0) -> torch.Tensor:
    """Return how often each token came."""
    draws = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows = logits.expand(count, -1).clone()
    chosen = choose(rows, [rules] * count, draws)
    return torch.bincount(chosen, minlength=logits.shape[-1])


def allowed_by_definition(logits: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Return the distribution, rule by rule in plain words."""
    p = (logits.double() / rules.temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()
    if rules.top_k:
        order = order[: rules.top_k]
    total, kept = sum(p[i] for i in order), []
    reached = 0.0
    for i in order:
        if reached < rules.top_p:
            kept.append(i)
        reached += float(p[i] / total)
    kept = [i for i in kept if p[i] >= rules.min_p * p[order[0]]]
    out = torch.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p * counts.sum()
    possible = p > 0
    return float(((counts - expected)[possible] ** 2 / expected[possible]).sum())


@pytest.mark.parametrize(
    "rules",
    [
        Rules(),
        Rules(temperature=0.6),
        Rules(temperature=1.7),
        Rules(top_k=5),
        Rules(top_p=0.7),
        Rules(min_p=0.2),
        Rules(temperature=1.3, top_k=8, top_p=0.8, min_p=0.05),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_their_probability_says(rules: Rules) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 1.2
    expected = allowed_by_definition(logits, rules)
    counts = draw_many(logits, rules, 40_000)
    assert not counts[expected == 0].any(), "a token came that the rules exclude"
    degrees = int((expected > 0).sum()) - 1
    # Wilson and Hilferty's approximation of the 99.9 % point.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert chi_square(counts, expected) < limit
    wrong = expected.roll(1)
    assert chi_square(counts, (wrong + 1e-3) / (wrong + 1e-3).sum()) > limit, "the test must be able to fail"


@pytest.mark.parametrize("scale", [0.0, 0.01, 4.0])
def test_a_nucleus_wider_than_the_sorted_prefix_is_exact(scale: float) -> None:
    logits = scale * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for rules in (Rules(top_p=0.9), Rules(top_k=3000), Rules(min_p=0.5), Rules(top_k=2000, top_p=0.5)):
        allowed = allowed_by_definition(logits, rules) > 0
        counts = draw_many(logits, rules, 400)
        if scale:  # with equal logits any choice of that many is right
            assert not counts[~allowed].any()
            assert counts[allowed].any()
        assert int((counts > 0).sum()) <= int(allowed.sum())


def test_zero_temperature_takes_the_most_probable_token() -> None:
    logits = torch.randn(6, VOCAB)
    best = logits.argmax(-1)
    draws = torch.rand(6, dtype=torch.float64)
    assert torch.equal(choose(logits, [Rules(temperature=0, top_p=0.5)] * 6, draws), best)


def test_rows_with_different_rules_do_not_touch_each_other() -> None:
    rules = [Rules(temperature=0), Rules(), Rules(top_k=3), Rules(top_p=0.6), Rules(temperature=0.5, min_p=0.1)]
    logits = torch.randn(5, VOCAB)
    draws = torch.rand(5, dtype=torch.float64)
    together = choose(logits.clone(), rules, draws)
    alone = [choose(logits[i : i + 1].clone(), [rules[i]], draws[i : i + 1])[0] for i in range(5)]
    assert together.tolist() == [int(token) for token in alone]


def changed(logits: list[float], request: Request, answer: list[int]) -> list[float]:
    """Return logits after what the tokens before do to them."""
    history = History(request, len(logits), torch.device("cpu"))
    for token in answer:
        history.add(token)
    row = torch.tensor(logits)
    history.bias(row)
    history.penalise(row)
    return row.tolist()


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_all_tokens_before() -> None:
    request = Request(tokens=[0, 0], repetition_penalty=2.0)
    assert changed([3.0, 2.0, -1.0, 1.75], request, [2]) == [1.5, 2.0, -2.0, 1.75]


def test_presence_counts_once_and_frequency_each_time_and_the_prompt_not_at_all() -> None:
    request = Request(tokens=[3, 3], presence_penalty=0.5, frequency_penalty=0.25)
    assert changed([1.0, 1.0, 1.0, 1.0], request, [0, 1, 1]) == [0.25, 0.0, 1.0, 1.0]
    assert changed([1.0, 1.0], Request(tokens=[], presence_penalty=-2.0), [0]) == [3.0, 1.0]


def test_bias_comes_before_the_penalties() -> None:
    request = Request(tokens=[0], repetition_penalty=2.0, logit_bias={0: 3.0})
    assert changed([1.0, 1.0], request, []) == [2.0, 1.0]


def test_chances_are_the_log_softmax_and_its_best() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = logits.log_softmax(-1)
    found = chances(logits, [4, 0, 7], [0, 2, 12])
    for row, (chance, token, count) in enumerate(zip(found, [4, 0, 7], [0, 2, 12], strict=True)):
        assert chance.token == token
        assert chance.logprob == pytest.approx(float(expected[row, token]), abs=1e-6)
        best = expected[row].topk(count)
        assert [id_ for id_, _ in chance.top] == best.indices.tolist()
        assert [p for _, p in chance.top] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_draws_are_even_and_neither_seeds_nor_places_are_related() -> None:
    grid = torch.tensor([[draw(seed, place) for place in range(200)] for seed in range(200)])
    assert float(grid.min()) >= 0
    assert float(grid.max()) < 1
    counts = torch.histc(grid.flatten().float(), 50, 0, 1)
    assert chi_square(counts, torch.full((50,), 1 / 50)) < 86.0  # the 99.9 % point for 49 degrees
    for lines in (grid, grid.T):
        related = torch.corrcoef(lines)[~torch.eye(200, dtype=torch.bool)]
        assert float(related.abs().max()) < 0.36  # 5 standard deviations for 200 numbers
    assert draw(3, 5) == draw(3, 5)


@pytest.mark.parametrize("end", [0.0, 1 - 2**-53])
def test_the_ends_of_the_draw_give_tokens_with_probability(end: float) -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]])
    for rules in (Rules(), Rules(top_p=0.99)):
        token = choose(logits.clone(), [rules], torch.tensor([end], dtype=torch.float64)).item()
        assert token in (1, 2)


@pytest.mark.parametrize("rules", [Rules(), Rules(temperature=0), Rules(top_p=0.5)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_told_apart_and_leaves_the_others_alone(bad: float, rules: Rules) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    draws = torch.full((3,), 0.4, dtype=torch.float64)
    wanted = choose(logits.clone(), [rules] * 3, draws)
    logits[1, 4] = bad
    assert choose(logits, [rules] * 3, draws).tolist() == [wanted[0], NOT_FINITE, wanted[2]]


@pytest.mark.parametrize("rules", [Rules(temperature=1e-40), Rules(temperature=1e-40, top_p=0.9)])
def test_a_tiny_temperature_takes_the_most_probable_token(rules: Rules) -> None:
    logits = torch.tensor([[1.0, 30.0, 2.0, 29.9] + [0.0] * 8])
    assert choose(logits.clone(), [rules], torch.tensor([0.999], dtype=torch.float64)).tolist() == [1]
