"""Models to read, whatever their format.

    source = open_source("runs/a")            # its newest complete checkpoint
    model = source.model(torch.float32)

Known are runs and checkpoints of ours, Transformers folders, adapters of PEFT (merged with their base), training
checkpoints of InternLM v0.2 and InternEvo, and GGUF files.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm import hub, storage
from internlm.checkpoint import listing, place, store
from internlm.checkpoint.place import Place
from internlm.errors import StorageError, UsageError, WeightsError
from internlm.model.config import ModelConfig
from internlm.model.quant import Kind
from internlm.model.transformer import Transformer
from internlm.text.templates import get_template
from internlm.text.tokenizer import Tokenizer
from internlm.weights import adapters, files, transformers
from internlm.weights import weight as lazy
from internlm.weights.gguf import model as gguf
from internlm.weights.load import read_model
from internlm.weights.native import read as native
from internlm.weights.talk import Talk, read_talk
from internlm.weights.weight import Weights


@dataclass(frozen=True)
class Hints:
    """What a source may not say itself."""

    tokenizer: Path | None = None
    """File or folder; None: the one that lies there."""
    base: Path | None = None
    """What an adapter belongs to; None: what it names."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What a training checkpoint of InternLM leaves open, such as `num_heads`."""
    template: str | None = None
    """Name of a chat format in place of what is recorded; "none": it is a plain model."""


@dataclass(frozen=True)
class Source:
    """Weights, opened."""

    path: Place
    kind: str
    """`checkpoint`, `transformers`, `adapter`, `internlm-v0.2` or `gguf`."""
    config: ModelConfig
    weights: Callable[[], Weights]
    """Opens them, by our names."""
    talk: Talk
    facts: dict[str, Any] = field(default_factory=dict)
    """Of the training, for the model card."""
    beside: tuple[Place, ...] = ()
    """Further paths that the weights depend on."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (our name, tensor), read one at a time."""
        return lazy.tensors(self.weights())

    def state(self) -> str:
        """Return a text that changes when a file of the source does."""
        facts: list[tuple[object, ...]] = []
        for path in (self.path, *self.beside):
            if not isinstance(path, Path):
                facts.append((str(path), (path / storage.MANIFEST).read_text()))
                continue
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            facts += [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def model(
        self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", pack: Kind | None = None
    ) -> Transformer:
        """Return the model with its weights, brought there one by one.

        Args:
            dtype: of the weights; None: as stored.
            device: where they go.
            pack: form of the linear layers, on a CPU: packed block by block, so that memory never holds two forms.

        Raises:
            WeightsError, StorageError: the weights are those of another model (before any is read), or are damaged.
            EngineError: the layers cannot be packed.
        """
        return read_model(self.config, self.weights(), dtype=dtype, device=device, pack=pack)


def open_source(path: str | Place, hints: Hints = Hints()) -> Source:
    """Open what a path holds, or the URL of a run or checkpoint of ours.

    Raises:
        StorageError: it is of no kind that is known, or the name of something that would have to be downloaded.
        UsageError: a hint is given that it has no use for.
        WeightsError, TokenizerError: its model or tokenizer is of a kind that is not known, or a chat format.
    """
    if isinstance(path, str | Path):
        hub.require_here(path)
    path = place.at(path)
    source = _open(path, hints)
    for name, value, kind in (("base", hints.base, "adapter"), ("settings", hints.settings, "internlm-v0.2")):
        if value and source.kind != kind:
            raise UsageError(f"{name} means nothing for this format", where=path, got=source.kind, allowed=[kind])
    talk = source.talk
    if hints.tokenizer is not None:
        # The chat format of a folder was written for the tokenizer that lies there.
        template = talk.template if talk.tokenizer is None else None
        talk = Talk(Tokenizer.load(hints.tokenizer), template, generation=talk.generation)
    if hints.template is not None:
        chosen = None if hints.template == "none" else get_template(hints.template).name
        talk = dataclasses.replace(talk, template=chosen, foreign=None)
    return dataclasses.replace(source, talk=talk)


def _open(path: Place, hints: Hints, above: tuple[Path, ...] = ()) -> Source:
    """Open what a path holds; `above`: the adapters that it is the base of."""
    if listing.is_checkpoint(path) or listing.newest(listing.folder_of(path)) is not None:
        return _checkpoint(path)
    if not isinstance(path, Path):
        raise StorageError(
            "no complete checkpoint here", where=path, do="Of a store only runs and checkpoints of ours can be read."
        )
    files.require_fetched(path)
    if adapters.is_one(path):
        return _adapter(path, hints, above)
    if (path / "config.json").is_file():
        config = transformers.read_config(path)
        return Source(path, "transformers", config, lambda: transformers.open_weights(path), read_talk(path))
    if native.is_one(path):
        opened = native.open_checkpoint(path, hints.settings)
        talk, facts = read_talk(opened.folder), native.progress(opened.folder)
        return Source(opened.folder, "internlm-v0.2", opened.config, lambda: opened.weights, talk, facts)
    if gguf.is_one(path):
        return Source(path, "gguf", gguf.read_config(path), lambda: gguf.open_weights(path), gguf.read_talk(path))
    kinds = "a Transformers folder, an adapter, a training checkpoint of InternLM v0.2, or a GGUF file"
    problem = "is no model" if path.exists() else "no such folder"
    raise StorageError(problem, where=path, do=f"Give a run or a checkpoint of `internlm train`, {kinds}.")


def _checkpoint(path: Place) -> Source:
    found = store.open_checkpoint(path)
    tokenizer = None if found.tokenizer_path is None else Tokenizer.load(found.tokenizer_path)
    facts: dict[str, Any] = {name: found.meta[name] for name in ("recipe", "step", "tokens") if name in found.meta}
    return Source(
        found.path, "checkpoint", found.config, found.weights, Talk(tokenizer, found.meta.get("template")), facts
    )


def _adapter(path: Path, hints: Hints, above: tuple[Path, ...]) -> Source:
    """Open an adapter with its base, as the model that both are together."""
    named = adapters.base_of(path)
    if hints.base is not None:
        hub.require_here(hints.base)
    if hints.base is None and (named is None or not Path(named).exists()):
        raise WeightsError(
            "the base of this adapter is not here", where=path, got=named, do="Say where it lies: --base FOLDER."
        )
    lies = hints.base or Path(str(named))
    if lies.exists() and lies.resolve() in (path.resolve() for path in (path, *above)):
        raise WeightsError("names itself as its base", where=path, got=lies, do="Say where it lies: --base FOLDER.")
    base = _open(lies, Hints(), (*above, path))
    adapter = adapters.open_adapter(path, base.config)
    own = read_talk(path)  # trainers save the tokenizer beside the adapter, seldom the rest
    if own.tokenizer is None:
        own = base.talk
    elif own.jinja is None:
        own = dataclasses.replace(own, template=base.talk.template, foreign=base.talk.foreign)
    stops, generation = own.stops or base.talk.stops, own.generation or base.talk.generation
    return Source(
        path,
        "adapter",
        base.config,
        lambda: adapters.merge(base.weights(), adapter),
        dataclasses.replace(own, stops=stops, generation=generation),
        base.facts,
        (base.path, *base.beside),
    )
