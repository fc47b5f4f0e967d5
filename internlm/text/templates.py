r"""Chat formats as data: what stands around the messages of each role.

`chat.render` makes ids of them; `jinja` writes a Jinja template for other libraries, `tool_jinja` one with tools.

    internlm-v1.1:  bos <|System|>:…\n <|User|>:hello\n <|Bot|>:Hi.<eoa>\n
                                                                ^^^^^^^^  trained

Other libraries make of `jinja(template)` the same text, and the same ids of every prompt whose answers so far do not
begin with something that joins a token with what stands before (a line break after `<|Bot|>:`; white space in chatml,
internlm2, llama3, alpaca; nothing in `internlm`). There content that holds the name of a special token becomes
structure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from internlm.errors import ConfigError


@dataclass(frozen=True)
class Special:
    """A special token, by its written form."""

    name: str


@dataclass(frozen=True)
class EndOfText:
    """The tokenizer's own eos, whatever its name."""


Part = str | Special | EndOfText


class Frame(NamedTuple):
    """What stands before and after the content of a message."""

    prefix: tuple[Part, ...]
    suffix: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat format."""

    name: str
    user: Frame
    assistant: Frame
    """The loss covers content and suffix up to the last special token of the suffix."""
    system: Frame | None = None
    """None: the format has no place for a system message."""
    bos: bool = True
    """Whether a conversation begins with the tokenizer's bos."""
    default_system: str | None = None
    """The system message of conversations without one. An empty one leaves the frame out."""
    stops: tuple[str, ...] = ()
    """Special tokens that end an answer, beside eos."""
    single_turn: bool = False
    """Whether it has one question and one answer only."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles a conversation may have."""
        return ("user", "assistant") if self.system is None else ("system", "user", "assistant")


INTERNLM_SYSTEM = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as English "
    "and 中文."
)
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_EOA, _END = Special("<eoa>"), Special("<|end|>")


def _chatml(role: str) -> Frame:
    return Frame((Special("<|im_start|>"), f"{role}\n"), (Special("<|im_end|>"), "\n"))


def _llama3(role: str) -> Frame:
    return Frame((Special("<|start_header_id|>"), role, Special("<|end_header_id|>"), "\n\n"), (Special("<|eot_id|>"),))


_INTERNLM2 = Template(
    name="internlm2",
    system=_chatml("system"),
    user=_chatml("user"),
    assistant=_chatml("assistant"),
    stops=("<|im_end|>",),
)
_ALL = (
    Template(
        name="internlm",
        system=Frame((Special("<|system|>"),), (_END,)),
        user=Frame((Special("<|user|>"),), (_END,)),
        assistant=Frame((Special("<|assistant|>"),), (_END,)),
        stops=("<|end|>",),
    ),
    # The first chat model (July 2023): no system message. Later data tools kept its <eoh>.
    Template(
        name="internlm-v1.0",
        user=Frame(("<|User|>:",), (Special("<eoh>"), "\n")),
        assistant=Frame(("<|Bot|>:",), (_EOA, "\n")),
        stops=("<eoa>",),
    ),
    # chat-7B-8k, chat-7B-v1.1, chat-20B: a system message, no <eoh>.
    Template(
        name="internlm-v1.1",
        system=Frame(("<|System|>:",), ("\n",)),
        user=Frame(("<|User|>:",), ("\n",)),
        assistant=Frame(("<|Bot|>:",), (_EOA, "\n")),
        default_system=INTERNLM_SYSTEM,
        stops=("<eoa>",),
    ),
    _INTERNLM2,
    replace(_INTERNLM2, name="chatml", bos=False),  # for vocabularies without bos (Qwen)
    Template(
        name="llama3",
        system=_llama3("system"),
        user=_llama3("user"),
        assistant=_llama3("assistant"),
        stops=("<|eot_id|>",),
    ),
    # Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca; an input belongs to the instruction's content.
    Template(
        name="alpaca",
        system=Frame((), ("\n\n",)),
        user=Frame(("### Instruction:\n",), ("\n\n",)),
        assistant=Frame(("### Response:\n",), (EndOfText(),)),
        default_system=ALPACA_SYSTEM,
        single_turn=True,
    ),
)
TEMPLATES: dict[str, Template] = {template.name: template for template in _ALL}


def get_template(name: str) -> Template:
    """Return the chat format of this name; raise ConfigError where there is none."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    raise ConfigError("no such chat template", got=name, allowed=TEMPLATES)


def jinja(template: Template, tools: str = "") -> str:
    """Return the format as a Jinja chat template.

    It renders the text whose ids `chat.render` gives, bos included (so the tokenizer must add none), and with
    `add_generation_prompt` that of `chat.render_prompt`. `tools`: Jinja that writes tools and calls out into
    `messages`, from `tool_jinja`; one that is `written` has its frame in its content.
    """

    def framed(frame: Frame, message: str, content: str) -> str:
        usual = _written(frame.prefix) + "{{ " + content + " }}" + _written(frame.suffix)
        if not tools:
            return usual
        return "{% if " + message + "['written'] %}{{ " + content + " }}{% else %}" + usual + "{% endif %}"

    refused = refusal(template)
    system = tools + "{% set turns = messages %}"
    if template.system is not None:
        system += (
            "{% set system = " + json_text(template.default_system or "") + " %}"
            "{% if messages and messages[0]['role'] == 'system' %}"
            "{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}{% endif %}"
            "{% if system %}" + framed(template.system, "messages[0]", "system") + "{% endif %}"
        )
    if template.single_turn:
        system += "{% if turns | length > 2 %}" + refused + "{% endif %}"
    turns = (
        "{% for message in turns %}"
        "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}" + refused + "{% endif %}"
        "{% if message['role'] == 'user' %}" + framed(template.user, "message", "message['content']") + "{% else %}"
        + framed(template.assistant, "message", "message['content']") + "{% endif %}{% endfor %}"
    )  # fmt: skip
    prompt = "{% if add_generation_prompt %}" + _written(template.assistant.prefix) + "{% endif %}"
    return ("{{ bos_token }}" if template.bos else "") + system + turns + prompt


def text_of(parts: Iterable[Part]) -> str:
    """Return parts as one text, without the end of text."""
    return "".join(part if isinstance(part, str) else getattr(part, "name", "") for part in parts)


def json_text(value: object) -> str:
    """Return JSON on one line, as it is written into texts; Jinja writes texts so too."""
    return json.dumps(value, ensure_ascii=False)


def refusal(template: Template) -> str:
    """Return Jinja that raises: the format cannot write messages in this order."""
    order = "user and assistant in turn" if template.system is None else "an optional system, then user and assistant"
    order += ", once" if template.single_turn else ""
    return raising(f"{template.name}: the messages must be {order}")


def raising(problem: str) -> str:
    """Return Jinja that raises."""
    return "{{ raise_exception(" + json_text(problem) + ") }}"


def _written(parts: tuple[Part, ...]) -> str:
    """Return parts as Jinja expressions: bare text would lose line breaks."""
    texts = ["eos_token" if isinstance(part, EndOfText) else json_text(text_of([part])) for part in parts]
    return "".join("{{ " + text + " }}" for text in texts)
