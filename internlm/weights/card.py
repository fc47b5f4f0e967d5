"""The model card of an export: README.md, with what is known about the model and, plainly, what is not.

    card(config, "LlamaForCausalLM", "bfloat16", talk, {"recipe": {...}, "tokens": 2_700_000, "licence": "apache-2.0"})

The sections follow Mitchell et al. 2019 (https://arxiv.org/abs/1810.03993).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from internlm.model.config import ModelConfig
from internlm.weights.talk import Talk

UNKNOWN = "Not recorded."
LIMITS = (
    "A language model writes what is probable, not what is true: check what it says. It repeats what its data is "
    "biased to, and was not tested for any use beyond what stands above."
)


def card(config: ModelConfig, model: str, dtype: str, talk: Talk, notes: Mapping[str, Any]) -> str:
    """Return the README.md of an export.

    Args:
        config: shape of the model.
        model: class that loads it.
        dtype: of most weights.
        talk: how it is talked to.
        notes: what is known beyond, of `name`, `source`, `recipe` (text, or a recipe as a dict), `step`, `tokens`,
            `data` (text, or names), `evaluation` (text, or numbers by name), `limits` (text), `licence` (its SPDX name)
            and `remote_code` (whether the folder carries its code).
    """
    about = [_summary(config, model, talk), "", *shape(config, dtype)]
    use = _use(talk, bool(notes.get("remote_code")))
    return page("transformers", about, use, notes, config)


def licence_of(folder: Path) -> str | None:
    """Return the `license` in the front matter of a folder's README.md; None: it says none that can be read."""
    try:
        head = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", (folder / "README.md").read_text("utf-8"), re.DOTALL)
        found = yaml.safe_load(head[1])["license"] if head else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None


def page(library: str | None, about: list[str], use: list[str], notes: Mapping[str, Any], config: ModelConfig) -> str:
    """Return a README.md with every section, whatever is exported.

    Args:
        library: which loads it, as the Hub calls it; None: there is none.
        about, use: lines on what it is, and how it is used.
        notes, config: as of `card`.
    """
    licence = notes.get("licence")
    rows = {"library_name": library, "pipeline_tag": "text-generation", "license": licence}
    head = {name: value for name, value in rows.items() if value is not None}
    limits = [notes["limits"], ""] if notes.get("limits") else []
    window = f"It reads {config.context_length:,} tokens at most, prompt and answer together."
    sections = {
        "": about,
        "Use": use,
        "Training": _training(notes),
        "Data": _data(notes),
        "Evaluation": _evaluation(notes.get("evaluation")),
        "Limits": [*limits, window, LIMITS],
        "Licence": [f"`{licence}`" if licence else f"{UNKNOWN} Ask who gave you the model before you use it."],
    }
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "", f"# {notes.get('name', 'Model')}", ""]
    for title, content in sections.items():
        lines += [*([f"## {title}", ""] if title else []), *content, ""]
    return "\n".join(lines)


def _summary(config: ModelConfig, model: str, talk: Talk) -> str:
    kind = "a base model (plain continuation, no chat format)"
    if talk.template is not None:
        kind = f"a chat model (format `{talk.template}`)"
    elif talk.foreign is not None:
        kind = "a chat model (its own format)"
    return f"A `{model}` with {config.num_parameters:,} parameters, {kind}."


def shape(config: ModelConfig, dtype: str) -> list[str]:
    """Return a table of a model's shape."""
    rows = {
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "heads (key-value heads) × head size": f"{config.num_heads} ({config.num_kv_heads}) × {config.head_dim}",
        "feed-forward size": config.ffn_size,
        "vocabulary": config.vocab_size,
        "context": f"{config.context_length} tokens",
        "stored as": dtype,
    }
    if config.experts is not None:
        rows["experts (per token)"] = f"{config.experts.count} ({config.experts.per_token})"
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _use(talk: Talk, remote_code: bool) -> list[str]:
    trust = ", trust_remote_code=True" if remote_code else ""
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("."{trust})',
    ]
    if talk.tokenizer is not None:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("."{trust})')
        puts_bos = talk.tokenizer.bos_id is not None and not talk.tokenizer.adds_around
        start = "tokenizer.bos_token + " if puts_bos else ""
        ids = f'tokenizer({start}"Once", return_tensors="pt")'
        if talk.template is not None or talk.foreign is not None:
            question = '[{"role": "user", "content": "Hello"}]'
            options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
            ids = f"tokenizer.apply_chat_template({question}, {options})"
        if remote_code and talk.template is not None:
            lines.append('response, history = model.chat(tokenizer, "hello", history=[])')
            lines.append("print(response)")
        else:
            lines += [f"inputs = {ids}", "print(tokenizer.decode(model.generate(**inputs)[0]))"]
    return [*lines, "```", "", "Or talk to it: `internlm chat .`"]


def _training(notes: Mapping[str, Any]) -> list[str]:
    lines = []
    tokens, step, source = notes.get("tokens"), notes.get("step"), notes.get("source")
    if tokens is not None:
        lines.append(f"Trained on {tokens:,} tokens" + (f" in {step:,} steps." if step is not None else "."))
    if source is not None:
        lines.append(f"Converted from `{source}`.")
    recipe = notes.get("recipe")
    if isinstance(recipe, str):
        lines.append(recipe)
    elif recipe:
        written = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).rstrip()
        lines += ["The recipe:", "", "```yaml", written, "```"]
    else:
        lines.append(f"Recipe: {UNKNOWN.lower()}")
    return lines


def _data(notes: Mapping[str, Any]) -> list[str]:
    """Return what is noted, else the names of the recipe's sources."""
    data, recipe = notes.get("data"), notes.get("recipe")
    if data is None and isinstance(recipe, Mapping):
        sources = (recipe.get("data") or {}).get("train") or {}
        data = [f"`{name}`" for name in sources]
    if not data:
        return [UNKNOWN]
    return [data] if isinstance(data, str) else [f"- {name}" for name in data]


def _evaluation(results: Any) -> list[str]:
    if not results:
        return [UNKNOWN]
    if isinstance(results, str):
        return [results]
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in results.items())]
