"""Compiled blocks: they take the steps of plain ones, and the table of modules looks at them from outside."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from internlm import recipe as recipes
from internlm.errors import ConfigError
from internlm.recipe import Recipe

Make = Callable[..., Recipe]


def test_compiling_without_a_compiler_is_refused(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(ConfigError, match=r"runtime\.compile: needs a C\+\+ compiler"):
        recipes.prepare(recipe(runtime__compile=True))


def test_compiled_blocks_take_the_same_steps(recipe: Make) -> None:
    plain = recipes.prepare(recipe(run=str(Path(recipe().run).with_name("plain")), model__num_layers=1))
    compiled = recipes.prepare(recipe(runtime__compile=True, model__num_layers=1))
    for trainer in (plain, compiled):
        for _ in range(3):
            trainer.stepper.step()
    for name, value in plain.model.named_parameters():
        torch.testing.assert_close(value, compiled.model.get_parameter(name), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(recipes.runtime.cpp_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.proof)])
def test_compiled_blocks_are_looked_at_from_outside(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(plain, backend=backend))
    made = recipe(
        train__tokens=4 * 256,
        model__num_layers=1,
        evaluate={"every_steps": None},
        runtime__compile=True,
        profile={"start": 2, "steps": 1, "modules": True},
    )
    trainer = recipes.prepare(made)
    trainer.evaluator.evaluate = lambda *a, **k: {}  # type: ignore[method-assign]  # would compile again
    trainer.fit()
    rows = {row["name"]: row for row in json.loads((tmp_path / "run" / "profile" / "modules.json").read_text())["rows"]}
    assert rows["blocks.*"]["forward_s"] > 0
    assert rows["blocks.*"]["backward_s"] > 0
    assert rows["blocks.*"]["kept"] > 8 * 32 * 32 * 4
    assert rows["blocks.*"]["parameters"] == 4 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32)
    assert "blocks.*.attention" not in rows
    assert "compiled" in (tmp_path / "run" / "profile" / "step-00000002-rank-0.txt").read_text()
