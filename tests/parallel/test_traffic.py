"""The closed form of what ranks send each other equals, number for number, what the real step asks of its groups."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from internlm import config
from internlm import recipe as recipes
from internlm.compat import groups
from internlm.cost import traffic
from internlm.errors import ConfigError
from internlm.model import heads
from internlm.model.presets import preset
from internlm.parallel.mesh import Layout, Mesh, ParallelConfig
from internlm.parallel.replicate import Replicas
from internlm.plan import dryrun
from internlm.recipe import Recipe
from tests.parallel.conftest import of_proof
from tests.parallel.ranks import Ranks

ROOT = Path(__file__).parents[2]
MODEL: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "ffn_size": 128,
    "qkv_bias": True, "output_bias": True,
}  # fmt: skip
ODD = MODEL | {"vocab_size": 283, "hidden_size": 60, "num_heads": 6, "num_kv_heads": 3, "ffn_size": 131}
TIED = MODEL | {"tie_embeddings": True}
HEADS = MODEL | {"qk_norm": True}
ONE, THREE, FOUR, FIVE = (MODEL | {"num_layers": count} for count in (1, 3, 4, 5))
FULL, HALF = {"kind": "full"}, {"kind": "operators", "ratio": 0.5}
FLAT: dict[str, Any] = {"shard": 1024, "zero": "3"}
HYBRID: dict[str, Any] = {"replicate": 128, "shard": 8, "zero": "2"}

# Layout, micro-batches, model, ranks.
Case = tuple[dict[str, Any], int, dict[str, Any], tuple[int, ...]]
SLICE: list[Case] = [
    *[({"replicate": 128, "shard": 8, "zero": zero}, 3, MODEL, (0,)) for zero in ("2", "3")],
    ({"replicate": 128, "shard": 8, "zero": "1"}, 2, MODEL, (0,)),
    ({"replicate": 128, "shard": 8}, 1, ODD, (1023,)),
    ({"replicate": 128, "shard": 8, "zero": "2-gather"}, 2, TIED, (5,)),
    ({"replicate": 1024, "shard": 1}, 2, MODEL, (0,)),
    ({"replicate": 16, "shard": 64, "optimizer": "all"}, 1, ODD, (1023,)),  # the last parts are short
    ({"replicate": 64, "shard": 4, "tensor": 4, "zero": "1"}, 2, MODEL, (0,)),
    ({"replicate": 64, "shard": 4, "tensor": 4, "sequence": False, "zero": "3", "recompute": FULL}, 1, HEADS, (0,)),
    ({"replicate": 128, "shard": 1, "context": 8, "recompute": FULL}, 1, MODEL, (7,)),
    ({"shard": 64, "context": 16, "recompute": FULL}, 1, MODEL, (0,)),  # heads do not divide: keys and values travel
    ({"pipeline": 4, "replicate": 32, "shard": 8, "zero": "3"}, 4, FOUR, (256,)),  # a stage in the middle
    ({"pipeline": 2, "replicate": 16, "shard": 8, "context": 2, "tensor": 2, "recompute": HALF}, 2, THREE, (0,)),
]
PROOF: list[Case] = [
    (FLAT, 4, MODEL, (0, 1023)),
    ({"replicate": 128, "shard": 8, "zero": "2-gather"}, 2, MODEL, (0,)),
    ({"replicate": 128, "shard": 8, "zero": "3"}, 2, TIED, (5,)),
    ({"replicate": 64, "shard": 4, "tensor": 4, "zero": "2", "recompute": FULL}, 1, HEADS, (1023,)),
    ({"replicate": 16, "shard": 64, "optimizer": "all"}, 1, ODD, (0,)),
    *[({"replicate": 2, "shard": 512, "zero": zero}, 3, MODEL, (0,)) for zero in ("1", "2", "2-gather", "3")],
    (FLAT, 1, ODD, (1023,)),
    ({"replicate": 32, "shard": 32, "optimizer": "all"}, 1, MODEL, (1023,)),
    ({"replicate": 64, "shard": 4, "tensor": 4, "sequence": False, "zero": "3", "recompute": FULL}, 1, MODEL, (0,)),
    ({"replicate": 64, "shard": 4, "tensor": 4, "sequence": False, "zero": "1"}, 2, HEADS, (0,)),
    ({"pipeline": 2, "replicate": 16, "shard": 8, "context": 2, "tensor": 2, "recompute": HALF}, 2, FIVE, (0, 1023)),
    ({"pipeline": 4, "replicate": 32, "shard": 8, "zero": "3"}, 4, FOUR, (0, 1023)),
    *[({"replicate": 128, "shard": 8, "zero": zero}, 1, ODD, (0, 1023)) for zero in ("1", "2-gather", "3")],
    ({"replicate": 1024, "shard": 1, "offload": True}, 1, MODEL, (0,)),
    ({"replicate": 16, "shard": 64, "optimizer": "all"}, 1, HEADS, (0, 1023)),
    ({"pipeline": 2, "replicate": 16, "shard": 8, "context": 2, "tensor": 2}, 2, FIVE | {"qk_norm": True}, (0, 1023)),
    ({"replicate": 16, "shard": 64, "optimizer": "all"}, 2, MODEL, (0, 1023)),  # some parts have no key rows
    ({"replicate": 8, "shard": 16, "tensor": 8, "optimizer": "all"}, 2, MODEL | {"num_kv_heads": 8}, (0,)),
    ({"replicate": 64, "shard": 4, "tensor": 4, "zero": "2", "recompute": HALF}, 2, MODEL, (1023,)),
    ({"replicate": 64, "shard": 4, "context": 4}, 2, MODEL, (0,)),
    ({"replicate": 32, "shard": 2, "context": 4, "tensor": 4, "recompute": HALF}, 1, MODEL, (1023,)),
    ({"pipeline": 2, "replicate": 32, "shard": 4, "tensor": 4}, 2, FOUR, (0, 1023)),
    ({"pipeline": 2, "shard": 512, "schedule": "interleaved", "stages_per_rank": 2}, 2, FOUR, (0, 1023)),
    ({"pipeline": 2, "replicate": 64, "shard": 8, "schedule": "zbv", "stages_per_rank": 2}, 4, FOUR, (0, 1023)),
]


def recipe_of(parallel: dict[str, Any], micro_batches: int, model: dict[str, Any], **sizes: int) -> Recipe:
    world, length, rows = (sizes.get(name, other) for name, other in (("world", 1024), ("length", 32), ("rows", 2)))
    tokens = length * rows * micro_batches * Layout.of(config.decode(ParallelConfig, parallel), world).data
    return config.decode(
        Recipe,
        {
            "run": "nowhere",
            "model": model,
            "data": {"seq_len": length, "train": {"none": {"path": "nowhere"}}},
            "train": {"tokens": tokens, "batch_tokens": tokens, "micro_batch_rows": rows},
            "parallel": parallel,
        },
    )


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the tensors of dry runs memory: for small models, a quarter of the time of tensors that know their shape."""
    monkeypatch.setattr(groups, "fake_tensors", contextlib.nullcontext)


def counted_and_computed(recipe: Recipe, rank: int, world: int) -> tuple[traffic.Exchanges, traffic.Exchanges]:
    computed = traffic.by_group(traffic.step_traffic(dryrun.run_of(recipe, world), rank))
    return dryrun.dry_run(recipe, rank, world).exchanges, computed


def name_of(value: object) -> str | None:
    if not isinstance(value, dict):
        return None if isinstance(value, tuple) else str(value)
    if "vocab_size" in value:
        special = {"tie_embeddings": "tied", "qk_norm": "heads"}.get([*value][-1], "even")
        return {283: "odd"}.get(value["vocab_size"], special)
    return "-".join(f"{key}{each}" for key, each in value.items() if not isinstance(each, dict))


@pytest.mark.parametrize(
    ("parallel", "micro_batches", "model", "ranks"),
    [*SLICE, *of_proof(PROOF)],
    ids=name_of,
)
def test_the_formula_gives_every_collective_of_the_real_step(
    parallel: dict[str, Any],
    micro_batches: int,
    model: dict[str, Any],
    ranks: tuple[int, ...],
    request: pytest.FixtureRequest,
) -> None:
    """By default only tensor ranks, and every recipe below, have tensors without memory, as plans do."""
    if "tensor" not in parallel and not request.config.getoption("--proof"):
        request.getfixturevalue("memory")
    recipe = recipe_of(parallel, micro_batches, model)
    for rank in ranks:
        counted, computed = counted_and_computed(recipe, rank, 1024)
        assert counted == computed
        assert counted


@pytest.mark.parametrize(
    "parallel",
    [{"replicate": 2, "zero": "3"}, {"pipeline": 2, "context": 2, "shard": 1}],
    ids=name_of,
)
def test_ranks_that_are_there_exchange_the_same(
    parallel: dict[str, Any], ranks: Ranks, recipe: Callable[..., Recipe]
) -> None:
    made = recipe(parallel=parallel, train__micro_batch_rows=1)
    run = replace(dryrun.run_of(made, 4), dtype_bytes=4)
    for rank, counted in enumerate(ranks.run(4, "count_exchanges", config.encode(made))):
        assert counted == traffic.by_group(traffic.step_traffic(run, rank))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"optim": {"kind": "muon"}}, "optim.kind"),
        ({"objective": {"kind": "lm", "z_loss": 1e-4}}, "objective"),
        ({"model": MODEL | {"experts": {"count": 4}}}, "model.experts"),
    ],
    ids=str,
)
def test_what_the_formula_does_not_know_it_refuses(changes: dict[str, Any], where: str) -> None:
    tree = config.encode(recipe_of({"shard": 4}, 2, MODEL, world=4))
    with pytest.raises(ConfigError, match=rf"^{where}: is beyond the closed form"):
        dryrun.run_of(config.decode(Recipe, tree | changes), 4)


@pytest.mark.parametrize("rank", [0, 700, 1023])
def test_the_groups_of_a_rank_lie_where_the_formula_says(rank: int) -> None:
    """What stays inside a machine follows from it. Counted steps name their groups by the ranks that are in them."""
    recipe = recipe_of({"pipeline": 2, "replicate": 4, "shard": 8, "context": 4, "tensor": 4}, 2, FOUR)
    run, layout = dryrun.run_of(recipe, 1024), Layout.of(recipe.parallel, 1024)
    groups.join_fake_group(rank, 1024)
    try:
        mesh = Mesh(layout, "cpu")
        for axis in ("pipeline", "replicate", "shard", "context", "tensor"):
            size, stride = run.span(axis)  # type: ignore[arg-type]
            first = rank - rank // stride % size * stride
            found = dist.get_process_group_ranks(mesh.group(axis))  # type: ignore[arg-type]
            assert found == [first + place * stride for place in range(size)]
    finally:
        groups.leave_fake_group()


@pytest.mark.usefixtures("memory")
def test_experts_are_counted() -> None:
    """Their numbers of rows, and the rows, forward and backward: to the experts and back."""
    model = MODEL | {"experts": {"count": 8, "per_token": 2}}
    recipe = recipe_of({"shard": 8, "expert": 4}, 1, model, world=8)
    calls, size = dryrun.dry_run(recipe, 5, 8).exchanges[4, 1, "all-to-all"]
    assert calls == 2 * (1 + 4)
    assert size == 2 * (4 * 8 + 4 * 2 * 64 * 64 * 2)  # 4 bytes an expert; in bf16, each of 64 tokens twice, 64 wide


@pytest.mark.usefixtures("memory")
def test_a_wrong_policy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of({"replicate": 128, "shard": 8, "zero": "2"}, 2, MODEL)
    monkeypatch.setattr("internlm.parallel.shard.begin_backward", lambda *_, **__: None)  # as without micro-batches
    counted, computed = counted_and_computed(recipe, 0, 1024)
    assert counted != computed
    assert counted[128, 8, "all-reduce"][0] == 2 * computed[128, 8, "all-reduce"][0]


def test_moments_of_any_type_can_be_planned() -> None:
    recipe = recipe_of({"replicate": 2, "shard": 4}, 1, ONE | {"qkv_bias": False, "output_bias": False}, world=8)
    found = [
        dryrun.dry_run(replace(recipe, optim=replace(recipe.optim, state_dtype=name)), 0, 8)
        for name in ("float32", "bfloat16", "int8")
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.usefixtures("memory")
def test_gradients_of_copies_fill_buckets_as_the_formula_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "BUCKET_BYTES", 20_000)
    for model in (ONE, TIED | {"num_layers": 1}):
        counted, computed = counted_and_computed(recipe_of({"replicate": 1024, "shard": 1}, 1, model), 0, 1024)
        assert counted == computed
        assert counted[1024, 1, "all-reduce"][0] > 4


def test_buckets_leave_in_the_last_backward_of_every_step() -> None:
    groups.join_fake_group(0, 2)
    try:
        model = torch.nn.Linear(3, 2)
        replicas = Replicas(model, dist.group.WORLD)
        for _ in range(3):
            for is_last in (False, True):
                replicas.begin_backward(is_last=is_last)
                model(torch.ones(1, 3)).sum().backward()
                assert len(replicas.works) == is_last, "while backward runs, not after it"
            replicas.finish()
    finally:
        groups.leave_fake_group()


def test_the_formula_knows_the_constants_of_the_code() -> None:
    assert traffic.CHUNK_LOGITS == heads.CHUNK_LOGITS


def published(parallel: dict[str, Any], micro_batches: int, layers: int = 32) -> Recipe:
    model = preset("internlm-7b") | {"num_layers": layers}
    return recipe_of(parallel, micro_batches, model, length=2048)


@pytest.mark.parametrize(("micro_batches", "most"), [(1, 1 / 7), (4, 1 / 30)])
def test_hybrid_zero_keeps_its_traffic_inside_machines(
    micro_batches: int, most: float, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Per GPU: what it sends in groups that span machines. One layer counted; all 32 computed.

    To count four micro-batches of this width is left to the proof: above, three of a small model are counted.
    """
    monkeypatch.setattr(heads, "CHUNK_LOGITS", 1 << 34)  # the head in one piece: fewer operators, the same exchanges
    totals = {}
    for name, parallel in (("flat", FLAT), ("hybrid", HYBRID)):
        if micro_batches == 1 or request.config.getoption("--proof"):
            counted, computed = counted_and_computed(published(parallel, micro_batches, layers=1), 0, 1024)
            assert counted == computed
        whole = dryrun.run_of(published(parallel, micro_batches), 1024)
        totals[name] = traffic.total(traffic.step_traffic(whole), gpus_per_node=8)
    assert totals["hybrid"].spanning_bytes <= most * totals["flat"].spanning_bytes
    assert totals["hybrid"].steps <= 1 / 8 * totals["flat"].steps
    # Rings that visit the ranks of a machine one after the other leave no difference at one micro-batch.
    ratio = totals["flat"].crossing_bytes / totals["hybrid"].crossing_bytes
    assert ratio == pytest.approx(micro_batches, rel=0.03)


ALIKE = [f"pretrain/internlm-{name}" for name in ("7b", "7b-32k", "7b-64gpus", "20b", "20b-8gpus", "20b-1024gpus")]
"""Recipes whose step another one takes too, but for sizes and the stage of ZeRO."""


def ranks_of(recipe: Recipe) -> int:
    sizes = recipe.parallel
    return sizes.pipeline * sizes.replicate * sizes.shard * sizes.context * sizes.tensor


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT / "recipes"))
)
def test_every_recipe_takes_a_step_on_its_first_and_last_rank(
    path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Its own values but for depth and the number of micro-batches; where it takes all ranks there are, 8.

    Without a pipeline the last rank does what the first one does: it is left to the proof, as are two micro-batches,
    and the steps of recipes that are much like others: those are computed only.
    """
    monkeypatch.setattr(heads, "CHUNK_LOGITS", 1 << 34)
    recipe = recipes.load(path).value
    if recipe.model is None:
        with pytest.raises(ConfigError, match="model"):
            dryrun.dry_run(recipe)
        return
    world = ranks_of(recipe) or 8
    data, length = Layout.of(recipe.parallel, world).data, recipe.data.seq_len
    micro = recipe.train.micro_rows(length, data) * data * length
    stages = recipe.parallel.pipeline * recipe.parallel.stages_per_rank
    proof = request.config.getoption("--proof")
    if str(path.relative_to(ROOT / "recipes").with_suffix("")) in ALIKE and not proof:
        assert traffic.step_traffic(dryrun.run_of(recipe, world))
        return
    both = stages > 1 or proof
    for rank, most in ({0: 2, world - 1: 1} if both else {0: 1}).items():
        tokens = min(recipe.train.batch_tokens, max(most, stages) * micro)
        shallow = replace(recipe.model, num_layers=stages)
        shorter = replace(recipe, model=shallow, train=replace(recipe.train, batch_tokens=tokens))
        if recipe.optim.kind == "muon" or recipe.model.experts is not None:  # not in the formula
            assert dryrun.dry_run(shorter, rank, world).updated
            continue
        dryrun.run_of(recipe, world)  # the whole of it fits
        counted, computed = counted_and_computed(shorter, rank, world)
        assert counted == computed
