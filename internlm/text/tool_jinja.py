r"""The chat format of an export, tools included, as a Jinja template: `internlm.text.tools`, once more.

    chat_template(get_template("chatml"), tokenizer)      # for `chat_template` of tokenizer_config.json
    name_of(text)                                         # chatml

The template writes tools, calls and results out as messages of system, user and assistant first, as a format's
`render` does, and then all as `templates.jinja` does. It takes what OpenAI's clients send: `tools`, `tool_calls` whose
arguments are a text or an object, results with `tool_call_id` in any order, and `parallel_tool_calls=False` where a
program passes it on. Its ids are those of `render_prompt`, within the limits that `templates` names.

Limits: whether arguments are a JSON object, and names are names, is not checked. What `ToolFormat.render_history`
takes beside is refused. `tojson` is to write JSON as Transformers has it: with Python's separators, letters as they
are, keys in their order.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from internlm.text.templates import TEMPLATES, Template, jinja, json_text, raising, refusal, text_of
from internlm.text.tokenizer import Tokenizer
from internlm.text.tool_formats import format_of
from internlm.text.tools import Tool

_MESSAGES = r"""
{% set begun = 1 if messages and messages[0]['role'] == 'system' else 0 %}
{% set own = messages[0]['content'] if begun else '' %}
{% set turns = messages[begun:] %}
{% set made = namespace(messages=messages[:begun], skip=0, text='', names=[], results=[], named=false) %}
{% if tools %}
    {% for tool in tools %}
        {% set function = tool['function'] if tool['function'] else tool %}
        {% set parameters = function['parameters'] | tojson if function['parameters'] is mapping else NOTHING %}
        {% set described = '{"name": ' ~ function['name'] | tojson
            ~ ', "description": ' ~ (function['description'] or '') | tojson ~ ', "parameters": ' ~ parameters ~ '}' %}
        {% set made.names = made.names + [function['name']] %}
        EACH_TOOL
    {% endfor %}
    {% set made.messages = [SYSTEM] %}
{% endif %}
{% for message in turns %}
    {% set said = message['content'] or '' %}
    {% set thought = message['reasoning_content'] or '' %}
    {% if made.skip > 0 %}
        {% set made.skip = made.skip - 1 %}
    {% elif message['role'] == 'tool' %}
        NO_RESULT
    {% elif not message['tool_calls'] %}
        {% if tools and said and message['role'] == 'assistant' %}{% set said = ANSWER %}{% endif %}
        {% set made.messages = made.messages + [{'role': message['role'], 'content': said}] %}
    {% elif message['role'] != 'assistant' %}
        NO_CALL
    {% else %}
        {% set calls = message['tool_calls'] %}
        {% set following = turns[loop.index:loop.index + calls | length] %}
        {% set made.skip = following | length %}
        {% set made.results = [] %}
        {% set made.named = false %}
        {% for result in following %}
            {% if result['role'] != 'tool' %}NO_RESULT{% endif %}
            {% if result['tool_call_id'] %}{% set made.named = true %}{% endif %}
        {% endfor %}
        {% for call in calls if following %}
            {% set place = loop.index0 %}
            {% for result in following %}
                {% if (result['tool_call_id'] == call['id'] if made.named else loop.index0 == place) %}
                    {% set made.results = made.results + [result['content']] %}
                {% endif %}
            {% endfor %}
            {% if made.results | length != loop.index or following | length != calls | length %}NO_RESULT{% endif %}
        {% endfor %}
        {% set made.text = BEGINNING %}
        {% for call in calls %}
            {% set function = call['function'] if call['function'] else call %}
            {% set arguments = function['arguments'] %}
            {% set arguments = arguments | trim if arguments is string else arguments | tojson %}
            EACH_CALL
        {% endfor %}
        CALLED
    {% endif %}
{% endfor %}
{% set messages = made.messages %}
"""
"""Messages as clients send them → those of system, user and assistant; one that is `written` needs no frame."""

_FOLDED = r"""
{% if tools and messages | length > 1 and messages[1]['role'] == 'user' %}
    {% set first = messages[0]['content'] ~ '\n\n' ~ messages[1]['content'] %}
    {% set messages = [{'role': 'user', 'content': first}] + messages[2:] %}
{% endif %}
"""
"""As `tools._folded`: for templates without a place for a system message."""


class _Format(NamedTuple):
    """How a tool format fills the gaps of `_MESSAGES`; `words` are its own, `frame` is that of a result."""

    each_tool: str
    system: str
    """The message that tells of the tools."""
    each_call: str
    called: str
    """What comes after the last call."""
    answer: str = "said"
    """The content of an assistant message without calls."""
    beginning: str = "said"
    """What calls are added to."""


_HERMES = _Format(
    each_tool=r"""
        {% set described = '{"type": "function", "function": ' ~ described ~ '}' %}
        {% set made.text = made.text ~ ('\n' if made.text else '') ~ described %}
    """,
    system=r"""
        {'role': 'system', 'content': (own ~ '\n\n' if own else '') ~ words[0] ~ made.text ~ words[1]
            ~ (words[3] if parallel_tool_calls is defined and parallel_tool_calls == false else words[2])}
    """,
    each_call=r"""
        {% set made.text = made.text ~ ('\n' if made.text else '') ~ '<tool_call>\n{"name": '
            ~ function['name'] | tojson ~ ', "arguments": ' ~ arguments ~ '}\n</tool_call>' %}
    """,
    called=r"""
        {% set made.messages = made.messages + [{'role': 'assistant', 'content': made.text}] %}
        {% set made.text = '' %}
        {% for result in made.results %}
            {% set made.text = made.text ~ ('\n' if made.text else '')
                ~ '<tool_response>\n' ~ result ~ '\n</tool_response>' %}
        {% endfor %}
        {% if made.results %}
            {% set made.messages = made.messages + [{'role': 'user', 'content': made.text}] %}
        {% endif %}
    """,
)
_INTERNLM2 = _Format(
    each_tool=r"{% set made.text = made.text ~ (', ' if made.text else '') ~ described %}",
    system=r"""
        {'role': 'system', 'written': true, 'content':
            ('<|im_start|>system\n' ~ own ~ '<|im_end|>\n' if own else '')
            ~ '<|im_start|>system name=<|plugin|>\n[' ~ made.text ~ ']<|im_end|>\n'}
    """,
    each_call=r"""
        {% set made.text = made.text ~ '<|action_start|><|plugin|>\n{"name": '
            ~ function['name'] | tojson ~ ', "parameters": ' ~ arguments ~ '}<|action_end|>' %}
    """,
    called=r"""
        {% set made.messages = made.messages + [{'role': 'assistant', 'content': made.text}] %}
        {% set made.text = '' %}
        {% for result in made.results %}
            {% set made.text = made.text ~ '<|im_start|>environment name=<|plugin|>\n' ~ result ~ '<|im_end|>\n' %}
        {% endfor %}
        {% if made.results %}
            {% set made.messages = made.messages + [{'role': 'user', 'content': made.text, 'written': true}] %}
        {% endif %}
    """,
)
_REACT = _Format(
    each_tool=r"{% set made.text = made.text ~ ('\n' if made.text else '') ~ described %}",
    system=r"""
        {'role': 'system', 'content': (own ~ '\n\n' if own else '')
            ~ words[0] ~ made.text ~ words[1] ~ made.names | join(', ') ~ words[2]}
    """,
    answer=r"('Thought:' ~ thought ~ '\n' if thought else '') ~ 'FinalAnswer:' ~ said",
    beginning=r"'Thought:' ~ thought ~ ('\n' if thought and said else '') ~ said ~ '\n' if thought or said else ''",
    each_call=r"""
        {% if calls | length > 1 and not made.results %}NO_CALL{% endif %}
        {% set made.text = made.text ~ 'Action:' ~ function['name'] ~ '\nActionInput:' ~ arguments %}
        {% set made.messages = made.messages + [{'role': 'assistant', 'content': made.text}] %}
        {% if made.results %}
            {% set made.text = frame[0] ~ 'Response:' ~ made.results[loop.index0] ~ '\n' ~ frame[1] %}
            {% set made.messages = made.messages + [{'role': 'user', 'content': made.text, 'written': true}] %}
        {% endif %}
        {% set made.text = '' %}
    """,
    called="",
)
_REFUSED = "{% if tools %}"
_FORMATS = {"hermes": _HERMES, "internlm2": _INTERNLM2, "react": _REACT}


def chat_template(template: Template, tokenizer: Tokenizer | None = None) -> str:
    """Return a chat format as Jinja with tools, which it refuses where the tokenizer lacks a token."""
    specials = format_of(template.name).specials
    if tokenizer is not None and not tokenizer.special_tokens.keys() >= set(specials):
        return _without_tools(template)
    return jinja(template, _writer(template))


def name_of(text: str) -> str | None:
    """Return the name of the chat format that was written so, with tools or without, if any."""
    for name, template in TEMPLATES.items():
        if text in (chat_template(template), _without_tools(template), jinja(template)):
            return name
    return None


def refuses_tools(text: str) -> bool:
    """Return whether `chat_template` wrote a format that refuses tools."""
    return text.startswith(_REFUSED)


def _without_tools(template: Template) -> str:
    needed = " ".join(format_of(template.name).specials)
    problem = f"{template.name}: this tokenizer lacks a special token that tools need: {needed}"
    return _REFUSED + raising(problem) + "{% endif %}" + jinja(template)


def _writer(template: Template) -> str:
    """Return Jinja that writes tools, calls and results out, and says nothing itself."""
    format_ = format_of(template.name)
    gaps = _FORMATS[format_.name]
    text = _MESSAGES
    for name, gap in gaps._asdict().items():
        text = text.replace(name.upper(), gap)
    text += _FOLDED if template.system is None else ""
    text = text.replace("NO_RESULT", raising(f"{template.name}: each call needs one result, right after it"))
    text = text.replace("NO_CALL", refusal(template))
    text = text.replace("NOTHING", json_text(json.dumps(Tool("a").parameters)))
    frame = template.system or template.user
    ends = ", ".join(json_text(text_of(parts)) for parts in frame)
    words = ", ".join(map(json_text, format_.words))
    given = f"{{% set words = [{words}] %}}{{% set frame = [{ends}] %}}"
    return given + "".join(line.strip() for line in text.splitlines())
