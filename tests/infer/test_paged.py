"""Paged attention: the plain reference against SDPA, the Triton kernel against the reference."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from internlm.infer import paged
from tests.infer.paged_cases import CASES, Case, slots_of
from tests.processes import CONTEXT, forked

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.rounded])
def test_the_reference_is_sdpa_over_each_text(name: str) -> None:
    case = CASES[name]
    q, stored, tables, lengths, block = case.make()
    got = paged.attend(q, stored, tables, lengths, block)
    assert (got.shape, got.dtype) == (q.shape, q.dtype)
    for row, length in enumerate(case.lengths):
        if not length:
            assert not got[row].any()
            continue
        slots = slots_of(tables[row], length, block)
        keys, values = (x[None, :, slots].float() for x in stored[:2])
        wanted = F.scaled_dot_product_attention(q[row, None, :, None].float(), keys, values, enable_gqa=True)
        assert (got[row].float() - wanted[0, :, 0]).abs().max() < (2e-6 if case.dtype == torch.float32 else 1e-2)


def test_what_stands_behind_the_last_block_makes_no_difference() -> None:
    q, stored, tables, lengths, block = CASES["groups"].make()
    wanted = paged.attend(q, stored, tables, lengths, block)
    for row, length in enumerate(lengths.tolist()):
        tables[row, -(-length // block) :] = 0
    assert torch.equal(paged.attend(q, stored, tables, lengths, block), wanted)


def test_numbers_in_8_bits_are_off_by_half_a_step_at_most() -> None:
    x = torch.randn(3, 5, 16) * torch.tensor([1e-4, 1.0, 300.0])[:, None, None]
    x[0, 0] = 0
    rounded, scales = paged.round_rows(x)
    assert (rounded.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float32, (3, 5))
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((rounded * scales[..., None] - x).abs() <= 0.5001 * step + 1e-12).all()


def test_attention_over_keys_and_values_in_8_bits_is_close() -> None:
    exact, rounded = Case(8, 2, 64, (5, 130)), CASES["8 bits"]
    wanted, got = paged.attend(*exact.make()), paged.attend(*rounded.make())
    assert 0 < (got - wanted).abs().max() < 0.03


def ask(*words: str, hook: Callable[[], None] | None = None, **variables: str) -> Any:
    """Return what the script of the cases prints."""
    done = forked(str(Path(__file__).with_name("paged_cases.py")), *words, hook=hook, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def interpret() -> None:
    """In a process that has imported torch, and Triton with it: what Triton compiles itself it interprets from now."""
    for name in ("triton.language.standard", "triton.language"):
        if name in sys.modules:
            importlib.reload(sys.modules[name])


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    """The kernel's errors in Triton's interpreter."""
    return ask(hook=interpret, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_interpreted_is_the_reference(name: str, interpreted: dict[str, float]) -> None:
    assert interpreted[name] < CASES[name].tolerance


@needs_triton
def test_the_kernel_compiles_for_gpus_and_reads_16_bytes_at_a_time(tmp_path: Path) -> None:
    for ptx in ask("compile", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0"):
        assert "mma.sync" in ptx
        assert "cp.async.cg.shared.global" in ptx  # asynchronous copies that pass by the small cache: 16 bytes each


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_on_a_gpu_is_the_reference(name: str) -> None:
    assert CASES[name].error("cuda") < max(CASES[name].tolerance, 1e-5)


def test_a_gpu_without_the_kernel_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    paged.works_on.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not any(paged.works_on(torch.device("cuda")) for _ in range(2))
    assert sum("no paged attention" in record.message for record in caplog.records) == 1
    assert not paged.works_on(torch.device("cpu"))
    assert len(caplog.records) == 1


def test_few_texts_are_cut_into_parts_and_many_are_not() -> None:
    cpu = torch.device("cpu")
    assert paged._splits(1 * 8, 4096, cpu) == 32  # no part under two tiles
    assert paged._splits(1 * 32, 4096, cpu) == 9
    assert paged._splits(256 * 32, 4096, cpu) == 1
    assert paged._splits(1, 100, cpu) == 1


def import_without_kernels() -> None:
    """In a process that has imported what engines need."""
    importlib.import_module("internlm.infer.engine")
    assert "internlm.infer.kernels" not in sys.modules


def test_importing_the_engine_does_not_import_triton() -> None:
    process = CONTEXT.Process(target=import_without_kernels)
    process.start()
    process.join(60)
    assert process.exitcode == 0
