"""The table of modules: parameters, what is kept for backward, and times, which add up to the step."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from internlm import recipe as recipes
from internlm.recipe import Recipe
from internlm.train.metrics import read_metrics
from internlm.train.profile.modules import row_of

Make = Callable[..., Recipe]


def modules(run: Path) -> dict[str, Any]:
    return json.loads((run / "profile" / "modules.json").read_text())


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_table_adds_up(recipe: Make, tmp_path: Path, is_tied: bool) -> None:
    made = recipe(
        train__tokens=5 * 256,
        train__micro_batch_rows=2,
        model__tie_embeddings=is_tied,
        profile={"start": 3, "steps": 1, "modules": True},
    )
    trainer = recipes.prepare(made)
    trainer.fit()
    found = modules(tmp_path / "run")
    shape = trainer.parallel.shape
    tensors = len(list(trainer.parallel.named_parameters()))
    assert found["sum"]["parameters"] == found["sum"]["gradients"] == 4 * shape.num_parameters
    assert found["sum"]["optimizer"] == 8 * shape.num_parameters + 4 * tensors  # AdamW counts its steps
    rows = {row["name"]: row for row in found["rows"]}
    table_bytes = 4 * 280 * 32
    assert rows["embedding"]["parameters"] == table_bytes
    assert rows["head"]["parameters"] == (0 if is_tied else table_bytes)
    assert rows["blocks.*.feed_forward"]["parameters"] == 2 * 4 * 3 * 32 * 64
    assert (rows["blocks.*"]["modules"], rows["blocks.*.attention"]["modules"]) == (2, 2)
    assert found["micro_batches"] == 4
    times = [row[key] for row in found["rows"] for key in ("forward_s", "backward_s")]
    assert min(times) >= 0
    assert sum(times) == pytest.approx(found["step_s"])
    for name in ("embedding", "blocks.*.attention", "blocks.*.feed_forward", "norm", "head"):
        assert rows[name]["forward_s"] > 0, name
        assert rows[name]["backward_s"] > 0, name
    assert rows["(data)"]["forward_s"] > 0
    assert rows["(update)"]["forward_s"] > 0
    measured = next(line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["step"] == 5)
    assert 0.5 * measured["perf/step_s"] < found["step_s"] < measured["perf/step_s"]


class Ledger(TorchDispatchMode):
    """Bytes of the storages that operators made and that are alive, parameters' left out."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.parameters = {p.untyped_storage()._cdata for p in parameters}
        self.held: dict[int, int] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.held and key not in self.parameters:
                    self.held[key] = storage.nbytes()
                    weakref.finalize(storage, self.held.pop, key, None)
        return out


def kept_by_blocks(found: dict[str, Any]) -> int:
    return sum(row["kept"] for row in found["rows"] if row["name"].startswith("blocks"))


def test_what_is_kept_is_what_is_alive_when_backward_begins_and_recomputation_keeps_less(
    recipe: Make, tmp_path: Path
) -> None:
    size = {"vocab_size": 280, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "ffn_size": 256}
    kept = {}
    for kind in ("none", "full", "operators"):
        change: dict[str, Any] = {"model": size, "parallel__recompute": {"kind": kind}}
        run = tmp_path / kind
        window = {"start": 1, "steps": 1, "modules": True}
        recipes.prepare(recipe(**change, run=str(run), train__tokens=3 * 256, profile=window)).fit()
        found = modules(run)
        trainer = recipes.prepare(recipe(**change, run=str(tmp_path / f"{kind}, again")))
        alive = []
        score = trainer.stepper._loss

        def loss(*arguments: Any, score: Any = score, alive: list[int] = alive) -> torch.Tensor:
            value = score(*arguments)
            alive.append(sum(ledger.held.values()))
            return value

        trainer.stepper._loss = loss  # type: ignore[method-assign]
        with Ledger(trainer.stepper.parameters) as ledger:
            trainer.stepper.step()
        # Besides what backward needs there are the hidden states, and the batch: a few numbers per token.
        assert 0 <= alive[0] - found["sum"]["kept"] - 256 * 64 * 4 < 256 * 64, kind
        kept[kind] = kept_by_blocks(found)
        rows = {row["name"]: row for row in found["rows"]}
        assert rows["blocks.*.feed_forward"]["backward_s"] > 0, kind
    assert kept["full"] < kept["operators"] < kept["none"]
    assert kept["full"] < 0.2 * kept["none"]


@pytest.mark.parametrize(
    ("path", "depth", "row"),
    [
        ("", 1, "model"),
        ("blocks", 1, "model"),
        ("embedding", 0, "embedding"),
        ("blocks.11", 1, "blocks.*"),
        ("blocks.11.attention.wq", 0, "blocks.*"),
        ("blocks.11.attention.wq", 1, "blocks.*.attention"),
        ("blocks.11.attention.wq", 2, "blocks.*.attention.wq"),
    ],
)
def test_blocks_share_rows(path: str, depth: int, row: str) -> None:
    assert row_of(path, depth) == row
