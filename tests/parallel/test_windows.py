"""Windows in which a run on several ranks is looked at: each rank sees its own part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internlm import config
from internlm.recipe import Recipe
from tests.parallel.ranks import Ranks

Make = Callable[..., Recipe]
LAYERS = {"vocab_size": 280, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 64}
COUNT = 2 * 280 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
"""Parameters of it."""


def tables(run: Path) -> list[dict[str, Any]]:
    return [json.loads((run / "profile" / f"modules{rank}.json").read_text()) for rank in ("", "-rank-1")]


def rows_of(table: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in table["rows"]}


@pytest.mark.parametrize(
    "parallel",
    [
        {"shard": 2, "zero": "3"},
        {"pipeline": 2, "schedule": "zero-bubble"},
        pytest.param({"replicate": 2}, marks=pytest.mark.proof),
        pytest.param({"replicate": 2, "optimizer": "all"}, marks=pytest.mark.proof),
        pytest.param({"shard": 2, "recompute": {"kind": "full"}}, marks=pytest.mark.proof),
    ],
    ids=lambda parallel: " ".join(map(str, parallel.values())),
)
def test_tables_of_ranks_add_up_to_the_model(
    ranks: Ranks, recipe: Make, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    changes: dict[str, Any] = {
        "model": LAYERS,
        "train": {
            "tokens": 5 * 256,
            "batch_tokens": 256,
            "micro_batch_rows": 2 if parallel == {"replicate": 2} else 4,  # two micro-batches, or one; pipelines two
            "log_every_steps": 1,
            "trace_every_steps": 1,
        },
        "parallel": parallel,
        "track": {"tensorboard": False},
    }
    window = {"start": 2, "steps": 1, "ranks": [0, 1], "memory": True, "modules": True}
    runs = recipe(**changes, run=str(tmp_path / "plain")), recipe(**changes, profile=window)
    plain, lines = ranks.run(2, "each", *(("fit", config.encode(run)) for run in runs))[0]
    losses, plain_losses = ([line.get("train/step_loss") for line in each] for each in (lines, plain))
    assert losses == plain_losses
    assert [line["step"] for line in lines if "perf/comm_s" in line] == [1, 5]  # 2 to 4 are the window
    found = tables(tmp_path / "run")
    copies = parallel.get("replicate", 1)
    assert sum(table["sum"]["parameters"] for table in found) == 4 * COUNT * copies
    slices = 4 * COUNT if "optimizer" in parallel else 0  # of what each updates, in memory of their own
    assert sum(table["sum"]["gradients"] for table in found) == 4 * COUNT * (1 if slices else copies)
    states = sum(table["sum"]["optimizer"] for table in found) - slices
    assert 0 <= states - 8 * COUNT * (1 if slices else copies) < 1000  # AdamW counts its steps
    for table in found:
        rows, timed = rows_of(table), [row for row in table["rows"] if not row["name"].startswith("(")]
        assert rows["blocks.*.attention"]["modules"] == (1 if "pipeline" in parallel else 2)
        assert ("head" in rows) == ("pipeline" not in parallel or table["rank"] == 1)
        assert all(row["forward_s"] > 0 for row in timed if row["name"] != "model")
        assert rows["blocks.*.feed_forward"]["backward_s"] > 0
        assert sum(row["forward_s"] + row["backward_s"] for row in table["rows"]) == pytest.approx(table["step_s"])
    kept = [rows_of(table)["blocks.*.feed_forward"]["kept"] for table in found]
    assert all(size == 0 if "recompute" in parallel else size > 0 for size in kept)
    assert kept[0] == kept[1]
    names = {path.name for path in (tmp_path / "run" / "profile").iterdir()}
    assert names >= {
        f"step-00000002-rank-{rank}.{kind}" for rank in (0, 1) for kind in ("json.gz", "txt", "memory.txt")
    }


def test_only_the_ranks_asked_for_are_looked_at(ranks: Ranks, recipe: Make, tmp_path: Path) -> None:
    made = recipe(
        parallel={"tensor": 2},
        train={"tokens": 5 * 256, "batch_tokens": 256},
        profile={"start": 2, "steps": 1, "ranks": [1], "modules": True},
    )
    ranks.run(2, "fit", config.encode(made))
    assert sorted(path.name for path in (tmp_path / "run" / "profile").iterdir()) == [
        "modules-rank-1.json",
        "modules-rank-1.txt",
        "step-00000002-rank-1.json.gz",
        "step-00000002-rank-1.txt",
    ]
    table = json.loads((tmp_path / "run" / "profile" / "modules-rank-1.json").read_text())
    assert rows_of(table)["blocks.*.feed_forward"]["parameters"] == 2 * 4 * 3 * 32 * 64 // 2
    text = (tmp_path / "run" / "profile" / "step-00000002-rank-1.txt").read_text()
    assert "communication" in text
