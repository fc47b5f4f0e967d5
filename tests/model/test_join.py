"""Joined layers, for GPUs: the same numbers from fewer products, and weights that stay where others can reach them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from internlm.infer.engine import Engine
from internlm.model.config import ExpertsConfig, ModelConfig
from internlm.model.lora import LoraConfig, apply_lora
from internlm.model.quant import PackedLinear, join, lay_together
from internlm.model.transformer import Transformer, build, empty, initialize
from internlm.weights.load import fill

PLAIN = ModelConfig(
    vocab_size=67, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=48, context_length=32
)
CONFIGS = {
    "plain": PLAIN,
    "biases": replace(PLAIN, qkv_bias=True, output_bias=True),
    "tied": replace(PLAIN, tie_embeddings=True),
    "experts": replace(PLAIN, experts=ExpertsConfig(count=2, per_token=1)),
}
TOKENS = torch.arange(20)[None] * 3


def logits(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.head.logits(model(TOKENS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_joined_model_says_the_same(name: str, dtype: torch.dtype) -> None:
    model = build(CONFIGS[name], 0, dtype=dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_()
    wanted, names = logits(model), [name for name, _ in model.named_parameters()]
    join(model)
    for block in model.blocks.values():
        assert isinstance(block.attention.wqkv, PackedLinear)
        assert (name == "experts") == (getattr(block.feed_forward, "w_gate_up", None) is None)
    assert (logits(model) - wanted).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)
    assert [name for name, _ in model.named_parameters()] == names


def test_joining_holds_nothing_twice_and_takes_new_values() -> None:
    model = build(PLAIN, 0)
    lay_together(model)
    memory = [block.attention.wq.weight.data_ptr() for block in model.blocks.values()]
    ours = empty(PLAIN)
    fill(ours, model.named_parameters())
    join(ours)
    for block, theirs, place in zip(ours.blocks.values(), model.blocks.values(), memory, strict=True):
        whole = block.attention.wqkv.weight
        assert whole.data_ptr() == place == theirs.attention.wq.weight.data_ptr()
        assert whole.shape[0] == PLAIN.hidden_size * 2
        assert block.feed_forward.w_gate_up.weight.data_ptr() == theirs.feed_forward.w_gate.weight.data_ptr()
    other = build(PLAIN, 1)
    fill(ours, other.named_parameters())
    assert torch.allclose(logits(ours), logits(other), atol=1e-5)
    assert torch.allclose(logits(model), logits(other), atol=1e-5)  # whose memory it is


def test_weights_that_lie_side_by_side_are_left_where_they_are() -> None:
    model = build(PLAIN, 0)
    lay_together(model)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    lay_together(model)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_layers_that_are_no_plain_ones_are_left() -> None:
    model = build(PLAIN, 0)
    apply_lora(model, LoraConfig(rank=2, targets=("wq",)))
    initialize(model, 0)
    wanted = logits(model)
    join(model)
    block = model.blocks["0"]
    assert block.attention.wqkv is None
    assert isinstance(block.feed_forward.w_gate_up, PackedLinear)
    assert torch.allclose(logits(model), wanted, atol=1e-5)


def test_a_model_that_trains_on_keeps_its_gradients_after_its_weights_moved() -> None:
    model, twin = build(PLAIN, 0), build(PLAIN, 0)
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    lay_together(model)
    for m, o in ((model, optimizer), (twin, other)):
        m.head(m(TOKENS), TOKENS).logp.sum().backward()
        o.step()
    assert torch.equal(logits(model), logits(twin))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_engine_on_a_gpu_joins_and_can_be_given_other_weights() -> None:
    model, other = build(PLAIN, 0).to("cuda"), build(PLAIN, 1)
    engine = Engine(model)
    assert isinstance(engine.model.blocks["0"].attention.wqkv, PackedLinear)
    text = [1, 5, 9, 13]
    assert torch.allclose(engine.score(text).cpu(), Engine(model.cpu()).score(text), atol=1e-3)
    engine.load((name, parameter.cuda()) for name, parameter in other.named_parameters())
    assert torch.allclose(engine.score(text).cpu(), Engine(other).score(text), atol=1e-3)
