"""Every family against a reference: in, trained, out, and twice round."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm import storage
from internlm.infer.engine import Engine
from internlm.model.config import DynamicScaling, ModelConfig
from internlm.model.transformer import Transformer
from internlm.source import open_source
from internlm.weights import transformers as folders
from internlm.weights.families import translate as families
from internlm.weights.families.table import FAMILIES, fitting
from internlm.weights.transformers import ExportOptions
from internlm.weights.weight import of_tensors
from tests.parity import references
from tests.parity.references import CASES, Case

reference = pytest.importorskip("transformers")
reference.utils.logging.set_verbosity_error()
reference.utils.logging.disable_progress_bar()

LENGTHS = (7, 32, 33, 60, 96)
"""Ascending: Transformers keeps the base of the longest text it has seen."""


def random_ids(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(references.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))


def assert_same_logits(ours: Transformer, theirs: Any, lengths: tuple[int, ...] = LENGTHS) -> None:
    for length in lengths:
        ids = random_ids(length)
        with torch.no_grad():
            expected, found = theirs(ids).logits, ours.head.logits(ours(ids))
        assert expected.std() > 0.5, "flat logits would prove nothing"
        assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def export(model: Transformer, folder: Path, family: str | None) -> Path:
    weights = of_tensors(model.named_parameters())
    folders.export(weights, model.config, folder, options=ExportOptions(family=family))
    return folder


def train(model: Transformer, steps: int = 2) -> None:
    """Take steps that move every weight, norms and biases too."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        ids = random_ids(48 + step, rows=8)
        loss = -model.head(model(ids[:, :-1]), ids[:, 1:]).logp.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


# What they have others of their family have too, or the other families; `test_llama_parity` has the plain Llama.
OF_PROOF = (
    "llama", "mistral, a window as long as the context", "qwen2, tied", "qwen3_moe", "internlm, plain", "internlm2",
)  # fmt: skip


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.proof] * (n in OF_PROOF)) for n in CASES])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Any, Path]:
    """Return a case, its reference model, and the folder that this one was saved to."""
    torch.manual_seed(0)
    case = CASES[request.param]
    theirs = references.make(case)
    return case, theirs, references.save(theirs, case, tmp_path_factory.mktemp("saved") / "theirs")


def test_a_family_comes_in_is_trained_and_goes_out_with_the_same_logits(
    saved: tuple[Case, Any, Path], tmp_path: Path
) -> None:
    case, theirs, folder = saved
    ours = folders.load(folder)
    assert_same_logits(ours, theirs)
    train(ours)
    out = export(ours, tmp_path / "out", case.family)
    again = references.load(out, case)
    if not references.is_internlm(case):
        assert type(again).__name__ == FAMILIES[case.family].architecture
    assert_same_logits(ours, again)


def test_in_and_out_twice_gives_the_same_bytes(saved: tuple[Case, Any, Path], tmp_path: Path) -> None:
    case, _, folder = saved
    source = folder
    written = []
    for target in ("first", "second"):
        config = folders.read_config(source)
        options = ExportOptions(family=case.family, max_shard_bytes=60_000)
        folders.export(folders.open_weights(source), config, tmp_path / target, options=options)
        source = tmp_path / target
        written.append({p.name: p.read_bytes() for p in source.iterdir() if p.name != storage.MANIFEST})
    assert len(written[0]) > 3
    assert written[0] == written[1]
    assert folders.read_config(tmp_path / "second") == folders.read_config(folder)


def test_every_family_has_a_case() -> None:
    assert {case.family for case in CASES.values()} == FAMILIES.keys()


def test_what_is_written_by_default_is_loaded_without_the_familys_code(
    saved: tuple[Case, Any, Path], tmp_path: Path
) -> None:
    """A folder of InternLM becomes a Llama, one of Qwen3 stays one."""
    ours = folders.load(saved[2])
    if ours.config.experts is not None and ours.config.qkv_bias and not ours.config.qk_norm:
        pytest.skip("no family has experts and biases alone")
    theirs = reference.AutoModelForCausalLM.from_pretrained(export(ours, tmp_path / "out", None))
    assert theirs.config.model_type == fitting(ours.config)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3, biases", "qwen3_moe", "mistral", "mixtral, fused"])
def test_greedy_answers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    theirs = references.make(case)
    engine = Engine.of(open_source(references.save(theirs, case, tmp_path / "theirs")))
    prompts = [random_ids(length)[0].tolist() for length in (3, 17, 40)]
    for prompt, answer in zip(prompts, engine.generate(prompts, max_tokens=24, temperature=0), strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
        )
        assert answer.tokens == expected[0, len(prompt) :].tolist()


def test_the_norms_of_heads_have_the_gradients_of_qwen3(tmp_path: Path) -> None:
    case = CASES["qwen3"]
    theirs = references.make(case)
    ours = folders.load(references.save(theirs, case, tmp_path / "theirs"))
    ids = random_ids(40)
    ours.head.logits(ours(ids)).square().mean().backward()
    theirs(ids).logits.square().mean().backward()
    for norm in ("q_norm", "k_norm"):
        found = ours.get_parameter(f"blocks.1.attention.{norm}.weight").grad
        expected = theirs.get_parameter(f"model.layers.1.self_attn.{norm}.weight").grad
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "context"),
    [
        (Case("mistral", {"sliding_window": 32}), 32),
        (Case("mixtral", references.MOE | {"sliding_window": 32}), 32),
        (Case("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}), 32),
        (Case("qwen3", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0, "head_dim": 12}), 32),
        (Case("qwen3_moe", references.QWEN_MOE | {"sliding_window": 32, "use_sliding_window": True}), 32),
        (Case("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}), 96),
        (Case("qwen2", {"sliding_window": 32, "use_sliding_window": False, "max_window_layers": 0}), 96),
    ],
    ids=str,
)
def test_the_context_is_cut_to_a_sliding_window(
    case: Case, context: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = references.make(case)
    logging.getLogger("internlm").propagate = True
    with caplog.at_level("WARNING"):
        ours = folders.load(references.save(theirs, case, tmp_path / "theirs"))
    assert ("has a window of 32 tokens" in caplog.text) == (context == 32)
    assert ours.config.context_length == context
    assert_same_logits(ours, theirs, tuple(length for length in LENGTHS if length <= context))
    if context == 32:
        ids = random_ids(60)
        with torch.no_grad():
            difference = (theirs(ids).logits - ours.head.logits(ours(ids))).abs().max()
        assert difference > 1e-2, "beyond the window they differ, or the cut was for nothing"


def test_dynamic_scaling_of_internlm_is_measured_from_its_trained_length(tmp_path: Path) -> None:
    case = CASES["internlm"]
    config = folders.read_config(references.save(references.make(case), case, tmp_path / "theirs"))
    assert config.rope.scaling == DynamicScaling(factor=2.0, original_length=32)


def test_a_family_that_is_named_is_written(tmp_path: Path) -> None:
    """A plain Llama-like model goes out as every family that can hold it, and comes back with the same logits."""
    ours = folders.load(references.save(references.make(CASES["llama"]), CASES["llama"], tmp_path / "theirs"))
    ids = random_ids(60)
    for family in ("llama", "mistral", "qwen2", "internlm", "internlm2", "internlm3"):
        back = folders.load(export(ours, tmp_path / family, family))
        described, _ = families.write(of_tensors(ours.named_parameters()), ours.config, family)
        assert described["model_type"] == family
        assert isinstance(back.config, ModelConfig)
        with torch.no_grad():
            torch.testing.assert_close(back.head.logits(back(ids)), ours.head.logits(ours(ids)), rtol=0, atol=1e-6)
