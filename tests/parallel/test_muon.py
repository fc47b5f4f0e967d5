"""Muon on parts of matrices makes the update of whole ones; AdamW with compact states runs on parts too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from internlm import config
from internlm.recipe import Recipe
from tests.parallel.conftest import of_proof
from tests.parallel.ranks import Ranks
from tests.parallel.test_optimizer_shard import EVEN, ODD, name_of, require_equal

Make = Callable[..., Recipe]
STEPS = 2  # in the second, momentum
# Experts that 2 ranks divide, and three, which they cut by outputs, or where these are odd hold two and one of.
EXPERTS = EVEN | {"ffn_size": 16, "experts": {"count": 4}}
THREE = EXPERTS | {"experts": {"count": 3}}
ODD_EXPERTS = ODD | {"experts": {"count": 3}}
# Layouts of a world in which every matrix is cut by rows, by columns, by both, and where two axes cut the same dim;
# and of experts that are whole, cut by rows, by columns, and by both.
SLICE: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (2, {"shard": 2}, ODD),
    (4, {"replicate": 2, "shard": 2, "optimizer": "all"}, ODD),
    (4, {"shard": 2, "tensor": 2}, EVEN | {"ffn_size": 10}),  # the tensor axis leaves 5, which shard cuts unevenly
    (2, {"shard": 2}, ODD_EXPERTS),
]
PROOF: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (4, {"shard": 2, "tensor": 2}, EVEN),
    (4, {"shard": 2, "expert": 2, "tensor": 2}, EXPERTS),
    (2, {"replicate": 2}, ODD),
    (2, {"replicate": 2, "optimizer": "all"}, ODD),
    (2, {"tensor": 2}, EVEN),
    (4, {"shard": 4}, ODD),
    (4, {"replicate": 2, "shard": 2}, ODD),
    (4, {"replicate": 2, "tensor": 2, "optimizer": "all"}, EVEN),
    (4, {"pipeline": 2, "shard": 2}, EVEN),
    (8, {"replicate": 2, "shard": 2, "tensor": 2, "optimizer": "all"}, EVEN),
    (2, {"shard": 2}, EXPERTS),
    (2, {"shard": 2}, THREE),
    (4, {"shard": 4}, THREE),
    (4, {"shard": 2, "tensor": 2}, THREE),
    (4, {"shard": 4, "expert": 2}, EXPERTS),
    (4, {"replicate": 2, "shard": 2, "expert": 2}, EXPERTS),
    (8, {"shard": 4, "expert": 2, "tensor": 2}, EXPERTS),
]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {}


class Runs:
    """Trains with Muon on ranks; a run on one rank is made once for each model."""

    def __init__(self, ranks: Ranks, recipe: Make, alone: dict[str, Any]) -> None:
        self.ranks, self.recipe, self.alone = ranks, recipe, alone

    def results(self, case: str, world: int, model: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
        optim = {"kind": "muon", "lr": 3e-3, "eps": 1e-3}
        value = self.recipe(model=model, optim=optim, train__micro_batch_rows=1, **changes)
        return self.ranks.run(world, case, config.encode(value), STEPS)

    def require_equal(self, case: str, world: int, parallel: dict[str, Any], model: dict[str, Any]) -> None:
        """Compare a run on ranks with one on a single rank."""
        key = str(model)
        if key not in self.alone:
            self.alone[key] = self.results("train", 1, model, run=self.recipe().run + "-alone")[0]
        wanted = self.alone[key]
        for found in self.results(case, world, model, parallel=parallel):
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
            own = {name: wanted["weights"][name] for name in found["weights"]}  # of a pipeline stage
            require_equal(found["weights"], own, 1e-6)  # 6e-8 is the largest difference seen


@pytest.fixture
def runs(ranks: Ranks, recipe: Make, alone: dict[str, Any]) -> Runs:
    return Runs(ranks, recipe, alone)


@pytest.mark.parametrize(
    ("world", "parallel", "model"),
    [*SLICE, *of_proof(PROOF)],
    ids=name_of,
)
def test_muon_does_not_depend_on_the_layout(
    world: int, parallel: dict[str, Any], model: dict[str, Any], runs: Runs
) -> None:
    runs.require_equal("train", world, parallel, model)


@pytest.mark.parametrize("model", [ODD_EXPERTS, *of_proof([(ODD,)])], ids=name_of)
def test_muon_on_parts_of_few_matrices_at_once_is_the_same(model: dict[str, Any], runs: Runs) -> None:
    runs.require_equal("train_one_matrix_at_once", 2, {"shard": 2}, model)


HYBRID: dict[str, Any] = {"replicate": 2, "shard": 2, "optimizer": "all"}


@pytest.mark.parametrize(
    ("world", "parallel", "model", "state_dtype"),
    [
        (4, HYBRID, EVEN, "int8"),
        (2, {"shard": 2}, THREE, "bfloat16"),
        *of_proof([(4, HYBRID, EVEN, "bfloat16"), (2, {"shard": 2}, THREE, "int8")]),
    ],
    ids=name_of,
)
def test_compact_states_are_cut_with_their_weights_and_saved_whole(
    world: int, parallel: dict[str, Any], model: dict[str, Any], state_dtype: str, ranks: Ranks, recipe: Make
) -> None:
    def run(size: int, steps: int, name: str, **parallel: Any) -> dict[str, Any]:
        optim = {"lr": 3e-3, "state_dtype": state_dtype}
        value = recipe(model=model, optim=optim, parallel=parallel, run=recipe().run + name)
        return ranks.run(size, "train_and_save", config.encode(value), steps)[0]

    own, wanted = run(world, STEPS, "-parts", **parallel), run(1, STEPS, "-whole")
    # Blocks lie elsewhere and chance is another: the same run, but for what a moment's last bits do to a step.
    assert own["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert own["bytes"] < wanted["bytes"] / world * 1.2
    # What was saved is read by one process.
    rest = run(1, 0, "-parts")
    for found, states, share in ((own["states"], wanted["states"], 0.05), (rest["states"], own["states"], 0.015)):
        assert found.keys() == states.keys()
        for name, state in found.items():
            peak = float(np.abs(states[name]).max())
            np.testing.assert_allclose(state, states[name], rtol=0, atol=share * peak, err_msg=name)
    assert rest["valid"] == pytest.approx(own["valid"], rel=1e-5)
