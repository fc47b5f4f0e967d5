"""Where a model answers, and in which form."""

from __future__ import annotations

import argparse

import pytest
import torch

from internlm.cli import add_placement
from internlm.errors import UsageError
from internlm.infer.placement import Placement


def placed(words: str, **options: bool) -> Placement:
    parser = argparse.ArgumentParser()
    add_placement(parser.add_argument)
    arguments = parser.parse_args(words.split())
    return Placement.here(arguments.device, arguments.pack, **options)


@pytest.mark.parametrize(("words", "pack"), [("", "fp32"), ("--pack fp16", "fp16"), ("--pack none", None)])
def test_a_cpu_gets_exact_packed_products_unless_told_otherwise(words: str, pack: str | None) -> None:
    assert placed(f"--device cpu {words}") == Placement("cpu", torch.float32, pack)  # type: ignore[arg-type]


def test_one_text_at_a_time_gets_products_for_one_row() -> None:
    assert [placed(words, alone=True).pack for words in ("", "--pack fp16", "--pack none")] == ["split", "fp16", None]


def test_a_gpu_is_taken_where_there_is_one_and_nothing_is_packed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for words in ("", "--device auto", "--device cuda", "--pack none"):
        assert placed(words).pack is None
        assert placed(words).dtype is torch.bfloat16
        assert placed(words).device == "cuda"
    with pytest.raises(UsageError, match="packed products are for CPUs"):
        placed("--pack fp16")


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda", 0, "--device: no CUDA device here (got 'cuda'). Leave it out, or give cpu."),
        ("cuda:0", 0, "--device: no CUDA device here (got 'cuda:0'). Leave it out, or give cpu."),
        ("tpu", 0, "--device: no such device here (got 'tpu'); allowed: auto, cpu. Did you mean 'cpu'?"),
        (
            "cuda:2",
            2,
            "--device: no such device here (got 'cuda:2'); allowed: auto, cpu, cuda, cuda:0, cuda:1. "
            "Did you mean 'cuda:1'?",
        ),
    ],
)
def test_a_device_that_is_not_here_is_refused_and_none_that_is_not_here_is_offered(
    device: str, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UsageError) as refused:
        placed(f"--device {device}")
    assert str(refused.value) == message
