"""Recipes as they are shipped: where they start, and on which machines."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from internlm import config, runtime
from internlm import recipe as recipes
from internlm.errors import ConfigError
from internlm.model.config import LinearScaling
from internlm.optim.optimizer import MuonConfig
from internlm.parallel.mesh import Layout
from internlm.recipe import Recipe
from internlm.train import start

Make = Callable[..., Recipe]
ROOT = Path(__file__).parents[2] / "recipes"
GIB = 2**30
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 32}


@pytest.mark.parametrize(("name", "before"), [("7b-32k", "7b"), ("7b-256k", "7b-32k")])
def test_longer_rows_are_learnt_on_top_of_the_run_before(name: str, before: str) -> None:
    longer, shorter = (recipes.load(ROOT / f"pretrain/internlm-{each}.yaml").value for each in (name, before))
    assert longer.init_from == shorter.run != longer.run
    assert longer.model is not None
    assert shorter.model is not None
    assert longer.model.rope.base > shorter.model.rope.base
    assert longer.model.context_length == longer.data.seq_len > shorter.data.seq_len
    changed = {"rope": longer.model.rope, "context_length": longer.model.context_length}
    assert replace(shorter.model, **changed) == longer.model
    assert longer.train.batch_tokens == shorter.train.batch_tokens


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"base": 5e5}, "base 500000 and scaling none"),
        ({"scaling": YARN}, "base 10000 and scaling yarn factor 4.0 original_length 32 beta_fast 32.0 beta_slow 1.0"),
    ],
)
def test_a_run_may_go_on_with_other_rotary_positions_and_says_so(
    recipe: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, rope: dict[str, Any], words: str
) -> None:
    first = recipes.prepare(recipe(run=str(tmp_path / "first"), train__tokens=256))
    first.fit()
    value = recipe(
        init_from=str(tmp_path / "first"),
        model__rope=rope,
        model__context_length=64,
        data__seq_len=64,
        train__tokens=512,
    )
    with caplog.at_level(logging.INFO, logger="internlm"):
        second = recipes.prepare(value)
    (line,) = [line for line in caplog.messages if line.startswith("rotary positions")]
    assert "base 10000 and scaling none in " in line
    assert f"{words} from now on" in line
    assert second.model.config == value.model
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name))
    second.fit()
    caplog.clear()
    assert recipes.prepare(value).progress.step == 2
    assert not [line for line in caplog.messages if line.startswith("rotary positions")]


def test_how_experts_are_balanced_is_not_what_a_model_is(recipe: Make, tmp_path: Path) -> None:
    before = {"run": str(tmp_path / "first"), "model__experts": {"count": 4, "balance_loss": 0.02}}
    recipes.prepare(recipe(**before, train__tokens=256)).fit()
    other = {"model__experts": {"count": 4, "balance_loss": 0.0}}
    recipes.prepare(recipe(init_from=before["run"], **other)).stepper.step()
    assert recipes.prepare(recipe(**before | other)).progress.step == 1
    with pytest.raises(ConfigError, match=r"experts.count: 4 there, 2 here$"):
        recipes.prepare(recipe(init_from=before["run"], run=str(tmp_path / "x"), model__experts={"count": 2}))


def test_other_rotary_positions_excuse_no_other_difference(recipe: Make, tmp_path: Path) -> None:
    recipes.prepare(recipe(run=str(tmp_path / "first"), train__tokens=256)).fit()
    value = recipe(init_from=str(tmp_path / "first"), model__rope={"base": 5e5}, model__norm_eps=1e-6)
    with pytest.raises(ConfigError, match=r"another shape than `model`: norm_eps: 1e-05 there, 1e-06 here$"):
        recipes.prepare(value)


@pytest.mark.parametrize(
    ("name", "overrides", "world_size", "gib", "full"),
    [
        ("pretrain/internlm-7b-1gpu", [], 1, 79, None),
        ("pretrain/internlm-7b-1gpu", ["parallel.offload=false"], 1, 79, "cuda"),
        ("pretrain/internlm-7b-1gpu", [], 1, 13, "cuda"),  # the gathered weights alone are 13.6
        ("pretrain/internlm-7b-1gpu", ['parallel.zero="3"'], 1, 13, None),
        ("pretrain/internlm-7b-1gpu", ["model.num_layers=64"], 1, 79, "cpu"),
        ("pretrain/internlm-20b-8gpus", [], 8, 64, None),
        ("pretrain/internlm-20b-8gpus", ['parallel.zero="2"'], 8, 64, "cuda"),
        ("pretrain/internlm-20b-8gpus", ["parallel.tensor=4", "parallel.shard=2", 'parallel.zero="2"'], 8, 64, None),
        ("pretrain/internlm-20b-1024gpus", [], 1024, 64, None),
        ("pretrain/internlm-20b-1024gpus", ["parallel.optimizer=shard"], 1024, 64, "cuda"),
        ("sft/internlm-7b-1gpu", [], 1, 94, "cuda"),
        ("sft/internlm-7b-1gpu", ["optim.state_dtype=bfloat16"], 1, 94, None),
        ("sft/internlm-7b-1gpu", ["optim.kind=muon"], 1, 94, None),
    ],
)
def test_a_model_that_cannot_fit_is_refused_and_no_other(
    name: str, overrides: list[str], world_size: int, gib: int, full: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"cuda": gib * GIB, "cpu": 128 * GIB}
    monkeypatch.setattr(runtime, "peak_memory_bytes", lambda device: (0, there[device.type]))
    recipe = recipes.load(ROOT / f"{name}.yaml", overrides).value
    assert recipe.model is not None
    layout = Layout.of(recipe.parallel, world_size)
    setting = recipes.setting_of(recipe, recipe.model, layout, torch.device("cuda"))
    if full is None:
        start.check_memory(recipe.model, recipe.parallel, layout, recipe.optim, setting)
        return
    with pytest.raises(ConfigError, match=rf"takes more than \d+ GiB and {full} has {there[full] // GIB} GiB"):
        start.check_memory(recipe.model, recipe.parallel, layout, recipe.optim, setting)


def write(path: Path, recipe: Recipe, **changes: Any) -> Path:
    """Write a recipe as YAML, with other values of its sections."""
    tree = config.encode(recipe)
    for section, values in changes.items():
        tree[section] = values
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_dry_run_says_why_the_run_would_not_start_here(recipe: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", recipe())
    assert "would not start" not in recipes.describe(recipes.load(path))
    for override, why in (
        ("data.train.a.path=nowhere", "nowhere: no such folder"),
        ("train.batch_tokens=250", "train.batch_tokens: is not a multiple of data.seq_len"),
        ("model.vocab_size=100", "model.vocab_size: the data's tokenizer has 280 ids"),
        ("parallel.shard=8", "parallel"),
    ):
        told = recipes.describe(recipes.load(path, [override]))
        assert "\nwould not start here: " in told
        assert why in told.rpartition("would not start here: ")[2]


def test_a_dry_run_says_what_a_real_one_would_of_memory_and_of_a_run_that_was_begun(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = recipe(train__tokens=256)
    recipes.prepare(value).fit()
    path = write(tmp_path / "r.yaml", value)
    assert "would not start" not in recipes.describe(recipes.load(path))
    for override, why in (
        ("model.num_layers=3", "holds a run of another model (num_layers: 2 there, 3 here)"),
        ("optim.kind=muon", "optim.kind: the run was begun with adamw"),
        ("checkpoint.resume=false", "holds a run and checkpoint.resume is false"),
    ):
        assert why in recipes.describe(recipes.load(path, [override])).rpartition("would not start here: ")[2]
    monkeypatch.setattr(start.runtime, "peak_memory_bytes", lambda device: (0, 1000))
    assert "takes more than" in recipes.describe(recipes.load(path)).rpartition("would not start here: ")[2]


def test_weights_that_are_gone_are_not_needed_for_a_dry_run_of_what_was_begun(recipe: Make, tmp_path: Path) -> None:
    recipes.prepare(recipe(run=str(tmp_path / "first"), train__tokens=256)).fit()
    value = recipe(init_from=str(tmp_path / "first"), model=None, train__tokens=256)
    recipes.prepare(value).fit()
    shutil.rmtree(tmp_path / "first")
    assert "would not start" not in recipes.describe(recipes.load(write(tmp_path / "r.yaml", value)))


def test_what_nothing_is_done_for_is_refused(recipe: Make) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.every_steps: there is nothing to validate"):
        recipe(evaluate={"every_steps": 1}, data__validation={})
    with pytest.raises(ConfigError, match=r"train\.batch_tokens: one step is more than the whole budget"):
        recipe(train__tokens=128, train__batch_tokens=256)


@pytest.mark.parametrize(
    ("key", "advice"), [("train.max_steps", "train.tokens"), ("optim.learning_rate", "optim.lr"), ("lora", "adapters")]
)
def test_keys_of_other_programs_are_told_where_to_look(recipe: Make, tmp_path: Path, key: str, advice: str) -> None:
    path = write(tmp_path / "r.yaml", recipe())
    with pytest.raises(ConfigError, match=f"unknown key '{key.rpartition('.')[2]}'.*{advice}"):
        recipes.load(path, [f"{key}=1"])


def test_a_source_of_the_base_recipe_can_be_taken_back(recipe: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", recipe())
    names = list(recipes.load(path).value.data.train)
    assert len(names) > 1
    left = recipes.load(path, [f"data.train.{names[0]}=null"]).value.data.train
    assert list(left) == names[1:]


def test_a_part_of_a_model_is_filled_with_the_shape_of_its_start(recipe: Make, tmp_path: Path) -> None:
    first = recipes.prepare(recipe(run=str(tmp_path / "first"), train__tokens=256))
    first.fit()
    value = recipe(run=str(tmp_path / "second"), init_from=str(tmp_path / "first"))
    path = write(tmp_path / "r.yaml", value, model={"context_length": 999})
    loaded = recipes.load(path)
    assert loaded.value.model == replace(first.parallel.shape, context_length=999)
    assert re.search(r"hidden_size .*weights of ", config.explain(loaded))


def test_a_run_that_goes_on_with_other_values_says_which(
    recipe: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    recipes.prepare(recipe(train__tokens=256, optim__lr=0.01)).fit()
    with caplog.at_level(logging.INFO, logger="internlm"):
        hooks = {"webhooks": [{"url": "http://127.0.0.1/secret"}]}
        recipes.prepare(recipe(train__tokens=256, optim__lr=0.005, alerts=hooks))
    assert "changed since that checkpoint: optim.lr 0.01 → 0.005; alerts.webhooks" in caplog.messages, "no address"
    assert recipes.load(run / "recipe.yaml").value.optim.lr == 0.01, "no step was taken with the new one"
    recipes.prepare(recipe(train__tokens=512, optim__lr=0.005))
    assert recipes.load(run / "recipe.yaml").value.optim.lr == 0.005


def test_a_run_does_not_go_on_with_another_optimizer(recipe: Make) -> None:
    recipes.prepare(recipe(train__tokens=256)).fit()
    with pytest.raises(ConfigError, match=r"optim\.kind: the run was begun with adamw \(got 'muon'\).*init_from"):
        recipes.prepare(recipe(train__tokens=512, optim={"kind": "muon"}))


def test_words_and_numbers_are_those_of_yaml_1_2(recipe: Make, tmp_path: Path) -> None:
    """`off` is the name of a policy, here and on the command line, and `1:30.5` is no number in base 60."""
    path = write(tmp_path / "r.yaml", recipe())
    text = path.read_text()
    path.write_text(text.replace("policy: warn", "policy: off"))
    assert "policy: off" in path.read_text()
    assert recipes.load(path).value.spikes.policy == "off"
    path.write_text(text)
    assert recipes.load(path, ["spikes.policy=off", "run=yes", "optim.lr=.5e-2"]).value.spikes.policy == "off"
    assert recipes.load(path, ["run=yes"]).value.run == "yes"
    assert recipes.load(path, ["optim.lr=.5e-2"]).value.optim.lr == 0.005
    for wrong in ("optim.lr=1:30.5", "optim={lr: 1e-3, lr: 1e-4}", "watch.heartbeat_s=.inf", "alerts.timeout_s=.nan"):
        with pytest.raises(ConfigError):
            recipes.load(path, [wrong])


def test_a_preset_takes_the_place_of_a_shape_that_was_written_below_it(recipe: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", recipe())
    for words in (["model.preset=internlm-7b"], ["model.num_layers=3", "model.preset=internlm-7b"]):
        loaded = recipes.load(path, words)
        assert loaded.value.model is not None
        assert (loaded.value.model.hidden_size, loaded.value.model.num_layers) == (4096, 32 if len(words) == 1 else 3)
        assert loaded.origins["model.hidden_size"] == "preset internlm-7b"
    (tmp_path / "own.yaml").write_text("base: r.yaml\nmodel: {preset: internlm-7b}\n")
    (tmp_path / "more.yaml").write_text("base: own.yaml\nmodel: {num_layers: 5}\n")
    shape = recipes.load(tmp_path / "more.yaml").value.model
    assert shape is not None
    assert (shape.hidden_size, shape.num_layers) == (4096, 5)


def test_another_scaling_takes_the_place_of_a_presets(recipe: Make, tmp_path: Path) -> None:
    words = ["model.preset=internlm3-8b", "model.rope.scaling.kind=linear", "model.rope.scaling.factor=2.5"]
    shape = recipes.load(write(tmp_path / "r.yaml", recipe()), words).value.model
    assert shape is not None
    assert (shape.rope.base, shape.rope.scaling) == (5e7, LinearScaling(factor=2.5))


def test_a_kind_that_is_no_variant_keeps_what_stands_beside_it(recipe: Make, tmp_path: Path) -> None:
    """A schedule has one set of fields, whatever its course; an optimizer's are its own."""
    path = write(tmp_path / "r.yaml", recipe(), schedule={"kind": "cosine", "warmup_ratio": 0.07})
    value = recipes.load(path, ["schedule.kind=linear", "optim.kind=muon"]).value
    assert (value.schedule.kind, value.schedule.warmup_ratio) == ("linear", 0.07)
    assert value.optim.lr == MuonConfig().lr
