r"""Conversations → ids. The one renderer: training, chat, serving and evaluation give identical ids.

    messages = [Message("user", "hello"), Message("assistant", "Hi.")]
    ids, mask = render(messages, get_template("internlm"), tokenizer)
    # <|bos|> <|user|> hello <|end|> <|assistant|> Hi. <|end|>
    #    0       0       0      0         0         1     1      mask: what the model learns to write

Special tokens are appended by id; every content and every text part of the structure is encoded by itself. So content
cannot become structure, and no token reaches over a border: `render(conversation)` begins with the ids of
`render_prompt(conversation[:-1])`, and an answer is trained on just the ids after which it will be generated.

Limit: with a vocabulary that puts a space before every text (Llama 1 and 2) each part gets one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from internlm.errors import DataError, TokenizerError
from internlm.log import warn_once
from internlm.text.templates import EndOfText, Part, Special, Template
from internlm.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Message:
    """What one party of a conversation says."""

    role: str
    """system, user or assistant."""
    content: str
    name: str | None = None
    """Who says it; no format writes it yet."""


Conversation = Sequence[Message]


def render(messages: Conversation, template: Template, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return the ids of a whole conversation and, for each, whether the model is trained to produce it.

    Trained are the content of every assistant message and its suffix up to the last special token.

    Raises:
        DataError: the messages are not [system], user, assistant, user, assistant …, or the last is no assistant
            message, or an assistant message is empty (the model would learn to say nothing).
        TokenizerError: the tokenizer lacks a special token of the template.
    """
    _check(messages, template)
    if messages[-1].role != "assistant":
        raise DataError(
            "a conversation to train on ends with an assistant message", where=f"message {len(messages)}",
            got=messages[-1].role, do="Drop the question without an answer.",
        )  # fmt: skip
    for number, message in enumerate(messages, 1):
        if message.role == "assistant" and not message.content:
            raise DataError("an assistant message is empty", where=f"message {number}", do="Drop the conversation.")
    ids = _opening(messages, template, tokenizer)
    mask = [False] * len(ids)
    for message in _turns(messages):
        for piece, trained in _pieces(message, template, tokenizer):
            ids += piece
            mask += [trained] * len(piece)
    return ids, mask


def render_prompt(messages: Conversation, template: Template, tokenizer: Tokenizer) -> list[int]:
    """Return the ids after which the model writes the next answer; the last message is the user's.

    Raises:
        DataError: the messages are not [system], user, assistant, …, user.
        TokenizerError: the tokenizer lacks a special token of the template.
    """
    _check(messages, template)
    if messages[-1].role != "user":
        raise DataError(
            "a prompt ends with a user message", where=f"message {len(messages)}", got=messages[-1].role,
            do="Take off the answer, or add the next question.",
        )  # fmt: skip
    ids = _opening(messages, template, tokenizer)
    for message in _turns(messages):
        for piece, _ in _pieces(message, template, tokenizer):
            ids += piece
    return ids + _flat(template.assistant.prefix, tokenizer)


def stop_ids(template: Template, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end an answer: eos, where there is one, and the stops of the template."""
    ids = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids += [tokenizer.special(name) for name in template.stops]
    return list(dict.fromkeys(ids))


def _check(messages: Conversation, template: Template) -> None:
    """Raise DataError unless the roles come in the order that the template can write."""
    if not messages:
        raise DataError("the conversation is empty")
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if message.role not in template.roles:
            problem = f"template {template.name} has no such role"
            raise DataError(problem, where=where, got=message.role, allowed=template.roles)
        if not isinstance(message.content, str):
            raise DataError("the content is not a text", where=where, got=message.content)
        if message.role == "system" and number > 1:
            raise DataError("a system message can only be the first", where=where)
        if message.name is not None:
            warn_once(logger, f"template {template.name} does not write names: {message.name!r} has no effect")
    offset = len(messages) - len(_turns(messages)) + 1
    for index, message in enumerate(_turns(messages)):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            problem = "user and assistant must take turns, the user first"
            raise DataError(problem, where=f"message {offset + index}", got=message.role, allowed=[expected])
    if not _turns(messages):
        raise DataError("the conversation has a system message only", do="Add a user message.")
    if template.single_turn and len(_turns(messages)) > 2:
        raise DataError(
            f"template {template.name} has one question and one answer", got=f"{len(_turns(messages))} messages",
            do="Split the conversation, or choose another template.",
        )  # fmt: skip


def _turns(messages: Conversation) -> Conversation:
    return messages[1:] if messages[0].role == "system" else messages


def _opening(messages: Conversation, template: Template, tokenizer: Tokenizer) -> list[int]:
    """Return bos and the system message, the conversation's own or the default one."""
    ids: list[int] = []
    if template.bos:
        if tokenizer.bos_id is None:
            problem = f"has no bos token, with which template {template.name} begins"
            raise TokenizerError(problem, where=tokenizer.path or "tokenizer", do="Choose another template.")
        ids.append(tokenizer.bos_id)
    content = messages[0].content if messages[0].role == "system" else template.default_system
    if template.system is not None and content:
        ids += _flat(template.system.prefix, tokenizer) + tokenizer.encode(content)
        ids += _flat(template.system.suffix, tokenizer)
    return ids


def _pieces(message: Message, template: Template, tokenizer: Tokenizer) -> Iterable[tuple[list[int], bool]]:
    """Yield the ids of prefix, content and suffix of a message, each with whether it is trained."""
    is_answer = message.role == "assistant"
    prefix, suffix = template.assistant if is_answer else template.user
    yield _flat(prefix, tokenizer), False
    yield tokenizer.encode(message.content), is_answer
    end = max((index + 1 for index, part in enumerate(suffix) if not isinstance(part, str)), default=0)
    yield _flat(suffix[:end], tokenizer), is_answer
    yield _flat(suffix[end:], tokenizer), False


def _flat(parts: Iterable[Part], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of parts of the structure, each encoded by itself."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, Special):
            ids.append(tokenizer.special(part.name))
        elif isinstance(part, EndOfText):
            if tokenizer.eos_id is None:
                raise TokenizerError("has no eos token, which ends an answer", where=tokenizer.path or "tokenizer")
            ids.append(tokenizer.eos_id)
        else:
            ids += tokenizer.encode(part)
    return ids
