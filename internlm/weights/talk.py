"""How a model is talked to: the files that lie beside the weights in a Transformers folder.

    talk = read_talk("llama-folder")        # tokenizer, chat format, ids that end an answer
    talk.write(folder)                      # tokenizer.json, *_config.json, special_tokens_map.json

A chat format that is not known here is carried along, with its tokenizer.json. Where our template begins with bos, a
tokenizer.json that adds one too is written without that.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from internlm import disk
from internlm.errors import TokenizerError, WeightsError
from internlm.text.chat import Message, render, stop_ids
from internlm.text.templates import TEMPLATES, Template, get_template
from internlm.text.tokenizer import CONFIG_FILE, CONVENTIONAL, VOCABULARY_FILES, Tokenizer
from internlm.text.tool_jinja import chat_template, name_of

logger = logging.getLogger(__name__)

TEMPLATE_KEY = "internlm_template"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
Jinja = str | list[dict[str, str]]
"""What `chat_template` of a tokenizer_config.json holds: one chat format, or several with their names."""


@dataclass(frozen=True)
class Talk:
    """How a model is talked to."""

    tokenizer: Tokenizer | None = None
    template: str | None = None
    """Name of the chat format; None for a base model, and for a format that is not known here."""
    foreign: Jinja | None = None
    """One that is not known here, as `chat_template` of a tokenizer_config.json."""
    stops: tuple[int, ...] = ()
    """Ids that end an answer, beside eos and those of the template."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Further fields of a generation_config.json."""

    @cached_property
    def format(self) -> Template | None:
        """The chat format `template`."""
        return None if self.template is None else get_template(self.template)

    @property
    def jinja(self) -> Jinja | None:
        """The chat format as `chat_template` of a tokenizer_config.json; None for a base model."""
        return self.foreign if self.format is None else chat_template(self.format, self.tokenizer)

    def stop_ids(self) -> list[int]:
        """Return every id that ends an answer."""
        if self.tokenizer is None:
            return list(self.stops)
        eos = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        of_template = stop_ids(self.format, self.tokenizer) if self.format is not None else eos
        return list(dict.fromkeys([*of_template, *self.stops]))

    def check(self, vocab_size: int) -> None:
        """Check that tokenizer and template fit a model of so many ids.

        Raises:
            WeightsError: the tokenizer has more ids than the model, or there is a template and no tokenizer.
            ConfigError, TokenizerError: the template is not known, or needs tokens that the tokenizer lacks.
        """
        if self.tokenizer is not None and self.tokenizer.vocab_size > vocab_size:
            raise WeightsError(
                f"has {self.tokenizer.vocab_size} ids, the model {vocab_size}",
                where=self.tokenizer.path or "tokenizer",
                do="Give the tokenizer that the model was trained with (--tokenizer), without tokens added later.",
            )
        if self.format is not None:
            if self.tokenizer is None:
                raise WeightsError(f"the chat format {self.template!r} needs a tokenizer")
            render([Message("user", "a"), Message("assistant", "a")], self.format, self.tokenizer)

    def role_ids(self) -> dict[str, int | None]:
        """Return the ids of bos, eos and pad under the names of a config.json."""
        return {f"{role}_token_id": getattr(self.tokenizer, f"{role}_id", None) for role in CONVENTIONAL}

    def write(self, folder: Path) -> None:
        """Write the files into a folder."""
        stops = self.stop_ids()
        generation = self.generation | self.role_ids() | {"eos_token_id": stops or None}
        disk.write_json(folder / GENERATION_FILE, generation)
        for name in VOCABULARY_FILES:  # of an interrupted export: a tokenizer goes over no other
            (folder / name).unlink(missing_ok=True)
        if self.tokenizer is None:
            return
        self.tokenizer.save(folder)
        begins_with_bos = self.format is not None and self.format.bos
        if begins_with_bos or not (folder / "tokenizer.json").exists():
            try:
                self.tokenizer.write_tokenizer_json(folder / "tokenizer.json")
            except TokenizerError as error:
                logger.warning("warning: only tokenizer.model is written, AutoTokenizer may not load it: %s", error)
        described = {"tokenizer_class": "PreTrainedTokenizerFast", **self.tokenizer.config()}
        if self.template is not None:
            described[TEMPLATE_KEY] = self.template
        if self.jinja is not None:
            described["chat_template"] = self.jinja
        disk.write_json(folder / CONFIG_FILE, described)
        # The same names, where older programs look; said to take no white space from the text beside them.
        exact = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        keys = [f"{role}_token" for role in CONVENTIONAL if described.get(f"{role}_token") is not None]
        special = {key: {"content": described[key], **exact} for key in keys}
        disk.write_json(folder / "special_tokens_map.json", special)


def read_talk(folder: str | Path) -> Talk:
    """Return how the model of a Transformers folder is talked to.

    Raises:
        TokenizerError: the tokenizer is damaged, or of a kind that is not known.
        WeightsError: a file that says how to use it is damaged.
    """
    folder = Path(folder)
    described = disk.read_json(folder / CONFIG_FILE, WeightsError)
    found, where = read_template(folder)
    name = described.get(TEMPLATE_KEY)
    if not isinstance(name, str) or name not in TEMPLATES:
        name = name_of(found) if isinstance(found, str) else None
    elif found is not None and not is_written_by(name, found):
        what = f"does not hold the chat format {name}, which {TEMPLATE_KEY} of {CONFIG_FILE} records"
        logger.warning("warning: %s %s: here the recorded one counts", folder / where, what)
    if name is None and found is not None:
        logger.warning("warning: the chat template of %s is not known here: it is carried along, not used", folder)
    generation = disk.read_json(folder / GENERATION_FILE, WeightsError)
    eos = generation.get("eos_token_id")
    if not generation:  # Transformers takes it from there then
        eos = disk.read_json(folder / "config.json", WeightsError).get("eos_token_id")
    stops = tuple(id_ for id_ in (eos if isinstance(eos, list) else [eos]) if isinstance(id_, int))
    ours = {"transformers_version", "_from_model_config", *(f"{role}_token_id" for role in CONVENTIONAL)}
    further = {name: value for name, value in generation.items() if name not in ours}
    return Talk(Tokenizer.find(folder), name, None if name else found, stops, further)


def read_template(folder: Path) -> tuple[Jinja | None, str]:
    """Return the chat format of a Transformers folder, if it has one, and the file that it stands in."""
    path = folder / TEMPLATE_FILE
    if not path.is_file():
        return disk.read_json(folder / CONFIG_FILE, WeightsError).get("chat_template"), CONFIG_FILE
    try:
        return path.read_text(encoding="utf-8"), TEMPLATE_FILE  # Transformers 5 writes it here, and it counts more
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"cannot be read: {error}", where=path, do="Copy the file again.") from error


def is_written_by(name: str, template: Jinja) -> bool:
    """Return whether a chat format of a folder is the one of this name."""
    return isinstance(template, str) and name_of(template.removesuffix("\n")) == name  # Jinja takes that off too
