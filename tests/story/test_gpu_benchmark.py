"""The GPU benchmark at toy shape on the CPU: the lines that run on a GPU, and what they must notice."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.processes import forked

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return forked(str(ROOT / "benchmarks" / "gpu_train.py"), *arguments)


def test_the_benchmark_runs_at_toy_shape_and_writes_all_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = (
        "--device cpu --preset toy --seq 64 --rows 2 --recompute none --documents 2 --layers 1 --skip-parity "
        "--steps 10 --warmup 1 --only ours+bf16states --out"
    )
    done = run(*words.split(), str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {"command", "date", "machine", "versions", "commit", "device", "groups"} <= set(report)
    (group,) = report["groups"]
    assert group["layers"] == 1
    assert group["peak_tflops"]["measured"] > 0
    (row,) = group["rows"]
    assert row["tokens_per_s"] == pytest.approx(128 / (row["step_ms"] / 1e3))
    assert row["of_measured_ceiling"] > 0
    assert "states bfloat16" in row["policy"]
    check(row)


def test_the_peer_trains_the_same_model_and_is_measured_by_the_same_lines() -> None:
    pytest.importorskip("transformers")
    from gpu_cases import Case
    from gpu_work import run_case

    case = Case("transformers", "toy", 1, 64, 2, 2, 2, dtype="float32", device="cpu", warmup=1, steps=10)
    check(run_case(case))


def check(row: dict[str, Any]) -> None:
    """Assert what holds of every contender."""
    assert row["same_model"]
    assert len(row["step_s"]) == 10
    assert row["wall_s"] == pytest.approx(sum(row["step_s"]), rel=0.05)
    assert all(4 < loss < 7 for loss in row["losses"])  # random ids: about ln 256
    times = row["breakdown"]["ms"]
    assert min(times[name] for name in ("matmul", "attention", "optimizer")) > 0
    assert row["breakdown"]["step_ms"] == pytest.approx(sum(times.values()), rel=0.1)


def test_without_a_gpu_it_says_so_and_fails(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 1
    assert "no GPU here" in done.stderr
    assert not (tmp_path / "gpu.json").exists()


def test_parity_notices_attention_that_crosses_documents_and_paths_that_are_missing() -> None:
    import gpu_parity
    from gpu_parity import Variant
    from gpu_train import is_equal

    wanted = [Variant("blocks", "float32"), Variant("dense", "float32"), Variant("varlen", "float32")]
    right, crossing, missing = gpu_parity.compare("cpu", wanted)
    assert right["passed"]
    assert not crossing["passed"]
    assert crossing["gradient_error"] > 100 * crossing["gradient_limit"]
    assert not missing["passed"]
    assert missing["error"]
    assert is_equal({"rows": [right]}, "cpu")
    assert not is_equal({"rows": [right, crossing]}, "cpu")
    assert not is_equal({"error": "no answer"}, "cpu")


def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


def test_kernels_are_sorted_into_families_and_gaps() -> None:
    from gpu_trace import OPTIMIZER, STEP, breakdown

    found = breakdown(
        [
            event("user_annotation", STEP, 0, 1000),
            event("gpu_user_annotation", STEP, 20, 900),
            event("user_annotation", OPTIMIZER, 600, 100),
            event("cuda_runtime", "cudaLaunchKernel", 10, 5, correlation=1),
            event("cuda_runtime", "cudaLaunchKernel", 20, 5, correlation=2),
            event("cuda_driver", "cuLaunchKernelEx", 650, 5, correlation=3),
            event("kernel", "nvjet_tst_256x128_64x4_bz_NNT", 100, 300, correlation=1),
            event("kernel", "pytorch_flash::flash_fwd_kernel<...>", 350, 250, correlation=2),
            event("kernel", "vectorized_elementwise_kernel<4, lerp>", 700, 100, correlation=3),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 850, 50),
            event("kernel", "before the first step", -500, 100),
        ]
    )
    assert found["of"] == "kernels"
    ms = found["ms"]
    assert ms == {"matmul": 0.3, "attention": 0.25, "optimizer": 0.1, "copies and casts": 0.05, "idle": 0.35}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<...>>", "matmul"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("fmha_cutlassB_bf16_aligned_128x64_k128_sm80", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::elementwise_kernel<128, 2, direct_copy_kernel_cuda>", "copies and casts"),
        ("triton_poi_fused_mul_silu_3", "norms and elementwise"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_1", "norms and elementwise"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("gloo:all_reduce", "communication"),
        ("aten::_foreach_addcdiv_", "optimizer"),
        ("_ZN17something_unknown", "other"),
    ],
)
def test_kernel_names_are_known(name: str, expected: str) -> None:
    from gpu_trace import family

    assert family(name) == expected


def test_the_deepest_model_that_fits_is_found() -> None:
    from gpu_cases import Case
    from gpu_memory import depth

    case = Case("ours", "internlm-7b", 0, 2048, 1)
    calls = []

    def needed(at: Case) -> float:
        calls.append(at.layers)
        return max(20 + 1.5 * at.layers, 8 + 2.5 * at.layers)

    for available in (22.0, 38.0, 39.4, 60.0, 87.9, 500.0):
        calls.clear()
        expected = max(layers for layers in range(1, 33) if needed(case.at(layers)) <= available)
        calls.clear()
        assert depth(case, available, 32, needed)[0] == expected
        assert len(calls) <= 8
    assert depth(case, 21.0, 32, needed)[0] == 0


def test_ours_out_of_memory_starts_the_group_again_with_fewer_blocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import argparse

    import gpu_train
    from gpu_cases import Case

    tried = []

    def run_worker(job: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
        if job["task"] == "ceilings":
            return {"best": {"float32": 1.0}}
        tried.append((job["case"]["name"], job["case"]["layers"]))
        if job["case"]["layers"] == 2 or job["case"]["name"] != "ours":
            return {"error": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"}
        breakdown = {"step_ms": 1000.0, "ms": {"matmul": 700.0, "idle": 300.0}}
        found = {"step_s": [1.0] * 10, "peak_gib": 1.0, "same_model": True, "breakdown": breakdown}
        return found | {"losses": [5.0] * 10}

    monkeypatch.setattr(gpu_train, "run_worker", run_worker)
    monkeypatch.setattr(gpu_train, "plan", lambda group, available: (2, {}))
    facts: dict[str, Any] = {"device": {"name": "NVIDIA H100 80GB HBM3"}, "groups": []}
    first = Case("ours", "toy", 0, 64, 2, dtype="float32", device="cpu")
    group = [first, Case("transformers", "toy", 0, 64, 2, dtype="float32", device="cpu")]
    gpu_train.measure(group, 80.0, argparse.Namespace(out=tmp_path / "gpu.json"), facts)
    assert tried == [("ours", 2), ("ours", 1), ("transformers", 1)]
    ours, peer = facts["groups"][0]["rows"]
    assert facts["groups"][0]["layers"] == 1
    assert ours["gap_ms"] == pytest.approx(300)
    assert ours["mfu"] == pytest.approx(first.at(1).flops / 67e12)
    assert "out of memory" in peer["error"]


def test_memory_is_counted_from_shapes_and_states_take_what_they_should() -> None:
    from gpu_cases import Case
    from gpu_memory import RESERVE_GIB, needed_gib

    def held(name: str) -> float:
        return needed_gib(Case(name, "toy-8m", 2, 64, 1, dtype="float32")) - RESERVE_GIB

    parameters = Case("ours", "toy-8m", 2, 64, 1).shape.num_parameters / 2**30
    # Weights, gradients and states, and the activations of 64 tokens.
    assert 16 * parameters < held("ours") < 24 * parameters
    assert held("ours") - held("ours+bf16states") == pytest.approx(4 * parameters)
