"""Our adapters against PEFT's: logits, gradients and optimizer steps in fp32, in both directions."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from internlm import storage
from internlm.errors import WeightsError
from internlm.model.lora import LoraConfig, apply_lora, initialize_lora, lora_parameters, merge_lora
from internlm.model.transformer import Transformer
from internlm.weights import adapters
from internlm.weights import transformers as folders
from internlm.weights.adapters import Adapter
from internlm.weights.load import read_model
from tests.models import roughen

reference = pytest.importorskip("transformers")
peft: Any = None
"""Imported with the first test: it takes seconds, which only who runs one should pay."""
reference.utils.logging.set_verbosity_error()
reference.utils.logging.disable_progress_bar()

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(3))
PATTERNS = {
    "rank_pattern": {"^model.layers.1.self_attn.q_proj": 7, "mlp.up_proj": 2},
    "alpha_pattern": {"q_proj": 3, "layers.2.mlp.up_proj": 20, "up_proj": 5},  # the first counts
}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "v_proj"]},
    "every layer": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "dora": {"target_modules": ALL, "use_dora": True},
    "dora, rslora": {"target_modules": ["k_proj", "down_proj"], "use_dora": True, "use_rslora": True},
    "patterns": {"target_modules": ALL, **PATTERNS},
    "patterns, dora": {"target_modules": ["q_proj", "up_proj", "o_proj"], "use_dora": True, **PATTERNS},
    "a regular expression": {"target_modules": r".*layers\.(0|2)\.self_attn\.[kv]_proj"},
    "some layers": {"target_modules": ["gate_proj", "self_attn.o_proj"], "layers_to_transform": [0, 2]},
    "all but": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.mlp.up_proj"]},
}


@pytest.fixture(scope="module", autouse=True)
def _with_peft() -> None:
    global peft
    peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random Llama whose logits are far from flat."""
    config = reference.LlamaConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=80, attention_bias=True, max_position_embeddings=64,
    )  # fmt: skip
    model = reference.LlamaForCausalLM(config)
    roughen(model, 0.2)
    folder = tmp_path_factory.mktemp("base") / "llama"
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return reference.AutoModelForCausalLM.from_pretrained(folder).eval()


@functools.cache
def loaded_once(base: Path) -> tuple[Any, Tensor]:
    model = load(base)
    with torch.no_grad():
        return model, model(IDS).logits


def copy_of(base: Path) -> Any:
    """Return Transformers' model of the base, as if it had been loaded now."""
    return copy.deepcopy(loaded_once(base)[0])


def randomize(named: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(named.items()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + 0.3 * noise) if "magnitude" in name else 0.1 * noise)


def make(base: Path, folder: Path, **options: Any) -> Any:
    """Return a PEFT model with a random adapter, and save the adapter."""
    chosen = {"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy_of(base), peft.LoraConfig(**chosen)).eval()
        randomize({name: p for name, p in model.named_parameters() if "lora_" in name})
        model.save_pretrained(folder)
    return model


# Their options come together in other cases, and alone where adapters are trained and written here.
OF_PROOF = ("rslora", "dora", "patterns")


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.proof] * (n in OF_PROOF)) for n in CASES])
def saved(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return the folder of an adapter that PEFT saved, and its model."""
    folder = tmp_path_factory.mktemp("saved") / "theirs"
    return folder, make(base, folder, **CASES[request.param])


def opened(base: Path, folder: Path) -> tuple[Transformer, Adapter]:
    """Return our model with the adapter beside its weights, and the adapter."""
    model = folders.load(base)
    adapter = adapters.open_adapter(folder, model.config)
    adapters.attach(model, adapter)
    return model, adapter


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model.head.logits(model(IDS))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


def assert_same_logits(ours: Tensor, theirs: Any, base: Path) -> None:
    with torch.no_grad():
        expected, plain = theirs(IDS).logits, loaded_once(base)[1]
    assert (expected - plain).abs().max() > 0.5, "an adapter that changes nothing would prove nothing"
    assert_close(ours, expected)


def in_theirs(name: str) -> str:
    """Return the name of an adapter's parameter inside a PEFT model."""
    factor = adapters._theirs(name)
    if factor.endswith("magnitude_vector"):
        return f"{factor}.default.weight"
    return factor.replace(".weight", ".default.weight")


def test_what_peft_saves_has_the_same_logits_here(saved: tuple[Path, Any], base: Path) -> None:
    folder, theirs = saved
    model, adapter = opened(base, folder)
    assert_same_logits(logits(model), theirs, base)
    merge_lora(model)
    assert_same_logits(logits(model), theirs, base)
    merged = adapters.merge(folders.open_weights(base), adapter)
    again = read_model(model.config, merged)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters())


def test_gradients_are_those_of_peft(saved: tuple[Path, Any], base: Path) -> None:
    folder, theirs = saved
    model, _ = opened(base, folder)
    theirs.zero_grad()
    F.cross_entropy(theirs(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    model.head(model(IDS[:, :-1]), IDS[:, 1:]).logp.mean().neg().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    found = {in_theirs(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert gradient.abs().max() > 1e-4
        assert_close(gradient, expected[name])


@pytest.mark.parametrize("case", ["rslora", "dora"])
def test_five_steps_of_adamw_are_those_of_peft(case: str, base: Path, tmp_path: Path) -> None:
    theirs = make(base, tmp_path / "theirs", **CASES[case]).train()
    model, _ = opened(base, tmp_path / "theirs")
    parameters = lora_parameters(model)
    steps: dict[str, tuple[Any, Callable[[], Tensor]]] = {
        "theirs": (
            [p for p in theirs.parameters() if p.requires_grad],
            lambda: F.cross_entropy(theirs(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()),
        ),
        "ours": (parameters.values(), lambda: model.head(model(IDS[:, :-1]), IDS[:, 1:]).logp.mean().neg()),
    }
    losses: dict[str, list[float]] = {"theirs": [], "ours": []}
    for who, (trained, loss_of) in steps.items():
        optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-4)
        for _ in range(5):
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            losses[who].append(loss.item())
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-5)
    assert losses["ours"][-1] < losses["ours"][0] - 0.5
    for name, parameter in parameters.items():
        # A step of Adam is a quotient of gradients: what rounding leaves in them grows from step to step.
        assert_close(parameter, theirs.get_parameter(in_theirs(name)), 5e-5)


OURS = {
    "lora": LoraConfig(rank=4, alpha=6.0, targets=("blocks.*.attention.w[qv]",)),
    "rslora": LoraConfig(rank=4, alpha=2.5, rank_stabilized=True),
    "dora": LoraConfig(rank=4, alpha=6.0, dora=True, targets=("w_up", "blocks.1.attention.wo")),
    "patterns": LoraConfig(
        rank=4,
        alpha=6.0,
        ranks={"blocks.1.attention.wq": 7, "w_down": 2},
        alphas={"blocks.[12].*": 9.0, "wk": 1.0},
        dora=True,
        rank_stabilized=True,
    ),
}


@pytest.mark.parametrize("kind", OURS)
def test_peft_loads_what_we_write_and_transformers_what_we_merge(kind: str, base: Path, tmp_path: Path) -> None:
    model = folders.load(base)
    apply_lora(model, OURS[kind])
    initialize_lora(model, 5)
    randomize(dict(lora_parameters(model)))
    written = adapters.of_model(model, OURS[kind], str(base))
    adapters.export(written, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing and of unexpected weights
        theirs = peft.PeftModel.from_pretrained(copy_of(base), tmp_path / "ours").eval()
    assert_same_logits(logits(model), theirs, base)
    assert peft.PeftConfig.from_pretrained(tmp_path / "ours").base_model_name_or_path == str(base)
    again = adapters.open_adapter(tmp_path / "ours", model.config)
    folders.export(adapters.merge(folders.open_weights(base), again), model.config, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    with torch.no_grad():
        assert_close(merged(IDS).logits, logits(model))


def test_merged_weights_are_those_of_peft(saved: tuple[Path, Any], base: Path, tmp_path: Path) -> None:
    config = folders.read_config(base)
    merged = adapters.merge(folders.open_weights(base), adapters.open_adapter(saved[0], config))
    folders.export(merged, config, tmp_path / "merged")
    found = load(tmp_path / "merged").state_dict()
    theirs = peft.PeftModel.from_pretrained(copy_of(base), saved[0])
    for name, expected in theirs.merge_and_unload().state_dict().items():
        assert_close(found[name], expected, 1e-6)


def test_written_again_an_adapter_has_the_same_bits(saved: tuple[Path, Any], base: Path, tmp_path: Path) -> None:
    config = folders.read_config(base)
    for source, target in ((saved[0], tmp_path / "a"), (tmp_path / "a", tmp_path / "b")):
        adapters.export(adapters.open_adapter(source, config), target)
    first, second = (
        {f.name: f.read_bytes() for f in (tmp_path / n).iterdir() if f.name != storage.MANIFEST} for n in "ab"
    )
    assert first == second
    theirs, ours = (peft.utils.load_peft_weights(str(folder), device="cpu") for folder in (saved[0], tmp_path / "a"))
    assert set(theirs) == set(ours)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    fields, expected = (json.loads((folder / adapters.FILE).read_text()) for folder in (tmp_path / "a", saved[0]))
    same = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "base_model_name_or_path", "peft_type", "bias")
    assert {name: fields[name] for name in same} == {name: expected[name] for name in same}


def test_modules_that_were_kept_whole_are_merged(base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "post_attention_layernorm"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy_of(base), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)).eval()
        randomize({name: p for name, p in theirs.named_parameters() if p.requires_grad})
        theirs.save_pretrained(tmp_path / "theirs")
    config = folders.read_config(base)
    adapter = adapters.open_adapter(tmp_path / "theirs", config)
    assert set(adapter.saved) == {"head.weight", *(f"blocks.{i}.feed_forward_norm.weight" for i in range(3))}
    merged = adapters.merge(folders.open_weights(base), adapter)
    assert_same_logits(logits(read_model(config, merged)), theirs, base)
    with pytest.raises(WeightsError, match=r"take the place of the base's.*head\.weight.*Merge it"):
        adapters.attach(folders.load(base), adapter)
    adapters.export(adapter, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy_of(base), tmp_path / "ours").eval()
    assert_same_logits(logits(read_model(config, merged)), again, base)


def test_dropout_is_not_in_the_way(base: Path, tmp_path: Path) -> None:
    make(base, tmp_path / "theirs", target_modules=["q_proj"], lora_dropout=0.25)
    model, adapter = opened(base, tmp_path / "theirs")
    assert adapter.config.dropout == 0.25
    assert model.blocks["0"].get_submodule("attention.wq").dropout == 0.25  # type: ignore[union-attr]


def test_torch_files_are_read_too(base: Path, tmp_path: Path) -> None:
    theirs = make(base, tmp_path / "theirs", target_modules=["q_proj"])
    named = peft.utils.load_peft_weights(str(tmp_path / "theirs"), device="cpu")
    torch.save(named, tmp_path / "theirs" / "adapter_model.bin")
    (tmp_path / "theirs" / "adapter_model.safetensors").unlink()
    model, _ = opened(base, tmp_path / "theirs")
    assert_same_logits(logits(model), theirs, base)


def test_other_kinds_of_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    config = folders.read_config(base)
    for number, chosen in enumerate(
        (
            peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
            peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
            peft.LoHaConfig(target_modules=["k_proj"], task_type="CAUSAL_LM"),
        )
    ):
        folder = tmp_path / str(number)
        peft.get_peft_model(copy_of(base), chosen).save_pretrained(folder)
        with pytest.raises(WeightsError, match=f"adapters of this kind cannot be read .got '{chosen.peft_type.value}'"):
            adapters.open_adapter(folder, config)
