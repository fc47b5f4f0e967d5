"""From a training checkpoint to a Transformers folder without the model, and without all of its weights at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from internlm.checkpoint import store
from internlm.model.config import ModelConfig
from internlm.text.training import train_bpe
from internlm.weights.weight import tensors
from tests.parallel.ranks import Ranks
from tests.processes import forked

SHAPE = {"vocab_size": 300, "hidden_size": 384, "num_layers": 10, "num_heads": 6, "ffn_size": 1536}
MEASURE = """
import re, sys
from pathlib import Path
from internlm import cli
import internlm.cli.convert, torch, internlm.source, internlm.weights.transformers, safetensors.torch
def most():  # ru_maxrss would be that of the process that started this one
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
# Code of libraries counts when it first runs: a tensor that is read and written is not what is measured.
first = next(iter(internlm.source.open_source(sys.argv[1]).tensors()))[1]
safetensors.torch.save_file({"first": first[:9].clone()}, sys.argv[2] + "-first")
del first
before = most()
code = cli.main(["convert", *sys.argv[1:]])
print("took", most() - before)
sys.exit(code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_pieces_of_two_ranks_become_a_folder_in_little_memory(tmp_path: Path) -> None:
    """24 M parameters, 95 MB in fp32 and thrice that with the states, by way of a few tensors at a time."""
    train_bpe(["What is the sum of the numbers?"] * 3, 300).save(tmp_path / "tokenizer")
    pool = Ranks()
    try:
        pool.run(2, "save_parts", SHAPE, str(tmp_path / "run" / "checkpoints" / "step-00000007"), str(tmp_path))
    finally:
        pool.close()
    (tmp_path / "measure.py").write_text(MEASURE)
    words = [str(tmp_path / "measure.py"), str(tmp_path / "run"), str(tmp_path / "out"), "--max-shard", "30MB"]
    done = forked(*words)
    assert done.returncode == 0, done.stderr
    took = int(done.stdout.rpartition("took ")[2])
    checkpoint = store.open_checkpoint(tmp_path / "run")
    whole = 4 * ModelConfig(**SHAPE).num_parameters  # type: ignore[arg-type]
    assert whole > 90e6
    assert all(len(entry.pieces) == 2 for name, entry in checkpoint.index.items() if "w_up" in name)
    assert took < 0.5 * whole, f"{took / 2**20:.0f} MiB for {whole / 2**20:.0f} MiB of weights"
    written = {n: t for f in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(f).items()}
    known = dict(tensors(checkpoint.weights()))
    assert torch.equal(written["model.layers.9.mlp.up_proj.weight"], known["blocks.9.feed_forward.w_up.weight"])
    assert sum(t.numel() for t in written.values()) == ModelConfig(**SHAPE).num_parameters  # type: ignore[arg-type]
