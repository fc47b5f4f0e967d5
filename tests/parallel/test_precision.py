"""Low precision and long rows over ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internlm import storage
from internlm.data import shards
from internlm.recipe import Recipe
from internlm.text.tokenizer import Tokenizer
from tests.parallel.ranks import Ranks
from tests.parallel.test_layouts import assert_equal, tree

Make = Callable[..., Recipe]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_over_ranks_follows_full_precision(dtype: str, ranks: Ranks, recipe: Make) -> None:
    """Weights are gathered in the low precision, and kept and reduced in fp32."""
    full = ranks.run(1, "train", tree(recipe, layers=2, run=str(recipe().run) + "-full"), 2)[0]
    low = {"device": "cpu", "dtype": dtype}
    calls = [
        ("train", tree(recipe, layers=2, run=f"{recipe().run}-{axis}", parallel={axis: 2}, runtime=low), 2)
        for axis in ("shard", "replicate")
    ]
    for found in ranks.run(2, "each", *calls)[0]:
        assert found["loss"] == pytest.approx(full["loss"], rel=5e-3)
        assert found["loss"] != full["loss"]
        assert found["norm"] == pytest.approx(full["norm"], rel=5e-2)
        assert all(weight.dtype == np.float32 for weight in found["weights"].values())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("heads", [4, 3])
def test_rows_of_32768_tokens_over_four_context_ranks_are_those_of_one(
    heads: int, ranks: Ranks, recipe: Make, corpus: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With 4 heads ranks trade tokens for heads, with 3 they gather keys and values."""
    proof = request.config.getoption("--proof")
    length = 32768 if proof else 256
    tokenizer = Tokenizer.load(corpus / "a" / "tokenizer")
    with storage.writing(tmp_path / "long", shards.KIND) as out:
        writer = shards.ShardWriter(out.path, "00000", tokenizer.vocab_size)
        generator = np.random.default_rng(0)
        for part in (0.6, 0.1, 0.3, 1.0):
            writer.add(generator.integers(280, size=int(part * length)).tolist(), None, 1)
        (out.path / "tokenizer").mkdir()
        tokenizer.save(out.path / "tokenizer")
        facts = {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint, "template": None}
        out.meta.update(shards.meta([writer.close()], bos_id=None, eos_id=None, **facts))
    shape = {
        "vocab_size": 280, "hidden_size": 24, "num_layers": 1, "num_heads": heads, "head_dim": 8, "ffn_size": 16,
        "context_length": length,
    }  # fmt: skip
    changes: dict[str, Any] = {
        "model": shape,
        "data": {"seq_len": length, "train": {"long": {"path": str(tmp_path / "long")}}},
        "train": {"tokens": 4 * length, "batch_tokens": length},
    }

    def made(name: str, parallel: dict[str, Any]) -> dict[str, Any]:
        return tree(recipe, 1, 1, run=f"{recipe().run}-{name}", parallel=parallel, **changes)

    wanted = ranks.run(1, "train", made("alone", {}), 2, timeout_s=300)[0]
    wanted["valid"] = {}
    found = ranks.run(4, "train", made("context", {"context": 4}), 2, timeout_s=500)
    assert_equal(found, wanted)
