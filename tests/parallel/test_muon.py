"""Muon on parts of matrices makes the update of whole ones; AdamW with compact states runs on parts too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from internlm import config
from internlm.recipe import Recipe
from tests.parallel.ranks import Ranks

Make = Callable[..., Recipe]
STEPS = 3
EVEN: dict[str, Any] = {
    "vocab_size": 280, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 48,
}  # fmt: skip
ODD = EVEN | {"hidden_size": 35, "num_heads": 5, "num_kv_heads": 5, "head_dim": 6, "ffn_size": 47}
# Layouts of a world in which every matrix is cut by rows, by columns, by both, and where two axes cut the same dim.
SLICE: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (2, {"shard": 2}, ODD),
    (4, {"replicate": 2, "shard": 2, "optimizer": "all"}, ODD),
    (4, {"shard": 2, "tensor": 2}, EVEN),
]
PROOF: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (2, {"replicate": 2}, ODD),
    (2, {"replicate": 2, "optimizer": "all"}, ODD),
    (2, {"tensor": 2}, EVEN),
    (4, {"shard": 4}, ODD),
    (4, {"replicate": 2, "shard": 2}, ODD),
    (4, {"replicate": 2, "tensor": 2, "optimizer": "all"}, EVEN),
    (4, {"pipeline": 2, "shard": 2}, EVEN),
    (8, {"replicate": 2, "shard": 2, "tensor": 2, "optimizer": "all"}, EVEN),
]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {}


def name_of(value: object) -> str | None:
    if not isinstance(value, dict):
        return None
    return str(value["hidden_size"]) if "hidden_size" in value else "-".join(f"{k}{v}" for k, v in value.items())


@pytest.mark.parametrize(("world", "parallel", "model"), SLICE + PROOF, ids=name_of)
def test_muon_does_not_depend_on_the_layout(
    world: int,
    parallel: dict[str, Any],
    model: dict[str, Any],
    ranks: Ranks,
    recipe: Make,
    alone: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    if (world, parallel, model) not in SLICE and not request.config.getoption("--proof"):
        pytest.skip("a layout of the proof")

    def run(size: int, **changes: Any) -> list[dict[str, Any]]:
        optim = {"kind": "muon", "lr": 3e-3, "eps": 1e-3}
        value = recipe(model=model, optim=optim, train__micro_batch_rows=1, **changes)
        return ranks.run(size, "train", config.encode(value), STEPS)

    key = str(model)
    if key not in alone:
        alone[key] = run(1, run=recipe().run + "-alone")[0]
    wanted = alone[key]
    for found in run(world, parallel=parallel):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        for name, value in found["weights"].items():
            np.testing.assert_allclose(value, wanted["weights"][name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_compact_states_are_cut_with_their_weights_and_saved_whole(
    state_dtype: str, ranks: Ranks, recipe: Make
) -> None:
    optim = {"lr": 3e-3, "state_dtype": state_dtype}
    results = {}
    for world, parallel in [(4, {"replicate": 2, "shard": 2, "optimizer": "all"}), (1, {})]:
        value = recipe(model=EVEN, optim=optim, parallel=parallel, run=recipe().run + str(world))
        results[world] = ranks.run(world, "train_and_save", config.encode(value), STEPS)
    own, wanted = results[4][0], results[1][0]
    # Blocks lie elsewhere and chance is another: the same run, but for what a moment's last bits do to a step.
    assert own["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
    assert own["states"].keys() == wanted["states"].keys()
    for name, value in own["states"].items():
        assert value.shape == wanted["states"][name].shape
    assert own["bytes"] < wanted["bytes"] / 4 * 1.2
    # What was saved is read by one process.
    value = recipe(model=EVEN, optim=optim, run=recipe().run + "4")
    rest = ranks.run(1, "train_and_save", config.encode(value), 0)[0]
    for name, state in rest["states"].items():
        peak = float(np.abs(own["states"][name]).max())
        np.testing.assert_allclose(state, own["states"][name], atol=0.015 * peak, err_msg=name)
    assert rest["valid"] == pytest.approx(own["valid"], rel=1e-5)
