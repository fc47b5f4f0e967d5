"""The old optimizer's state comes out by name, whatever rank had it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from internlm.errors import WeightsError
from internlm.model.config import ModelConfig
from internlm.weights.load import shapes
from internlm.weights.native.optimizer import KINDS, open_optimizer
from internlm.weights.weight import tensors
from tests.weights.old_layout import Old, write

SHAPE = ModelConfig(
    vocab_size=80, hidden_size=64, num_layers=7, num_heads=8, ffn_size=96, qkv_bias=True, output_bias=True
)
V02 = Old(heads=8, kv_heads=8, layers=7)
States = dict[str, dict[str, Tensor]]


def training(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Tensor], States]:
    """A model's weights, and the state they were rounded from."""
    source = torch.Generator().manual_seed(5)
    states = {
        kind: {name: torch.randn(shape, generator=source) for name, shape in shapes(config).items()} for kind in KINDS
    }
    return {name: master.to(dtype) for name, master in states["master"].items()}, states


def compare(path: Path, states: States, **overrides: object) -> None:
    found = open_optimizer(path, overrides)
    assert found.keys() == states.keys()
    for kind, expected in states.items():
        of_kind = dict(tensors(found[kind]))
        assert of_kind.keys() == expected.keys()
        for name, tensor in expected.items():
            assert of_kind[name].dtype == torch.float32
            assert torch.equal(of_kind[name], tensor), f"{kind} {name}"


SLICE = {(1, False), (2, True), (4, False)}
"""Numbers of parts, and whether they are cut block by block, that are tried always; the long proofs try all."""


@pytest.mark.parametrize(
    ("zero", "overlap"),
    [
        pytest.param(
            *(zero, overlap),
            marks=[pytest.mark.proof] * ((zero, overlap) not in SLICE),
            id=f"{zero}-{'block by block' if overlap else 'least loaded'}",
        )
        for zero, overlap in itertools.product([1, 2, 4], [False, True])
    ],
)
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_every_layout_gives_the_state_that_was_cut(
    zero: int, tensor: int, pipeline: int, overlap: bool, tmp_path: Path
) -> None:
    weights, states = training(SHAPE)
    old = replace(V02, tensor=tensor, pipeline=pipeline, zero=zero, overlap_sync_param=overlap, inv_freq=True)
    compare(write(weights, old, tmp_path, states=states), states)


@pytest.mark.parametrize(
    "old",
    [
        replace(V02, layers=8, chunks=2, pipeline=2, zero=2),
        replace(V02, layers=8, kv_heads=4, dialect="LLAMA2", adapt_hf=False, tensor=2, zero=2),
        replace(V02, layers=8, kv_heads=4, dialect="INTERNLM2", tensor=2, w2_is_down=True, zero=3),
        replace(V02, layers=8, one_group=True, zero=2),
    ],
    ids=["interleaved", "LLAMA2", "INTERNLM2", "one group"],
)
def test_dialects_and_chunks_do_too(old: Old, tmp_path: Path) -> None:
    config = replace(SHAPE, num_layers=8, num_kv_heads=old.kv_heads)
    weights, states = training(config)
    compare(write(weights, old, tmp_path, states=states), states)


@pytest.mark.parametrize("zero", [1, 2, 64])
def test_weights_in_fp32_are_a_group_of_their_own(zero: int, tmp_path: Path) -> None:
    # Norms in fp32 beside a bf16 model; with 64 ranks most of them have nothing of the group.
    weights, states = training(SHAPE)
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name] = states["master"][name].clone()
    compare(write(weights, replace(V02, zero=zero), tmp_path / "mixed", states=states), states)
    compare(write(states["master"], replace(V02, zero=zero), tmp_path / "all", states=states), states)


def test_before_the_first_step_there_are_only_master_weights(tmp_path: Path) -> None:
    weights, states = training(SHAPE)
    master = {"master": states["master"]}
    compare(write(weights, replace(V02, zero=2), tmp_path, states=master), master)


def test_the_plan_beside_the_files_will_do(tmp_path: Path) -> None:
    weights, states = training(SHAPE)
    path = write(weights, replace(V02, zero=2), tmp_path, states=states)
    for rank in range(2):
        rewrite(path / f"optimizer_tp0_pp0_zo{rank}.pt", zero_devide_optim_plan=None)
    compare(path, states)
    for file in path.glob("gpus-*"):
        file.unlink()
    with pytest.raises(WeightsError, match="no partition plan"):
        open_optimizer(path)


def rewrite(file: Path, **changes: object) -> None:
    content = torch.load(file, map_location="cpu", weights_only=False, pickle_module=Plain)
    torch.save({**content, **changes}, file)


class Plain:
    """A pickle module that knows no framework: its enum is a text."""

    import pickle as _pickle

    load, loads, Pickler = _pickle.load, _pickle.loads, _pickle.Pickler

    class Unpickler(_pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            return str if module.startswith("internlm.core") else super().find_class(module, name)


def test_a_state_of_another_step_is_refused(tmp_path: Path) -> None:
    weights, states = training(SHAPE)
    path = write(weights, replace(V02, zero=2), tmp_path, states=states)
    newer = write({name: t + 1 for name, t in weights.items()}, V02, tmp_path / "newer")
    (newer / "model_tp0_pp0.pt").rename(path / "model_tp0_pp0.pt")
    with pytest.raises(WeightsError, match="of different steps"):
        open_optimizer(path)


def test_a_plan_that_exchanges_equal_shapes_is_refused(tmp_path: Path) -> None:
    # The head and the embedding have the same shape: only their values tell them apart.
    weights, states = training(SHAPE)
    path = write(weights, replace(V02, zero=1), tmp_path, states=states)
    file = path / "optimizer_tp0_pp0_zo0.pt"
    plan = torch.load(next(path.glob("gpus-*")))
    first = plan[0][0]
    at = [number for number, text in enumerate(first) if text.endswith("_80_64")]
    first[at[0]], first[at[1]] = first[at[1]], first[at[0]]
    rewrite(file, zero_devide_optim_plan=plan)
    with pytest.raises(WeightsError, match="another than the one in the model file"):
        open_optimizer(path)


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    weights, states = training(SHAPE)
    path = write(weights, V02, tmp_path, states=states)
    rewrite(path / "optimizer_tp0_pp0_zo0.pt", zero_devide_optim_plan=[[["0_64_81"]], [[]]])
    with pytest.raises(WeightsError, match="not one of the model file's weights"):
        open_optimizer(path)


def test_flat_tensors_of_another_length_are_refused(tmp_path: Path) -> None:
    weights, states = training(SHAPE)
    path = write(weights, V02, tmp_path, states=states)
    file = path / "optimizer_tp0_pp0_zo0.pt"
    flat = torch.load(file, map_location="cpu", weights_only=False, pickle_module=Plain)["flat_fp32_weights"][0]
    rewrite(file, flat_fp32_weights={0: torch.cat([flat.detach(), torch.zeros(1)])})
    with pytest.raises(WeightsError, match="master is not as long"):
        open_optimizer(path)


def test_missing_ranks_and_other_optimizers_are_refused(tmp_path: Path) -> None:
    weights, states = training(SHAPE)
    path = write(weights, replace(V02, zero=2, tensor=2), tmp_path, states=states)
    (path / "optimizer_tp1_pp0_zo0.pt").unlink()
    with pytest.raises(WeightsError, match=r"optimizer_tp1_pp0_zo0\.pt missing"):
        open_optimizer(path)
    torch.save({"state": {}, "param_groups": []}, path / "optimizer_tp1_pp0_zo0.pt")
    with pytest.raises(WeightsError, match="not of the old framework's zero optimizer"):
        open_optimizer(path)
    for file in path.glob("optimizer_*"):
        file.unlink()
    with pytest.raises(WeightsError, match="holds no optimizer state"):
        open_optimizer(path)


def test_weight_parallel_state_is_refused(tmp_path: Path) -> None:
    path = write(training(SHAPE)[0], replace(V02, weight=2), tmp_path)
    torch.save({}, path / "optimizer_tp0_wp0_pp0_dp0.pt")
    with pytest.raises(WeightsError, match="weight parallelism is not read"):
        open_optimizer(path)
