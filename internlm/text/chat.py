r"""Conversations → ids. The one renderer: training, chat, serving and evaluation give identical ids.

    messages = [Message("user", "hello"), Message("assistant", "Hi.")]
    ids, mask = render(messages, get_template("internlm"), tokenizer)
    # <|bos|> <|user|> hello <|end|> <|assistant|> Hi. <|end|>
    #    0       0       0      0         0         1     1      mask: what the model learns to write

Special tokens are appended by id; the text between two of them is encoded as one string, as every program does that
renders the Jinja template of an export. Encoding gives no special token, so content cannot become one. No token reaches
over the beginning of an answer, so that it is trained on just the ids after which it will be generated, those of
`render_prompt(conversation[:-1])`.

Calls of tools and their results are written out by a format of `tools` first.

With a vocabulary that puts a space before every text each stretch of text gets one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from internlm.errors import DataError, TokenizerError
from internlm.log import warn_once
from internlm.text.templates import Frame, Part, Special, Template
from internlm.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")
"""Of messages; a template may know fewer."""


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model wants run."""

    id: str
    """By which the result names the call it belongs to."""
    name: str
    arguments: str
    """A JSON object, as the model wrote it."""


@dataclass(frozen=True)
class Message:
    """What one party of a conversation says."""

    role: str
    """One of ROLES; tool: the result of a call."""
    content: str
    name: str | None = None
    """Who says it; no format writes it yet."""
    calls: tuple[ToolCall, ...] = ()
    """Calls that an assistant message ends with."""
    call_id: str | None = None
    """Which call a tool's result belongs to."""
    thought: str = ""
    """What an assistant said to itself before; of the tool formats react alone writes it."""
    parts: tuple[Part, ...] = ()
    """The content with its special tokens, where a tool format wrote it out."""
    frame: Frame | None = None
    """What stands around it then, instead of the template's."""


Conversation = Sequence[Message]


def render(messages: Conversation, template: Template, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return the ids of a whole conversation and, for each, whether the model is trained to produce it.

    Trained are the content of every assistant message and its suffix up to the last special token.

    Raises:
        DataError: the messages are not [system], user, assistant, …, assistant, or one of the assistant is empty (the
            model would learn to say nothing).
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
    writer = _Writer(tokenizer)
    writer.conversation(messages, template)
    return writer.ids, writer.mask


def render_prompt(
    messages: Conversation, template: Template, tokenizer: Tokenizer, begin: Sequence[Part] = ()
) -> list[int]:
    """Return the ids after which the model writes the next answer, which begins with `begin`.

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
    writer = _Writer(tokenizer)
    writer.conversation(messages, template, begin)
    return writer.ids


def stop_ids(template: Template, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end an answer: eos, where there is one, and the stops of the template."""
    ids = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids += map(tokenizer.special, template.stops)
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
        if message.calls:
            raise DataError(
                "the calls of a message are not written out", where=where, got=message.calls[0].name,
                do="Render the conversation with a format of internlm.text.tools first.",
            )  # fmt: skip
        if message.name is not None:
            warn_once(logger, f"template {template.name} does not write names: {message.name!r} has no effect")
    check_turns(messages)
    turns = _turns(messages)
    if not turns:
        raise DataError("the conversation has a system message only", do="Add a user message.")
    if template.single_turn and len(turns) > 2:
        raise DataError(
            f"template {template.name} has one question and one answer", got=f"{len(turns)} messages",
            do="Split the conversation, or choose another template.",
        )  # fmt: skip


def check_turns(messages: Conversation) -> None:
    """Raise DataError unless user and assistant take turns; results of tools may come between."""
    expected = "user"
    for number, message in enumerate(messages, 1):
        if message.role == "system" and number > 1:
            raise DataError("a system message can only be the first", where=f"message {number}")
        if message.role in ("user", "assistant"):
            if message.role != expected:
                problem = "user and assistant must take turns, the user first"
                raise DataError(problem, where=f"message {number}", got=message.role, allowed=[expected])
            expected = "assistant" if message.role == "user" else "user"
        elif message.role == "tool":
            expected = "assistant"


def _turns(messages: Conversation) -> Conversation:
    return messages[1:] if messages[0].role == "system" else messages


def framed(message: Message, usual: Frame) -> tuple[Part, ...]:
    """Return the parts of a message in its own frame, or in the usual one."""
    frame = message.frame or usual
    return (*frame.prefix, *_content(message), *frame.suffix)


def _content(message: Message) -> tuple[Part, ...]:
    return message.parts or (message.content,)


class _Writer:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.mask: list[bool] = []
        self._text = ""

    def conversation(self, messages: Conversation, template: Template, begin: Sequence[Part] | None = None) -> None:
        """Write messages that have been checked, and `begin` as the beginning of an answer that follows."""
        if template.bos:
            self._role("bos", self.tokenizer.bos_id)
        first = messages[0] if messages[0].role == "system" else Message("system", template.default_system or "")
        if template.system is not None and first.content:
            self._parts(framed(first, template.system))
        for message in _turns(messages):
            if message.role == "user":
                self._parts(framed(message, template.user))
                continue
            suffix = template.assistant.suffix
            end = max((index + 1 for index, part in enumerate(suffix) if not isinstance(part, str)), default=0)
            self._parts(template.assistant.prefix)
            self._cut()
            self._parts((*_content(message), *suffix[:end]))
            self._cut(trained=True)
            self._parts(suffix[end:])
        if begin is not None:
            self._parts(template.assistant.prefix)
            self._cut()
            self._parts(begin)
        self._cut()

    def _parts(self, parts: Iterable[Part]) -> None:
        for part in parts:
            if isinstance(part, str):
                self._text += part
            elif isinstance(part, Special):
                self._id(self.tokenizer.special(part.name))
            else:
                self._role("eos", self.tokenizer.eos_id)

    def _role(self, role: str, id_: int | None) -> None:
        if id_ is None:
            problem = f"has no {role} token, which the template needs"
            raise TokenizerError(problem, where=self.tokenizer.path or "tokenizer", do="Choose another template.")
        self._id(id_)

    def _id(self, id_: int) -> None:
        self._flush()
        self.ids.append(id_)

    def _flush(self) -> None:
        if self._text:
            self.ids += self.tokenizer.encode(self._text)
            self._text = ""

    def _cut(self, *, trained: bool = False) -> None:
        """End the text here, and say whether the model learns what came since the last cut."""
        self._flush()
        self.mask += [trained] * (len(self.ids) - len(self.mask))
