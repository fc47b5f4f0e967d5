"""`optimizer: all` gives the numbers of `optimizer: shard`, with 1 / R of its states on each rank."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from internlm import config
from internlm.parallel.optimizer_shard import Slice
from internlm.recipe import Recipe
from tests.parallel.conftest import of_proof
from tests.parallel.ranks import Ranks

Make = Callable[..., Recipe]
EVEN: dict[str, Any] = {
    "vocab_size": 280, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 48,
    "qkv_bias": True, "output_bias": True,
}  # fmt: skip
# Rows that 2 ranks do not divide, columns neither, and vectors that cannot be sliced at all.
ODD = EVEN | {"vocab_size": 283, "hidden_size": 35, "num_heads": 5, "num_kv_heads": 5, "head_dim": 6, "ffn_size": 47}
TIED = EVEN | {"tie_embeddings": True}
# Ranks, layout, model, length of a gradient at which it is clipped.
SLICE: list[tuple[int, dict[str, Any], dict[str, Any], float]] = [
    (4, {"replicate": 4}, EVEN, 0.0),
    (4, {"replicate": 2, "zero": "2-gather", "recompute": {"kind": "full"}}, TIED, 0.1),
]
PROOF: list[tuple[int, dict[str, Any], dict[str, Any], float]] = [
    (4, {"replicate": 2, "zero": "1"}, ODD, 0.0),
    (4, {"replicate": 2, "tensor": 2}, EVEN, 0.1),
    (2, {"replicate": 2}, ODD, 0.1),
    (4, {"replicate": 2, "zero": "3"}, ODD, 0.1),
    (4, {"replicate": 4}, ODD, 0.0),
    (4, {"replicate": 2, "zero": "2"}, EVEN, 0.0),
    (4, {"replicate": 2, "zero": "2"}, TIED, 0.0),
    (4, {"replicate": 2, "zero": "3", "offload": True}, EVEN, 0.0),
    (4, {"replicate": 2, "zero": "2-gather", "prefetch": 2}, ODD, 0.0),
    (4, {"replicate": 2, "context": 2}, EVEN, 0.1),
    (4, {"replicate": 2, "tensor": 2, "sequence": False, "zero": "3"}, EVEN, 0.0),
    (4, {"replicate": 2, "pipeline": 2}, EVEN, 0.1),
    (8, {"replicate": 2, "shard": 2, "tensor": 2}, EVEN, 0.1),
    (8, {"replicate": 4, "shard": 2, "zero": "1"}, ODD, 0.1),
    (8, {"replicate": 2, "shard": 2, "pipeline": 2}, EVEN, 0.0),
]


def tree(make: Make, model: dict[str, Any] = EVEN, **changes: Any) -> dict[str, Any]:
    changes = {"train__micro_batch_rows": 1, "optim": {"lr": 1e-3, "eps": 1e-3}} | changes
    return config.encode(make(model=model, **changes))


def name_of(value: object) -> str | None:
    if not isinstance(value, dict):
        return None
    if "vocab_size" in value:
        kind = "odd" if value["hidden_size"] % 2 else "tied" if "tie_embeddings" in value else "even"
        return kind + (f"-experts{value['experts']['count']}" if "experts" in value else "")
    return "-".join(f"{key}{each}" for key, each in value.items() if not isinstance(each, dict))


def require_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    """Compare tensors by name; `tolerance` 0: bit by bit."""
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], atol=tolerance, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("world", "parallel", "model", "limit"),
    [*SLICE, *of_proof(PROOF)],
    ids=name_of,
)
def test_sliced_states_give_the_same_run(
    world: int,
    parallel: dict[str, Any],
    model: dict[str, Any],
    limit: float,
    ranks: Ranks,
    recipe: Make,
) -> None:
    calls = [
        ("train", tree(recipe, model, train__max_grad_norm=limit, parallel=layout), 3)
        for layout in (parallel | {"optimizer": "all"}, parallel)
    ]
    # Two replicas add two numbers, in whatever order. Otherwise: sums, and norms of slices, are rounded differently.
    tolerance = 1e-6 if limit or parallel["replicate"] > 2 else 0.0
    for own, other in ranks.run(world, "each", *calls):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert own["norm"] == pytest.approx(other["norm"], rel=1e-6)
        assert own["valid"] == pytest.approx(other["valid"], rel=1e-6)
        require_equal(own["gradients"], other["gradients"], tolerance)
        require_equal(own["weights"], other["weights"], 1e-6)  # the last entries of a slice are not vectorised


def test_a_checkpoint_goes_on_bit_by_bit_and_in_any_other_layout(ranks: Ranks, recipe: Make, tmp_path: Path) -> None:
    def runs(world: int, *named: tuple[str, int], **parallel: Any) -> list[dict[str, Any]]:
        """Each name with steps to take; one after the other in one process group, in which torch plans once."""
        trees = [
            tree(recipe, ODD, parallel=parallel, run=str(tmp_path / n), train__micro_batch_rows=2) for n, _ in named
        ]
        calls = [("train_and_save", value, steps) for value, (_, steps) in zip(trees, named, strict=True)]
        first, *others = ranks.run(world, "each", *calls)
        for other in others:
            for own, result in zip(first, other, strict=True):
                require_equal(result["weights"], own["weights"], 0.0)
        return first

    def run(world: int, name: str, begun: str, steps: int, **parallel: Any) -> dict[str, Any]:
        shutil.copytree(tmp_path / begun, tmp_path / name)
        return runs(world, (name, steps), **parallel)[0]

    whole, _ = runs(4, ("whole", 3), ("begun", 1), replicate=2, optimizer="all")
    rest = run(4, "rest", "begun", 2, replicate=2, optimizer="all")
    assert rest["loss"] == whole["loss"][1:]
    require_equal(rest["weights"], whole["weights"], 0.0)
    require_equal(rest["states"], whole["states"], 0.0)
    third = run(2, "third", "begun", 1, shard=2)
    fourth = run(2, "fourth", "third", 1, replicate=2, optimizer="all")
    assert [*third["loss"], *fourth["loss"]] == pytest.approx(whole["loss"][1:], rel=1e-5)
    require_equal(fourth["weights"], whole["weights"], 1e-5)
    require_equal(fourth["states"], whole["states"], 1e-5)


@pytest.mark.parametrize(("world", "replicas"), [(4, 2), (4, 4)])
def test_each_rank_holds_its_share_of_the_states(world: int, replicas: int, ranks: Ranks, recipe: Make) -> None:
    calls = [
        ("bytes_held", tree(recipe, parallel={"replicate": replicas, "optimizer": kind})) for kind in ("all", "shard")
    ]
    steps = 4 * 28  # a counter for each parameter, on every rank
    for few, many in ranks.run(world, "each", *calls):
        assert few - steps <= (many - steps) / replicas * 1.01


def test_replicas_talk_once_per_step_and_group_of_weights(ranks: Ranks, recipe: Make) -> None:
    elements, groups, kinds = {}, 5, ("all", "shard")  # two blocks, embedding, head, final norm
    calls = [("count_traffic", tree(recipe, parallel={"replicate": 2, "optimizer": kind})) for kind in kinds]
    for kind, seen in zip(kinds, ranks.run(4, "each", *calls)[0], strict=True):  # two micro-batches
        wanted = {"reduce-scatter": groups, "all-gather": groups} if kind == "all" else {"all-reduce": groups}
        assert Counter(name for name, _ in seen) == wanted
        elements[kind] = sum(size for name, size in seen if name != "all-gather")
    assert elements["all"] == elements["shard"]


def test_weights_are_waited_for_one_group_ahead_of_their_use(ranks: Ranks, recipe: Make) -> None:
    value = tree(recipe, parallel={"replicate": 2, "optimizer": "all"}, train__micro_batch_rows=4)
    groups = ["model", "embedding", "blocks.0", "blocks.1", "head"]
    ready: dict[str, set[str]] = {"gathers": set(), "products": set()}
    ran = []
    for who, what, name in ranks.run(2, "wait_order", value)[0]:
        if what == "waits for":
            ready[who].add(groups[int(name)])
            continue
        ran.append(name)
        here = groups.index(name)
        if name != "model":
            assert set(groups[: here + 1]) <= ready["products"]
            assert groups[here] in ready["gathers"]
        if name.startswith("blocks"):
            assert groups[here + 1] in ready["gathers"]  # parallel.prefetch is 1
            assert groups[here + 1] not in ready["products"]
    assert ran == ["embedding", "blocks.0", "blocks.1", "model", "head"]


@pytest.mark.parametrize("shape", [(5, 7), (3, 8), (2, 3), (0, 7), (4, 1, 9)])
def test_pieces_join_to_what_they_were_cut_from(shape: tuple[int, ...]) -> None:
    part = nn.Parameter(torch.randn(shape))
    for place in range(3):
        dim = part.ndim - 1
        length = max(0, min(-(-shape[dim] // 3), shape[dim] - place * -(-shape[dim] // 3)))
        owned = nn.Parameter(torch.zeros(*shape[:-1], length))
        each = Slice("w", part, owned, dim, replicas=3, place=place)
        pieces = each.cut(part.detach())
        assert torch.equal(each.join(pieces), part)
        each.refresh()
        assert torch.equal(owned, part.detach().narrow(dim, min(place * each.piece[dim], shape[dim]), length))
