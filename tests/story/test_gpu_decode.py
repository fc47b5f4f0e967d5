"""The benchmark of decoding on a GPU at a tiny shape on the CPU: the lines that run on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.processes import forked

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_decode.py"


def test_the_benchmark_runs_tiny_and_writes_all_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    words = "--tiny --device cpu --repeats 1 --only internlm --cache int8 --out"
    done = forked(str(SCRIPT), *words.split(), str(out))
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(out.read_text())
    assert {"command", "date", "machine", "versions", "commit", "device"} <= set(report)
    assert report["versions"]["torch"] == report["rows"][0]["versions"]["torch"] == torch.__version__
    assert [row["batch"] for row in report["rows"]] == [1, 3]
    for row in report["rows"]:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_s"])
        # 2 layers of 4 · 64² + 3 · 64 · 128, norms, head; in a text 20 tokens of 2 · 2 · 4 heads, 16 bytes and a scale.
        weights = 4 * (2 * (4 * 64**2 + 3 * 64 * 128 + 2 * 64) + 64 + 512 * 64)
        assert row["step_bytes"] == weights + row["batch"] * (4 * 64 + 20 * 16 * (16 + 4))


def test_without_a_gpu_the_benchmark_of_decoding_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = forked(str(SCRIPT), "--out", str(tmp_path / "decode.json"))
    assert done.returncode == 1
    assert "no GPU" in done.stderr
    assert not (tmp_path / "decode.json").exists()
