"""The code that an export carries, so that InternLM's own lines run: `model.chat(tokenizer, "hello", history=[])`.

The four files in `remote_code/` import Transformers (4.30 to 5), torch and sentencepiece, and nothing of this package.
They know plain and dynamic rotary positions, and biases on all of attention or on none.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from internlm import disk
from internlm.errors import WeightsError
from internlm.text.templates import EndOfText, Special, get_template
from internlm.text.tokenizer import CONFIG_FILE, Tokenizer
from internlm.weights.talk import Talk

FAMILY = "internlm"
"""`model_type` of a folder with this code."""
CODE = Path(__file__).parent / "remote_code"
DEFAULT_TEMPLATE = "internlm-v1.1"
"""Format of `model.chat` where none is recorded, and the vocabulary is InternLM's."""
_MODEL = "modeling_internlm.InternLMForCausalLM"
_MODEL_MAP = {
    "AutoConfig": "configuration_internlm.InternLMConfig",
    "AutoModel": _MODEL,
    "AutoModelForCausalLM": _MODEL,
}
_TOKENIZER_MAP = {"AutoTokenizer": ["tokenization_internlm.InternLMTokenizer", None]}
_KNOWN: dict[str, Any] = _MODEL_MAP | _TOKENIZER_MAP


def fields(talk: Talk) -> dict[str, Any]:
    """Return what config.json says beside the shape."""
    return {"auto_map": _MODEL_MAP, "chat_format": chat_format(talk)}


def chat_format(talk: Talk) -> dict[str, Any] | None:
    """Return the chat format with its special tokens as ids, None where the model has none.

    A model without a recorded format gets that of InternLM's chat models, if its vocabulary has `<eoa>`.
    """
    tokenizer = talk.tokenizer
    if tokenizer is None:
        return None
    name = talk.template
    if name is None and talk.foreign is None and "<eoa>" in tokenizer.special_tokens:
        name = DEFAULT_TEMPLATE
    if name is None:
        return None
    template = get_template(name)
    frames = {"system": template.system, "user": template.user, "assistant": template.assistant}
    return {
        "name": name,
        "bos": tokenizer.bos_id if template.bos else None,
        **{
            role: frame and [[_part(part, tokenizer) for part in parts] for parts in frame]  # prefix and suffix
            for role, frame in frames.items()
        },
        "default_system": template.default_system,
        "single_turn": template.single_turn,
        "stops": replace(talk, template=name).stop_ids(),
    }


def is_ours(folder: Path) -> bool:
    """Return whether the code of a folder is the one carried here, to the byte, and all that would be run.

    A folder in it says no: Transformers also runs `custom_generate/generate.py`, unasked.
    """
    if any(path.is_dir() for path in folder.iterdir()):
        return False
    found = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    if found != {path.name: path.read_bytes() for path in CODE.glob("*.py")}:
        return False
    return all(_is_known(folder / name) for name in ("config.json", CONFIG_FILE))


def _is_known(path: Path) -> bool:
    """Return whether a file maps to nothing but the code carried here."""
    found = disk.read_json(path, WeightsError).get("auto_map") or {}
    return isinstance(found, dict) and all(_KNOWN.get(name) == loader for name, loader in found.items())


def write(folder: Path, talk: Talk) -> None:
    """Put the code into a folder that holds `talk`, and make its tokenizer load by it."""
    for source in sorted(CODE.glob("*.py")):
        with disk.explained(f"writing {folder / source.name}"):
            shutil.copyfile(source, folder / source.name)
    if talk.tokenizer is None:
        return
    if not (folder / "tokenizer.model").exists():
        # The spelling that old Transformers read too; the tokenizer is loaded without code.
        talk.tokenizer.write_tokenizer_json(folder / "tokenizer.json")
        return
    path = folder / CONFIG_FILE
    described = disk.read_json(path, WeightsError)
    del described["add_bos_token"]  # theirs puts bos before a text that has none, so that a template may write it too
    disk.write_json(path, described | {"tokenizer_class": "InternLMTokenizer", "auto_map": _TOKENIZER_MAP})


def _part(part: str | Special | EndOfText, tokenizer: Tokenizer) -> str | int | None:
    if isinstance(part, EndOfText):
        return tokenizer.eos_id
    return tokenizer.special(part.name) if isinstance(part, Special) else part
