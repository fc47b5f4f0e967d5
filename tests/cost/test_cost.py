"""The FLOP formula against published figures and against what torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from internlm.config import decode
from internlm.cost.flops import causal_pairs, forward_flops, recomputed_flops, training_flops
from internlm.cost.hardware import peak_flops
from internlm.model.config import ModelConfig
from internlm.model.presets import preset
from internlm.model.transformer import Transformer


def test_internlm_7b_costs_what_its_authors_published_less_the_half_that_causality_saves() -> None:
    """InternLM v0.2 publishes 44.41 GFLOP per token at 2,048 tokens, with full attention."""
    config = decode(ModelConfig, preset("internlm-7b"))
    full = training_flops(config, 1, 2048) / 1e9
    assert full == pytest.approx(44.41, rel=0.01)
    causal = training_flops(config, 1, causal_pairs(2048) / 2048) / 1e9
    assert full - causal == pytest.approx(12 * 32 * 4096 * 2047 / 2 / 1e9, rel=1e-6)


def test_the_formula_counts_what_torch_counts() -> None:
    config = ModelConfig(vocab_size=64, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=48)
    with torch.device("meta"):
        model = Transformer(config)
        tokens = torch.zeros(2, 16, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.head.logits(model(tokens))
    assert counter.get_total_flops() == forward_flops(config, 32, 2 * 16 * 16)  # torch counts attention as full


def test_what_recomputation_costs_is_the_forward_of_the_blocks_alone() -> None:
    config = ModelConfig(vocab_size=64, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=48)
    head = 2 * 64 * 32 * 10
    assert recomputed_flops(config, 10, 30, 1.0) == forward_flops(config, 10, 30) - head
    assert recomputed_flops(config, 10, 30, 1 / 3) == pytest.approx((forward_flops(config, 10, 30) - head) / 3)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("NVIDIA H100 NVL", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("Some CPU", "float32", None),
    ],
)
def test_peaks_are_found_by_the_drivers_name(name: str, dtype: str, peak: float | None) -> None:
    assert peak_flops(name, dtype) == peak
