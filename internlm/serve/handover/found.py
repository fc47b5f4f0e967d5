"""An export as another engine finds it, and how it is to be served.

Read is what engines read: the JSON files and chat_template.jinja of a Transformers folder, the header of a GGUF file;
never the weights: `internlm convert --verify` is for those.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm import disk
from internlm.errors import UsageError
from internlm.model.config import DynamicScaling, ModelConfig
from internlm.serve.handover import peers
from internlm.serve.handover.peers import PEERS, Peer
from internlm.source import Source
from internlm.weights.gguf import header
from internlm.weights.talk import GENERATION_FILE, Jinja, Talk, read_template

GGUF = "GGUF"
"""`Export.architecture` of a GGUF file."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How the model is to be served."""

    engine: str
    host: str = "127.0.0.1"
    port: int = 8000
    tensor: int = 1
    """GPUs that share each layer."""
    context: int | None = None
    """Tokens of prompt and answer; None: all that the model has on this engine."""
    name: str | None = None
    """What clients call the model; None: its folder's."""
    api_key: str | None = None

    @property
    def peer(self) -> Peer:
        """The engine."""
        return PEERS[self.engine]

    def __post_init__(self) -> None:
        if self.engine not in PEERS:
            raise UsageError("no such engine", where="--engine", got=self.engine, allowed=PEERS)
        if not 1 <= self.port <= 65535:
            raise UsageError("is no port", where="--port", got=self.port, allowed=["1 to 65535"])
        if self.tensor < 1:
            raise UsageError("is no number of GPUs", where="--tensor", got=self.tensor, allowed=["1 and more"])


@dataclass(frozen=True)
class Export:
    """A model as an engine will find it."""

    path: str
    config: ModelConfig
    talk: Talk
    architecture: str
    """Class in config.json."""
    template: str | None
    """The chat format as Jinja; None: a base model."""
    template_file: str
    eos: tuple[int, ...]
    """Ids that end an answer, as the engine finds them."""
    dtype: str = "bfloat16"
    has_code: bool = False
    """Whether config.json asks for code from the folder."""
    adds_bos: bool = False
    tokenizer_files: frozenset[str] = frozenset({"tokenizer.json"})
    """Vocabularies of a folder."""

    @property
    def is_gguf(self) -> bool:
        """Whether it is one file, for llama.cpp."""
        return self.architecture == GGUF

    @property
    def is_for_turbomind(self) -> bool:
        """Whether LMDeploy's faster engine can run it."""
        return self.architecture in peers.TURBOMIND and self.config.head_dim in peers.TURBOMIND_HEADS

    def limit(self, engine: str) -> int:
        """Return how many tokens an engine serves: dynamic NTK reaches past the trained length on TurboMind alone."""
        scaling, context = self.config.rope.scaling, self.config.context_length
        if isinstance(scaling, DynamicScaling) and not (engine == "lmdeploy" and self.is_for_turbomind):
            return min(context, scaling.original_length)
        return context

    @property
    def eos_file(self) -> str:
        """Where the ids that end an answer stand."""
        return self.template_file if self.is_gguf else GENERATION_FILE


@dataclass(frozen=True)
class Finding:
    """Something that a check found."""

    what: str
    do: str
    """The next step."""
    blocks: bool = False
    """Whether the engine would not serve the model, or wrongly: there is no command then."""


def read_export(source: Source) -> Export:
    """Return what an engine finds in a Transformers folder."""
    folder = source.path
    assert isinstance(folder, Path), "only checkpoints of ours are read from a store"
    described = disk.read_json(folder / "config.json")
    tokenizer = disk.read_json(folder / "tokenizer_config.json")
    template, where = read_template(folder)
    eos = disk.read_json(folder / GENERATION_FILE).get("eos_token_id")
    return Export(
        path=str(folder),
        config=source.config,
        talk=source.talk,
        architecture=str((described.get("architectures") or ["none"])[0]),
        template=as_text(template),
        template_file=where,
        eos=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        dtype=str(described.get("dtype") or described.get("torch_dtype") or "not stated"),
        has_code="auto_map" in described,
        adds_bos=_adds_bos(tokenizer, disk.read_json(folder / "tokenizer.json"), source.talk),
        tokenizer_files=frozenset(name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()),
    )


def as_text(template: Jinja | None) -> str | None:
    """Return a chat format as one text: some folders hold a list of named ones."""
    return json.dumps(template) if isinstance(template, list) else template


def _adds_bos(described: dict[str, Any], vocabulary: dict[str, Any], talk: Talk) -> bool:
    """Return whether Transformers puts bos before every text: by its own flag, or by the vocabulary's last step."""
    bos = talk.tokenizer.bos_id if talk.tokenizer is not None else None
    if bos is None:
        return False
    steps = vocabulary.get("post_processor") or {}
    added = [
        id_
        for step in steps.get("processors", [steps])
        if step.get("type") == "TemplateProcessing"
        for piece in step.get("single", [])[:1]
        if "SpecialToken" in piece
        for id_ in step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    ]
    # The flag counts in the classes of Llama alone; the plain class obeys the vocabulary.
    is_plain = described.get("tokenizer_class") in (None, "PreTrainedTokenizerFast", "TokenizersBackend")
    return bos in added if is_plain or "add_bos_token" not in described else bool(described["add_bos_token"])


def read_gguf(source: Source) -> Export:
    """Return what llama.cpp finds in a GGUF file."""
    file = source.path
    assert isinstance(file, Path), "only checkpoints of ours are read from a store"
    file = file if file.is_file() else min(file.glob("*.gguf"))
    fields = header.read_header(file).fields
    roles = [fields.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    eos = tuple(int(id_) for id_ in roles if id_ is not None)
    template = fields.get("tokenizer.chat_template")
    return Export(str(file), source.config, source.talk, GGUF, template, "the file", eos)
