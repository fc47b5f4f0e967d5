"""What the start of a run does not wait for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from internlm import config
from internlm.recipe import Recipe
from tests.processes import finish, start

PROGRAM = """
import sys
from internlm.cli import main
from internlm.train.step import Stepper

step = Stepper.step

def look(self):
    found = step(self)
    print("loaded:", *(name for name in ("torch._dynamo", "torch.distributed.tensor", "sympy") if name in sys.modules))
    return found

Stepper.step = look
sys.exit(main(["train", sys.argv[1]]))
"""


def test_a_run_on_one_device_loads_neither_a_compiler_nor_what_spreads_tensors_before_its_first_step(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """They take two seconds together."""
    path = tmp_path / "recipe.yaml"
    value = recipe(train__tokens=256, optim={"kind": "muon"}, track__tensorboard=False)
    path.write_text(yaml.safe_dump(config.encode(value)))
    code, output = finish(start(sys.executable, "-c", PROGRAM, str(path)))
    assert code == 0, output
    assert "loaded:\n" in output
