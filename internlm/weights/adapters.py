"""Low-rank adapters as PEFT keeps them: read, written, and merged into the weights they belong to.

    adapter = open_adapter("my-lora", config)             # `config` is the base's; nothing is read yet
    transformers.export(merge(weights, adapter), config, out)      # one matrix in memory at a time
    attach(model, adapter)                                # or beside the weights of a model, to go on training
    export(of_model(model, lora), "my-lora")              # adapter_config.json, adapter_model.safetensors

PEFT names a layer as Transformers does, behind a prefix of its own, base_model.model.:

    model.layers.0.self_attn.q_proj.lora_A.weight            [r, in]
    model.layers.0.self_attn.q_proj.lora_B.weight            [out, r]
    model.layers.0.self_attn.q_proj.lora_magnitude_vector    [out], with DoRA
    lm_head.weight                                           kept whole, `modules_to_save`

`fan_in_fan_out` says how the base stores its matrix, which is known here.

InternLM2 has one `wqkv` where we have three matrices. An adapter on it is read as three with one A: rows of the product
are rows of B. What is written has Llama's names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internlm import disk, storage
from internlm.errors import WeightsError
from internlm.model import lora
from internlm.model.config import ModelConfig
from internlm.model.lora import LoraConfig, Update
from internlm.model.transformer import Transformer
from internlm.weights import adapter_config, card, files
from internlm.weights import weight as lazy
from internlm.weights.adapter_config import FILE, theirs
from internlm.weights.families.table import INTERNLM2, TRANSFORMERS, Names, to_transformers
from internlm.weights.load import Check, check, check_shapes, shapes
from internlm.weights.transformers import ExportOptions
from internlm.weights.weight import Weight, Weights

KIND = "adapter"
WEIGHTS = "adapter_model.safetensors"
BIN = "adapter_model.bin"
_PREFIX = "base_model.model."
_ENDS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
"""Ours → PEFT's."""
# `default` is the adapter's name, which PEFT takes out when it saves, and others leave in.
_FACTOR = re.compile(r"(.+)\.lora_(?:(A|B)(?:\.default)?\.weight|magnitude_vector(?:\.default)?(?:\.weight)?)")
_TABLES = ("embedding.weight", "head.weight")
_INTERNLM2 = re.compile(r"\.layers\.\d+\.(attention|feed_forward)\.")


@dataclass(frozen=True)
class Adapter:
    """An adapter, opened: its form, and weights that are not read yet."""

    model: ModelConfig
    """Shape of the base."""
    config: LoraConfig
    """Which layers it changes, and how."""
    weights: Weights
    """By our names: `blocks.0.attention.wq.lora_a` …"""
    saved: Weights = field(default_factory=dict)
    """Weights that were trained whole and take the place of the base's, by our names."""
    base: str | None = None
    """What its maker called the base."""


def is_one(path: str | Path) -> bool:
    """Return whether a path is the folder of an adapter."""
    return (Path(path) / FILE).is_file()


def base_of(path: str | Path) -> str | None:
    """Return what an adapter calls its base, None where it does not say; raises as `adapter_config.load`."""
    return adapter_config.load(Path(path) / FILE).get("base_model_name_or_path")


def open_adapter(path: str | Path, model: ModelConfig) -> Adapter:
    """Open the folder of an adapter to a base of this shape.

    Raises:
        WeightsError: it is of a kind that is not known, or does not fit the base.
    """
    path = Path(path)
    fields = adapter_config.load(path / FILE)
    file = next((file for file in (path / WEIGHTS, path / BIN) if file.is_file()), None)
    if file is None:
        raise WeightsError(f"holds neither {WEIGHTS} nor {BIN}", where=path)
    stored = files.open_files([file])[file]
    names = INTERNLM2 if any(map(_INTERNLM2.search, stored)) else TRANSFORMERS
    config = adapter_config.read(fields, path / FILE, model, names)
    needed, base, known = _needed(config, model), shapes(model), _by_their_names(model, names)
    saved = _saved(fields.get("modules_to_save") or (), known, path)
    wanted = needed | {name: base[name] for name in saved if name in base}
    fitting = Check(wanted)
    found: Weights = {}
    for name, weight in stored.items():
        for ours, part in _ours(name, weight, known, model).items():
            if ours in _TABLES:  # PEFT may write them along unasked
                wanted[ours] = base[_TABLES[0]]
            if fitting.accepts(ours, torch.Size(part.shape)):
                found[ours] = part
    called = fields.get("base_model_name_or_path") or None
    made_for = f"It was made for {called!r}." if called else None
    try:
        fitting.finish()
    except WeightsError as error:
        raise WeightsError(f"this adapter does not belong to this base: {error}", where=path, do=made_for) from None
    tables = [name for name in _TABLES if name in found]
    if tables and model.tie_embeddings:
        raise WeightsError(f"brings its own {tables[0]}, and embedding and head of the base are one", where=path)
    whole = {name: found[name] for name in found if name not in needed}
    return Adapter(model, config, {name: found[name] for name in needed}, whole, called)


def merge(weights: Weights, adapter: Adapter) -> Weights:
    """Return the weights of a plain model that says what base and adapter say together, not read yet.

    A matrix is computed in fp32 when it is read, a few rows at a time, and has the dtype of the base's.

    Raises:
        WeightsError: the weights, by our names, are not those of `adapter.model`.
    """
    check(weights, adapter.model)
    updates = lora.updates(adapter.config, adapter.model)
    found: Weights = {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if name in adapter.saved:
            found[name] = adapter.saved[name].to(weight.dtype)
        elif layer in updates and name != layer:
            found[name] = _merged(weight, layer, updates[layer], adapter)
        else:
            found[name] = weight
    return found


def attach(model: Transformer, adapter: Adapter) -> None:
    """Give a model, maybe without memory yet, the adapter, in fp32, and freeze everything else, in place.

    Raises:
        WeightsError: the adapter belongs to another shape, or brings weights that take the place of the base's.
        ConfigError: the model has adapters already.
    """
    if adapter.saved:
        raise WeightsError(
            "the adapter brings weights that take the place of the base's", got=list(adapter.saved), do="Merge it."
        )
    check_shapes(adapter.weights, _needed(adapter.config, model.config))
    lora.apply_lora(model, adapter.config)
    for name, parameter in lora.lora_parameters(model).items():
        tensor = lazy.read(name, adapter.weights[name])
        if parameter.is_meta:
            layer, _, own = name.rpartition(".")
            setattr(model.get_submodule(layer), own, nn.Parameter(tensor.to(torch.float32, copy=True)))
        else:
            parameter.data.copy_(tensor)


def of_model(model: Transformer, config: LoraConfig, base: str | None = None) -> Adapter:
    """Return the adapter of a whole model; `config`: of `apply_lora`, `base`: what the base is called."""
    return Adapter(model.config, config, lazy.of_tensors(lora.lora_parameters(model).items()), base=base)


def export(adapter: Adapter, out: str | Path, options: ExportOptions = ExportOptions()) -> Weights:  # noqa: B008
    """Write the folder that `PeftModel.from_pretrained(base, folder)` loads; return the weights by their names there.

    Of the options dtype, replace, notes and progress are used.

    Raises:
        WeightsError: weights are missing, left over or of another shape.
        StorageError: the folder exists, or could not be written.
    """
    out = Path(out)
    check_shapes(adapter.weights, _needed(adapter.config, adapter.model))
    named = {_theirs(name): weight.to(options.dtype) for name, weight in (adapter.weights | adapter.saved).items()}
    modules = [to_transformers(name).removesuffix(".weight") for name in adapter.saved]
    described = adapter_config.write(adapter.config, adapter.model, modules, adapter.base)
    total = sum(weight.nbytes for weight in named.values())
    disk.require_space(out, total, f"adapter {out.name}")
    with storage.writing(out, KIND, replace=options.replace) as folder:
        files.write(folder, named, total, options.progress)
        os.replace(folder.path / files.SINGLE, folder.path / WEIGHTS)
        folder.hashes[WEIGHTS] = folder.hashes.pop(files.SINGLE)
        disk.write_json(folder.path / FILE, described)
        disk.write_text(folder.path / "README.md", _card(adapter, options.notes))
        folder.meta.update(options.notes)
    return named


def _needed(config: LoraConfig, model: ModelConfig) -> dict[str, torch.Size]:
    """Return the shapes of an adapter's weights by our names, in the model's order."""
    needed = {}
    layers = lora.linear_layers(model)
    for layer, update in lora.updates(config, model).items():
        rows, columns = layers[layer]
        needed[f"{layer}.lora_a"] = torch.Size([update.rank, columns])
        needed[f"{layer}.lora_b"] = torch.Size([rows, update.rank])
        if config.dora:
            needed[f"{layer}.lora_magnitude"] = torch.Size([rows])
    return needed


def _by_their_names(model: ModelConfig, names: Names) -> dict[str, list[str]]:
    """Return our names of a base's weights by those in Transformers; experts are left out, and a tied head is in."""
    known = [name for name in shapes(model) if ".router." not in name and ".experts." not in name]
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys([*known, *_TABLES]):
        found.setdefault(to_transformers(name, names), []).append(name)
    return found


def _saved(modules: Iterable[str], known: dict[str, list[str]], path: Path) -> list[str]:
    found = []
    for module in modules:
        of_module = [name for name in known if name.rpartition(".")[0].endswith(module)]  # a plain end, as PEFT has it
        if not of_module or any(len(known[name]) > 1 for name in of_module):
            raise WeightsError("the base has no such weight", where=f"{path / FILE}: modules_to_save", got=module)
        found += [known[name][0] for name in of_module]
    return found


def _merged(weight: Weight, layer: str, update: Update, adapter: Adapter) -> Weight:
    names = [f"{layer}.{end}" for end in _ENDS if adapter.config.dora or end != "lora_magnitude"]

    def read() -> Tensor:
        a, b, *magnitude = (lazy.read(name, adapter.weights[name]) for name in names)
        return lora.merged(lazy.read(layer, weight), a, b, update.scale, *magnitude)

    return Weight(weight.shape, weight.dtype, read, f"{weight.origin} + adapter")


def _ours(name: str, weight: Weight, known: dict[str, list[str]], model: ModelConfig) -> Weights:
    """Return one of PEFT's weights by our names; what is none keeps its name, and is left over."""
    inner = name.removeprefix(_PREFIX)
    factor = _FACTOR.fullmatch(inner)
    if inner == name or (f"{factor[1]}.weight" if factor else inner) not in known:
        return {name: weight}
    if factor is None:
        return dict.fromkeys(known[inner], weight)
    layers = [ours.removesuffix(".weight") for ours in known[f"{factor[1]}.weight"]]
    end = f"lora_{factor[2].lower()}" if factor[2] else "lora_magnitude"
    parts = [weight] * len(layers) if end == "lora_a" else _rows(weight, layers, model)
    return {f"{layer}.{end}": part for layer, part in zip(layers, parts, strict=True)}


def _rows(weight: Weight, layers: list[str], model: ModelConfig) -> list[Weight]:
    """Return the rows of each of the layers that are one in the base, together for every key head there."""
    known = lora.linear_layers(model)
    parts = [(known[layer][0], *weight.shape[1:]) for layer in layers]
    if len(layers) == 1 or weight.shape[0] != sum(part[0] for part in parts):
        return [weight] * len(layers)  # of another shape: the caller sees that
    return lazy.apart(weight, model.num_kv_heads, parts, [f"[{layer.rpartition('.')[2]}]" for layer in layers])


def _theirs(name: str) -> str:
    layer, _, own = name.rpartition(".")
    return _PREFIX + (f"{theirs(layer)}.{_ENDS[own]}" if own in _ENDS else to_transformers(name))


def _card(adapter: Adapter, notes: Mapping[str, Any]) -> str:
    config = adapter.config
    kind = ("rank-stabilised " if config.rank_stabilized else "") + ("DoRA" if config.dora else "LoRA")
    parameters = sum(torch.Size(weight.shape).numel() for weight in adapter.weights.values())
    base = adapter.base or "the base model"
    use = [
        "```python", "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, ".")', "```",
    ]  # fmt: skip
    about = [f"A {kind} adapter of rank {config.rank} with {parameters:,} parameters, for `{base}`."]
    return card.page("peft", about, use, {"name": "Adapter", **notes}, adapter.model)
