"""Recipes: layers, strictness, origins, errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pytest

from internlm import config
from internlm.config import section
from internlm.errors import ConfigError
from internlm.optim.optimizer import AdamWConfig, MuonConfig


@section
class Slow:
    kind: Literal["slow"] = "slow"
    patience: int = 3


@section
class Fast:
    kind: Literal["fast"] = "fast"
    speed: float = 1.0


@section
class Inner:
    lr: float = 1e-3
    steps: int = 10


@section
class Source:
    path: str
    weight: float | None = None


@section
class Outer:
    inner: Inner = Inner()
    way: Annotated[Slow | Fast, pydantic.Field(discriminator="kind")] = Slow()
    sources: dict[str, Source] = dataclasses.field(default_factory=dict)
    name: str = "x"
    pair: tuple[float, float] = (0.0, 1.0)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_numbers_that_yaml_reads_as_strings_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", "inner: {lr: 1e-4}")
    assert config.load(Outer, path).value.inner.lr == 1e-4


def test_layers_override_in_order_and_remember_their_origin(tmp_path: Path) -> None:
    write(tmp_path, "common/base.yaml", "inner:\n  lr: 0.5\n  steps: 7\nname: base\n")
    path = write(tmp_path, "r.yaml", "base: common/base.yaml\ninner:\n  lr: 0.25\n")
    loaded = config.load(Outer, path, ["name=cli"])
    assert loaded.value == Outer(inner=Inner(lr=0.25, steps=7), name="cli")
    assert loaded.origins["inner.lr"] == f"{path}:3"
    assert loaded.origins["inner.steps"].endswith("base.yaml:3")
    assert loaded.origins["name"] == "command line"
    table = config.explain(loaded)
    assert f"{path}:3" in table
    row = next(line.split() for line in table.splitlines() if line.startswith("way.patience"))
    assert row[1:] == ["3", "default"]


def test_a_new_kind_drops_the_keys_of_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "way: {kind: slow, patience: 9}")
    path = write(tmp_path, "r.yaml", "base: base.yaml\nway: {kind: fast, speed: 2}")
    assert config.load(Outer, path).value.way == Fast(speed=2.0)
    assert config.load(Outer, path, ["way.kind=slow"]).value.way == Slow()


def test_overrides_mean_the_same_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", "way: {kind: slow, patience: 9}")
    for overrides in (["way.speed=4", "way.kind=fast"], ["way.kind=fast", "way.speed=4"]):
        assert config.load(Outer, path, overrides).value.way == Fast(speed=4.0)


@pytest.mark.parametrize("text", ["1.10", "1e3"])
def test_a_name_that_would_change_as_a_number_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"name \(.*r\.yaml:1\): should be text: put it in quotes"):
        config.load(Outer, write(tmp_path, "r.yaml", f"name: {text}"))
    assert config.load(Outer, write(tmp_path, "r.yaml", f"name: '{text}'")).value.name == text


@pytest.mark.parametrize("text", ["007", "12:30", "1_000", "2024-01-01", "2024-13-45", "20240101"])
def test_a_name_that_looks_like_a_number_or_a_date_stays_as_written(tmp_path: Path, text: str) -> None:
    assert config.load(Outer, write(tmp_path, "r.yaml", f"name: {text}")).value.name == text
    assert config.load(Outer, None, [f"name={text}"]).value.name == text


def test_an_unknown_key_is_an_error_with_a_suggestion(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", "inner:\n  stpes: 3\n")
    with pytest.raises(ConfigError, match=r"inner\.stpes \(.*r\.yaml:2\): unknown key 'stpes'\. Did you mean 'steps'"):
        config.load(Outer, path)


def test_unknown_keys_are_found_inside_variants_and_mappings() -> None:
    with pytest.raises(ConfigError, match=r"way\.spede.*Did you mean 'speed'"):
        config.load(Outer, None, ["way={kind: fast, spede: 3}"])
    with pytest.raises(ConfigError, match=r"sources\.a\.wieght.*Did you mean 'weight'"):
        config.load(Outer, None, ["sources.a={path: p, wieght: 3}"])


def test_all_mistakes_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(Outer, None, ["inner.steps=many", "nmae=1", "way.kind=odd"])
    text = str(caught.value)
    assert "3 mistakes" in text
    assert "inner.steps" in text
    assert "'many'" in text
    assert "Did you mean 'name'" in text
    assert "odd" in text


def test_a_wrong_type_names_place_and_value(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", "inner:\n  steps: [1]\n")
    with pytest.raises(ConfigError, match=r"inner\.steps \(.*r\.yaml:2\).*integer.*\[1\]"):
        config.load(Outer, path)


def test_true_is_not_a_number(tmp_path: Path) -> None:
    text = "inner:\n  steps: true\nsources:\n  a: {path: p, weight: false}\npair: [0.5, true]\n"
    with pytest.raises(ConfigError) as caught:
        config.load(Outer, write(tmp_path, "r.yaml", text))
    assert "inner.steps" in str(caught.value)
    assert "r.yaml:2" in str(caught.value)
    assert "sources.a.weight" in str(caught.value)
    assert "pair" in str(caught.value)
    assert "3 mistakes" in str(caught.value)


def test_a_mistake_in_a_variant_is_counted_once() -> None:
    @section
    class Run:
        optim: Annotated[AdamWConfig | MuonConfig, pydantic.Field(discriminator="kind")] = AdamWConfig()

    with pytest.raises(ConfigError, match="a mistake"):
        config.load(Run, None, ["optim={kind: muon, lr: true}"])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("inner: {lr: 1", "is not YAML"),
        ("- a\n- b", "a recipe is a mapping"),
        ("name: a\nname: b", r"r\.yaml:2: the key stands twice"),
        ("base: r.yaml", "its own base"),
        ("base: gone.yaml", r"gone\.yaml: no such recipe"),
        ("base: 3", r"r\.yaml:1: is a path or a list of paths \(got 3\)"),
        ("base:", "is a path or a list of paths"),
        ("name: !odd x", "is not YAML"),
        ("inner: {steps: !!int many}", "is not YAML"),
        ("inner: &a {steps: *a}", "is not YAML"),
    ],
)
def test_a_damaged_file_is_explained(tmp_path: Path, text: str, match: str) -> None:
    path = write(tmp_path, "r.yaml", text)
    with pytest.raises(ConfigError, match=match):
        config.load(Outer, path)


def test_a_missing_file_and_a_bad_override_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        config.load(Outer, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="not an override"):
        config.load(Outer, None, ["inner.lr"])
    with pytest.raises(ConfigError, match="not YAML"):
        config.load(Outer, None, ["inner.steps=!!int many"])


def test_a_dump_loads_to_an_equal_recipe(tmp_path: Path) -> None:
    value = Outer(inner=Inner(lr=3e-5), way=Fast(speed=0.5), sources={"a": Source(path="p", weight=2.0)}, name="ü")
    for name in ("ü", "007", "1e9", "true", "2024-01-01"):
        value = dataclasses.replace(value, name=name)
        path = write(tmp_path, "dump.yaml", config.dump(value))
        assert config.load(Outer, path).value == value


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Outer().name = "y"  # type: ignore[misc]
