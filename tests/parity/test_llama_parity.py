"""Our decoder against Transformers' Llama: logits in fp32 and greedy answers, in both directions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm.errors import WeightsError
from internlm.infer.engine import Engine
from internlm.model.config import (
    DynamicScaling,
    ExpertsConfig,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
    YarnScaling,
)
from internlm.model.transformer import Transformer
from internlm.source import open_source
from internlm.weights import transformers as folders
from internlm.weights.weight import of_tensors
from tests.models import random_model

reference = pytest.importorskip("transformers")
reference.utils.logging.set_verbosity_error()
reference.utils.logging.disable_progress_bar()

BASE = {"vocab_size": 97, "hidden_size": 48, "num_layers": 3, "num_heads": 4, "ffn_size": 80, "context_length": 96}


def rope(scaling: Any = None, base: float = 500.0) -> dict[str, Any]:
    return {"rope": RopeConfig(base=base, scaling=scaling)}


CONFIGS = {
    "plain": {},
    "biases": {"qkv_bias": True, "output_bias": True},
    "biases on q, k, v only": {"qkv_bias": True},
    "bias on the output only": {"output_bias": True},
    "grouped heads": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1, "qkv_bias": True, "output_bias": True},
    "tied": {"tie_embeddings": True},
    "wide heads": {"head_dim": 20, "num_kv_heads": 2},
    "large eps": {"norm_eps": 1e-2},
    "linear": rope(LinearScaling(factor=3.0)),
    "dynamic": rope(DynamicScaling(factor=1.0, original_length=32)),
    "dynamic, stretched": rope(DynamicScaling(factor=2.5, original_length=32)),
    "yarn": rope(YarnScaling(factor=3.0, original_length=32)),
    "yarn, all options": rope(
        YarnScaling(factor=4.0, original_length=24, beta_fast=8.0, beta_slow=2.0, attention_factor=0.9)
    ),
    "llama3": rope(Llama3Scaling(factor=8.0, original_length=32, low_frequency_factor=1.0, high_frequency_factor=4.0)),
}
LENGTHS = (7, 32, 33, 60, 96)
"""Ascending: Transformers keeps the base of the longest text it has seen."""


def logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.head.logits(model(ids))


def random_ids(length: int) -> torch.Tensor:
    return torch.randint(97, (2, length), generator=torch.Generator().manual_seed(length))


def exported(model: Transformer, folder: Path) -> Any:
    folders.export(of_tensors(model.named_parameters()), model.config, folder)
    return reference.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()


def assert_same_logits(ours: Transformer, theirs: Any, tolerance: float = 1e-5) -> None:
    for length in LENGTHS:
        ids = random_ids(length)
        with torch.no_grad():
            expected = theirs(ids).logits
        assert expected.std() > 0.5, "flat logits would prove nothing"
        assert (logits(ours, ids) - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_has_our_logits_in_transformers(name: str, tmp_path: Path) -> None:
    model = random_model(ModelConfig(**BASE | CONFIGS[name]))
    theirs = exported(model, tmp_path / "out")
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert_same_logits(model, theirs)


YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 48}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EDITS: dict[str, dict[str, Any]] = {
    "rope_scaling beside the plain parameters": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}
    },
    "yarn, mscale of 1": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn, mscale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4}},
    "yarn, mscale of 0": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0}},
    "yarn, mscale and a factor": {
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4, "attention_factor": 1.2}
    },
    "yarn, a length outside": {"rope_parameters": YARN, "original_max_position_embeddings": 12},
    "llama3, a length outside": {"rope_parameters": LLAMA3, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_scaling_that_is_written_into_an_export_means_what_it_means_in_transformers(
    edit: dict[str, Any], tmp_path: Path
) -> None:
    model = random_model(ModelConfig(**BASE | rope()))
    exported(model, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    ours = folders.load(tmp_path / "out")
    assert_same_logits(ours, reference.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    ids = random_ids(96)
    assert (logits(ours, ids) - logits(model, ids)).abs().max() > 0.1, "a scaling that is not seen proves nothing"


def of_proof(names: Iterable[str], *left: str) -> list[Any]:
    """Return names of which those that are left to the long proofs differ from the others in no kind."""
    return [pytest.param(name, marks=[pytest.mark.proof] * (name in left)) for name in names]


LOADED_ALIKE = (
    "plain",
    "biases on q, k, v only",
    "bias on the output only",
    "one key head",
    "wide heads",
    "dynamic",
    "yarn",
)


@pytest.mark.parametrize("name", of_proof(CONFIGS, *LOADED_ALIKE))
def test_what_transformers_saves_has_the_same_logits_here(name: str, tmp_path: Path) -> None:
    theirs = exported(random_model(ModelConfig(**BASE | CONFIGS[name])), tmp_path / "out")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.1)  # other weights than those we exported
    theirs.save_pretrained(tmp_path / "theirs")
    # Such weights make more of rounding: up to 1.2e-5 with AVX-512.
    assert_same_logits(folders.load(tmp_path / "theirs"), theirs, tolerance=3e-5)


MIXED = ModelConfig(**BASE | {"num_kv_heads": 2, "experts": ExpertsConfig(count=4, per_token=2)})


def test_experts_have_the_same_logits_gradients_and_answers_in_mixtral(tmp_path: Path) -> None:
    model = random_model(MIXED)
    theirs = exported(model, tmp_path / "out")
    assert type(theirs).__name__ == "MixtralForCausalLM"
    assert_same_logits(model, theirs)
    ids = random_ids(40)
    model.head.logits(model(ids)).square().mean().backward()
    theirs(ids).logits.square().mean().backward()
    router, its = model.blocks["1"].get_submodule("feed_forward.router"), theirs.model.layers[1].mlp.gate
    torch.testing.assert_close(router.weight.grad, its.weight.grad, rtol=1e-3, atol=1e-5)
    prompt = random_ids(17)[0].tolist()
    (answer,) = Engine.of(open_source(tmp_path / "out")).generate([prompt], max_tokens=24, temperature=0)
    expected = theirs.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 17), max_new_tokens=24, do_sample=False
    )
    assert answer.tokens == expected[0, 17:].tolist()


def test_what_mixtral_saves_has_the_same_logits_here(tmp_path: Path) -> None:
    theirs = exported(random_model(MIXED), tmp_path / "out")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.1)
    theirs.save_pretrained(tmp_path / "theirs")
    assert folders.read_config(tmp_path / "theirs") == MIXED
    assert_same_logits(folders.load(tmp_path / "theirs"), theirs)


@pytest.mark.parametrize("change", [{"qkv_bias": True}, {"experts": ExpertsConfig(count=4, normalize=False)}])
def test_experts_that_mixtral_has_not_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(replace(MIXED, **change))
    with pytest.raises(WeightsError, match="the family mixtral"):
        folders.export(of_tensors(model.named_parameters()), model.config, tmp_path / "out")


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_relatives_of_llama_are_read(family: str, tmp_path: Path) -> None:
    shape = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
        "max_position_embeddings": 96,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    extra: dict[str, Any] = {"sliding_window": None} if family == "mistral" else {"tie_word_embeddings": False}
    theirs = reference.AutoModelForCausalLM.from_config(reference.AutoConfig.for_model(family, **shape, **extra)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape) + ("norm" in name))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_logits(folders.load(tmp_path / "theirs"), theirs)


WRITTEN_ALIKE = ("plain", *LOADED_ALIKE[1:3], "biases", "one key head", "large eps", "linear", "yarn, all options")


@pytest.mark.parametrize("name", of_proof((name for name in CONFIGS if "dynamic" not in name), *WRITTEN_ALIKE))
def test_greedy_answers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = random_model(ModelConfig(**BASE | CONFIGS[name]))
    theirs = exported(model, tmp_path / "out")
    engine = Engine.of(open_source(tmp_path / "out"))
    prompts = [random_ids(length)[0].tolist() for length in (3, 17, 40)]
    answers = engine.generate(prompts, max_tokens=24, temperature=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24, do_sample=False
        )
        assert answer.tokens == expected[0, len(prompt) :].tolist()


def test_greedy_answers_with_dynamic_scaling_are_those_of_a_full_recompute_at_the_final_length() -> None:
    """Transformers changes the base while it writes and keeps old keys; ours is fixed when the request comes in."""
    scaling = DynamicScaling(factor=1.0, original_length=32)
    model = random_model(ModelConfig(**BASE | rope(scaling)))
    prompt, new = random_ids(30)[0].tolist(), 24
    (answer,) = Engine(model).generate([prompt], max_tokens=new, temperature=0)
    ids = list(prompt)
    for _ in range(new):
        # Later tokens cannot be seen, so padding to the final length only fixes the base.
        padded = torch.tensor([ids + [0] * (len(prompt) + new - len(ids))])
        ids.append(int(logits(model, padded)[0, len(ids) - 1].argmax()))
    assert answer.tokens == ids[len(prompt) :]
    (short,) = Engine(model).generate([prompt], max_tokens=2, temperature=0)
    first = torch.tensor([prompt])
    assert short.tokens[0] == int(logits(model, first)[0, -1].argmax())
