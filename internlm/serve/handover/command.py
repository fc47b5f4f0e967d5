"""Hand a model over to another engine: the exact command, what has to come before it, and what would go wrong.

    plan = plan_for("out", Wish(engine="vllm", tensor=2))
    print(plan.command)          # vllm serve out --served-model-name out --host 127.0.0.1 …
    plan.before                  # `internlm convert …` first, where the engine cannot read what is there
    plan.findings                # each with what to do

Options are those of the versions that peers.py names; the command says all that matters, so that another default does
not change what is served. Of what a conversion will write, which is right by construction, only the shape is checked.
"""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from internlm import storage
from internlm.errors import UsageError
from internlm.serve.handover import peers
from internlm.serve.handover.checks import CHECKS
from internlm.serve.handover.found import GGUF, Export, Finding, Wish, as_text, read_export, read_gguf
from internlm.serve.handover.peers import PEERS
from internlm.source import Source, open_source
from internlm.text.tool_formats import format_of
from internlm.text.tool_jinja import refuses_tools
from internlm.weights.families.table import FAMILIES, fitting
from internlm.weights.transformers import KIND


@dataclass(frozen=True)
class Command:
    """A program with its arguments, and variables that it needs; as a text the line for a POSIX shell."""

    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        set_ = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*set_, shlex.join(self.words)])


@dataclass(frozen=True)
class Plan:
    """What brings a model onto an engine."""

    command: Command | None
    """None: a finding blocks it."""
    facts: dict[str, str]
    """What the engine will use, and where it reads it."""
    before: Command | None
    findings: tuple[Finding, ...]


def plan_for(model: str | Path, wish: Wish) -> Plan:
    """Return what brings a model, whatever `open_source` opens, onto an engine.

    Raises:
        StorageError, WeightsError, TokenizerError: it is no model, or cannot be read.
        UsageError: the context is longer than the model's on this engine, or a package is missing.
    """
    source = open_source(model)
    before: Command | None = None
    findings: list[Finding] = []
    export = _ready(source, wish.engine)
    if export is None:
        before, export, findings = _conversion(model, source, wish.engine)
    limit = export.limit(wish.engine)
    if wish.context is not None and not 1 <= wish.context <= limit:
        problem = f"this model reads {limit} tokens at most on {wish.peer.title}"
        raise UsageError(problem, where="--context", got=wish.context, allowed=[f"1 to {limit}"])
    for check in CHECKS:
        findings += check(export, wish)
    if any(finding.blocks for finding in findings):
        return Plan(None, {}, before, tuple(findings))
    name = wish.name or _beside(model).resolve().name.removesuffix(".gguf")
    return Plan(_command(export, wish, name, limit), _facts(export, wish, limit), before, tuple(findings))


def _ready(source: Source, engine: str) -> Export | None:
    """Return the model as it is where the engine reads it so, else None."""
    if engine == "llama.cpp":
        return read_gguf(source) if source.kind == "gguf" else None
    if source.kind != "transformers":
        return None
    export = read_export(source)
    return None if export.has_code or export.architecture not in peers.ARCHITECTURES else export


def _beside(model: str | Path) -> Path:
    """Return the path that names a model."""
    where = str(model).rstrip("/")
    return Path(where.rpartition("/")[2] if "://" in where else where)


def _conversion(model: str | Path, source: Source, engine: str) -> tuple[Command, Export, list[Finding]]:
    """Return the command that makes what the engine reads, what that will be, and why."""
    base = _beside(model)
    base = base if base.name not in ("", "..") else base.resolve()
    base = base.with_suffix("") if base.is_file() else base
    is_gguf = engine == "llama.cpp"
    target = base.with_name(base.name + ("-gguf" if is_gguf else "-export"))
    words = ["internlm", "convert", str(model), str(target), *(["--to", "gguf"] if is_gguf else [])]
    talk = source.talk
    export = Export(
        path=str(target / f"{target.name}-bf16.gguf" if is_gguf else target),
        config=source.config,
        talk=talk,
        architecture=GGUF if is_gguf else FAMILIES[fitting(source.config)].architecture,
        template=as_text(talk.jinja),
        template_file="the file" if is_gguf else "tokenizer_config.json",
        eos=tuple(talk.stop_ids()[: 3 if is_gguf else None]),
        tokenizer_files=frozenset({"tokenizer.json"} if talk.tokenizer is not None else set()),
    )
    findings = [_why(source, engine)]
    if storage.is_complete(target, KIND):
        findings.append(Finding(f"{target} is there already", "Leave the conversion out, or add --force to it."))
    return Command((*words, "--dtype", "bfloat16")), export, findings


def _why(source: Source, engine: str) -> Finding:
    title = PEERS[engine].title
    what = f"{title} does not read this ({source.kind})"
    if source.kind == "transformers" and engine == "llama.cpp":
        what = "llama.cpp reads GGUF files, and this is a Transformers folder"
    elif source.kind == "transformers":
        export = read_export(source)
        what = f"{title} loads {export.architecture} with code from the folder only, or not at all"
        if export.architecture == "InternLMForCausalLM":
            what = PEERS[engine].refusal
    return Finding(what, "Convert it first; the command stands below.")


def _command(export: Export, wish: Wish, name: str, limit: int) -> Command:
    context, port, tensor = str(wish.context or limit), str(wish.port), str(wish.tensor)
    place = ["--host", wish.host, "--port", port]
    if wish.engine == "vllm":
        words = ["vllm", "serve", export.path, "--served-model-name", name, *place]
        words += ["--dtype", "bfloat16", "--max-model-len", context]
        words += ["--tensor-parallel-size", tensor] if wish.tensor > 1 else []
    elif wish.engine == "sglang":
        words = ["sglang", "serve", "--model-path", export.path, "--served-model-name", name, *place]
        words += ["--dtype", "bfloat16", "--context-length", context]
        words += ["--tp-size", tensor] if wish.tensor > 1 else []
        words += ["--api-key", wish.api_key] if wish.api_key is not None else []
    elif wish.engine == "lmdeploy":
        words = ["lmdeploy", "serve", "api_server", export.path, "--model-name", name]
        words += ["--server-name", wish.host, "--server-port", port, "--dtype", "bfloat16", "--session-len", context]
        words += [] if export.is_for_turbomind else ["--backend", "pytorch"]
        words += ["--chat-template", "hf"] if export.template else []
        words += ["--tp", tensor] if wish.tensor > 1 else []
        words += ["--api-keys", wish.api_key] if wish.api_key is not None else []
    else:
        words = ["llama-server", "--model", export.path, "--alias", name, *place, "--ctx-size", context]
        words += ["--jinja"] if export.template else []
        words += ["--split-mode", "layer", "--tensor-split", ",".join("1" * wish.tensor)] if wish.tensor > 1 else []
    parser = tool_parser(export, wish.engine)
    if parser is not None:
        words += ["--enable-auto-tool-choice"] if wish.engine == "vllm" else []
        words += ["--tool-call-parser", parser]
    variable = wish.peer.key_variable
    return Command(tuple(words), {variable: wish.api_key} if variable and wish.api_key is not None else {})


def tool_parser(export: Export, engine: str) -> str | None:
    """Return an engine's parser for the tool format of an export, if there are both."""
    talk = export.talk
    written = export.template
    if talk.template is None or written is None or written != talk.jinja or refuses_tools(written):
        return None
    return PEERS[engine].tool_parsers.get(format_of(talk.template).name)


def _facts(export: Export, wish: Wish, limit: int) -> dict[str, str]:
    name = export.talk.template or "its own"
    facts = {"chat format": f"{name}, read from {export.template_file}" if export.template else "none"}
    facts["answers end at"] = f"ids {', '.join(map(str, export.eos)) or 'none'}, read from {export.eos_file}"
    parser = tool_parser(export, wish.engine)
    if parser is not None:
        facts["tools"] = f"{format_of(name).name} format, read by the parser {parser!r}"
    facts["context"] = f"{wish.context or limit} of {export.config.context_length} tokens"
    return facts


def run(command: Command) -> None:
    """Become the engine: replace this process by it; UsageError where its program is not on PATH."""
    program = shutil.which(command.words[0])
    if program is None:
        install = next(engine.install for engine in PEERS.values() if engine.program == command.words[0])
        raise UsageError(f"{command.words[0]} is not on PATH", where="--run", do=f"Install it: {install}")
    os.execve(program, list(command.words), {**os.environ, **command.environment})
