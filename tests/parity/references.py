"""Reference models of every family for the parity tests: Transformers' own, or a Llama renamed as InternLM's are.

InternLM's code is not in Transformers. Its families compute what Llama computes, so a tiny Llama stands in for them,
whose weights are renamed and fused here, element by element, from how those formats are described.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models import roughen

reference = pytest.importorskip("transformers")

VOCABULARY, HIDDEN, HEADS, KV_HEADS, WIDTH, LAYERS = 97, 48, 4, 2, 12, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "intermediate_size": 80, "max_position_embeddings": 96, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-3,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
QWEN_MOE = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}}


@dataclass(frozen=True)
class Case:
    """A family, and how its tiny model differs from the plainest."""

    family: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of Transformers' config."""
    described: dict[str, Any] = field(default_factory=dict)
    """Of the config.json, where the family is InternLM's."""
    fused: bool = False
    """Whether experts are saved as Transformers 5 holds them."""
    bins: bool = False
    """Whether weights are saved as `pytorch_model.bin`."""


CASES = {
    "llama": Case("llama", THETA),
    "llama, biases": Case("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral": Case("mistral", {"sliding_window": None, "head_dim": 20}),
    "mistral, a window as long as the context": Case("mistral", {"sliding_window": 96}),
    "qwen2": Case("qwen2", THETA),
    "qwen2, tied": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen3": Case("qwen3", THETA | {"head_dim": 20}),
    "qwen3, biases": Case("qwen3", {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True}),
    "mixtral": Case("mixtral", MOE),
    "mixtral, fused": Case("mixtral", MOE, fused=True),
    "qwen3_moe": Case("qwen3_moe", QWEN_MOE | {"head_dim": 20}),
    "qwen3_moe, shares": Case("qwen3_moe", QWEN_MOE | {"norm_topk_prob": False, "attention_bias": True}),
    "qwen3_moe, fused": Case("qwen3_moe", QWEN_MOE, fused=True),
    "internlm": Case(
        "internlm",
        {"attention_bias": True, "num_key_value_heads": HEADS, "max_position_embeddings": 32} | DYNAMIC,
        {"bias": True, "rotary": {"base": 500.0, "type": "dynamic", "scaling_factor": 2.0}},
        bins=True,
    ),
    "internlm, plain": Case(
        "internlm",
        {"num_key_value_heads": HEADS} | THETA,
        {"bias": False, "rotary": {"base": 500.0, "type": "origin"}},
    ),
    "internlm, December": Case(
        "internlm",
        {"max_position_embeddings": 32} | DYNAMIC,
        {"bias": False, "rope_theta": 500.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    "internlm2": Case("internlm2", THETA, {"bias": False, "rope_theta": 500.0}),
    "internlm2, biases": Case(
        "internlm2",
        {"attention_bias": True, "max_position_embeddings": 32} | DYNAMIC,
        {"bias": True, "rope_theta": 500.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        bins=True,
    ),
    "internlm3": Case("internlm3", THETA | {"head_dim": 20}, {"qkv_bias": False, "rope_theta": 500.0, "head_dim": 20}),
    "internlm3, biases": Case(
        "internlm3",
        {"attention_bias": True, "max_position_embeddings": 32} | DYNAMIC,
        {"qkv_bias": True, "rope_theta": 500.0, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
}


def is_internlm(case: Case) -> bool:
    """Return whether Transformers lacks the family."""
    return case.family.startswith("internlm")


def make(case: Case) -> Any:
    """Return a reference model with logits and attention far from flat."""
    known = "llama" if is_internlm(case) else case.family
    described = reference.AutoConfig.for_model(known, **SIZES | case.options)
    model = reference.AutoModelForCausalLM.from_config(described).eval()
    roughen(model)
    if case.family == "internlm3":  # it has none
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.bias"):
                torch.nn.init.zeros_(parameter)
    return model


def save(model: Any, case: Case, folder: Path) -> Path:
    """Write a reference model as a folder of its family."""
    if not is_internlm(case):
        model.save_pretrained(folder, save_original_format=not case.fused)
        return folder
    folder.mkdir()
    fields = {key: SIZES[key] for key in SIZES} | {"num_key_value_heads": model.config.num_key_value_heads}
    fields |= {"max_position_embeddings": model.config.max_position_embeddings, "model_type": case.family}
    (folder / "config.json").write_text(json.dumps(fields | {"hidden_act": "silu"} | case.described))
    weights = {name: tensor.contiguous() for name, tensor in to_family(model, case.family).items()}
    if case.bins:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    return folder


def load(folder: Path, case: Case) -> Any:
    """Return the reference model of a folder that was written here, loaded strictly."""
    if not is_internlm(case):
        return reference.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    model = make(case)
    missing, unexpected = model.load_state_dict(
        from_family(load_file(folder / "model.safetensors"), case), strict=False
    )
    assert not unexpected
    assert [name for name in missing if not name.endswith("o_proj.bias")] == []
    return model


def to_family(model: Any, family: str) -> dict[str, Tensor]:
    """Return a Llama's weights as InternLM, InternLM2 or InternLM3 has them."""
    llama = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if family == "internlm":
        frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(LAYERS)}
        return llama | frequencies
    if family == "internlm3":
        return {name: tensor for name, tensor in llama.items() if not name.endswith("o_proj.bias")}
    theirs = {
        "model.tok_embeddings.weight": llama["model.embed_tokens.weight"],
        "model.norm.weight": llama["model.norm.weight"],
        "output.weight": llama["lm_head.weight"],
    }
    for i in range(LAYERS):
        here, there = f"model.layers.{i}.", f"model.layers.{i}."
        theirs[there + "attention_norm.weight"] = llama[here + "input_layernorm.weight"]
        theirs[there + "ffn_norm.weight"] = llama[here + "post_attention_layernorm.weight"]
        for w, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            theirs[f"{there}feed_forward.{w}.weight"] = llama[f"{here}mlp.{name}_proj.weight"]
        for kind in ("weight", "bias"):
            if f"{here}self_attn.q_proj.{kind}" in llama:
                q, k, v = (llama[f"{here}self_attn.{x}_proj.{kind}"] for x in "qkv")
                theirs[f"{there}attention.wqkv.{kind}"] = fuse(q, k, v)
                theirs[f"{there}attention.wo.{kind}"] = llama[f"{here}self_attn.o_proj.{kind}"]
    return theirs


def fuse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return q, k and v row by row: for each key head its queries, itself, its values."""
    rows: list[Tensor] = []
    shared = q.shape[0] // k.shape[0]
    for head in range(k.shape[0] // WIDTH):
        rows += q[head * shared * WIDTH : (head + 1) * shared * WIDTH]
        rows += k[head * WIDTH : (head + 1) * WIDTH]
        rows += v[head * WIDTH : (head + 1) * WIDTH]
    return torch.stack(rows)


def from_family(weights: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Return a family's weights as a Llama has them: what `to_family` undoes, found by trying it out."""
    if case.family != "internlm2":
        return weights
    # Every element of a Llama is numbered, and looked up where `to_family` puts it.
    model = make(case)
    sizes = [parameter.numel() for parameter in model.state_dict().values()]
    numbers = dict(zip(model.state_dict(), torch.arange(sum(sizes), dtype=torch.float64).split(sizes), strict=True))

    class Numbered:
        @staticmethod
        def state_dict() -> dict[str, Tensor]:
            return {name: numbers[name].view(tensor.shape) for name, tensor in model.state_dict().items()}

    places = to_family(Numbered, case.family)
    assert weights.keys() == places.keys()
    flat = torch.empty(sum(sizes))
    for name, place in places.items():
        flat[place.long().flatten()] = weights[name].flatten()
    return {name: flat[numbers[name].long()].view(t.shape) for name, t in model.state_dict().items()}
