"""The Jinja template of an export, as transformers runs it, beside our own rendering."""

import copy
import json
import re

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from internlm.errors import InternLMError
from internlm.text.chat import Message, ToolCall, render, render_prompt
from internlm.text.templates import TEMPLATES, get_template, jinja
from internlm.text.tool_formats import format_of
from internlm.text.tool_jinja import chat_template, name_of
from internlm.text.tools import Tool
from internlm.text.training import train_bpe

transformers = pytest.importorskip("transformers")

many = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = ["<s>", "</s>", "<eoh>", "<eoa>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>"]
NAMES += ["<|end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
NAMES += ["<|action_start|>", "<|action_end|>", "<|plugin|>"]
SPECIAL = "|".join(map(re.escape, NAMES)) + r"|<\|"
HOSTILE = [
    "{{ bos_token }}", "{% raw %}", "</tool_call>\n<tool_call>", "</tools>", '"}}', "\\", "\\n", "<&>'\"", "上海 🙂",
    "\u2028\x85\t", "Action:add\nActionInput:{}", "None", "{# x #}",
]  # fmt: skip
SEVERAL = [name for name in TEMPLATES if name != "alpaca"]


@pytest.fixture(scope="module")
def tokenizer(sources):
    """A byte-level tokenizer with the special tokens of every template and tool format."""
    return train_bpe(sources, 700, NAMES)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """Return a function from the name of a template to transformers' tokenizer of an export."""
    path = tmp_path_factory.mktemp("export") / "tokenizer.json"
    tokenizer.write_tokenizer_json(path)
    names = {key: value for key, value in tokenizer.config().items() if key.endswith("_token") and value}

    base = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), **names)

    def load(template):
        made = copy.copy(base)
        made.chat_template = chat_template(get_template(template), tokenizer)
        return made

    return load


def _apart(name):
    return f"< {name[0][1:]}"


characters = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
# Names of special tokens become structure in other libraries, and a begun answer joins white space with its header.
# Hypothesis draws from the literals of this file too: the names would come.
contents = (st.sampled_from(HOSTILE) | characters).map(lambda text: "x" + re.sub(SPECIAL, _apart, text))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | contents,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(contents, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(contents, values, max_size=3)
tools = st.builds(Tool.of, st.sampled_from(["add", "get.weather"]), st.none() | contents, st.none() | objects)


@st.composite
def talks(draw, most_calls):
    """Draw (tools, messages as clients send them, the same in our words); the last is an answer or a result."""
    given = draw(st.lists(tools, max_size=2, unique_by=lambda tool: tool.name))
    sent, ours = [], []

    def say(message, **keys):
        sent.append({"role": message.role, "content": message.content, **keys})
        ours.append(message)

    if draw(st.booleans()):
        say(Message("system", draw(contents | st.just(""))))
    for turn in range(draw(st.integers(1, 3))):
        say(Message("user", draw(contents)))
        for step in range(draw(st.integers(0, 2))):
            number = draw(st.integers(1, most_calls))
            ids = [f"{turn}.{step}.{n}" for n in range(number)]
            arguments = [draw(objects) for _ in ids]
            texts = [json.dumps(value, ensure_ascii=False) for value in arguments]
            is_text = draw(st.booleans())
            if is_text and draw(st.booleans()):
                texts = [json.dumps(value, indent=1) for value in arguments]
            calls = tuple(ToolCall(id_, "add", text) for id_, text in zip(ids, texts, strict=True))
            content, thought = draw(contents | st.just("")), draw(contents | st.just(""))
            written = [
                {"id": id_, "type": "function", "function": {"name": "add", "arguments": text if is_text else value}}
                for id_, text, value in zip(ids, texts, arguments, strict=True)
            ]
            extra = {"reasoning_content": thought} if thought else {}
            say(Message("assistant", content, calls=calls, thought=thought), tool_calls=written, **extra)
            if not content:
                sent[-1]["content"] = None
            named = draw(st.booleans())
            for id_ in draw(st.permutations(ids)) if named else ids:
                keys = {"tool_call_id": id_} if named else {}
                say(Message("tool", draw(contents), call_id=id_ if named else None), **keys)
        say(Message("assistant", draw(contents)))
    while draw(st.booleans()) and ours[-1].role != "tool" and any(message.role == "tool" for message in ours):
        del sent[-1], ours[-1]
    return given, sent, ours


def described(tool):
    function = {"name": tool.name, "description": tool.description or None, "parameters": tool.parameters}
    return {"type": "function", "function": function}


@pytest.mark.parametrize("name", SEVERAL)
@many
@given(data=st.data())
def test_transformers_renders_tools_calls_and_results_as_we_do(exported, tokenizer, name, data):
    template, format = get_template(name), format_of(name)
    given, sent, ours = data.draw(talks(3))
    assume(format.name != "react" or len(ours[-1].calls) < 2)
    if template.system is None and not given and ours[0].role == "system":
        del sent[0], ours[0]
    written = format.render(ours, given)
    theirs, described_tools = exported(name), [described(tool) for tool in given] or None
    options = {"tools": described_tools, "return_dict": False}
    if ours[-1].role == "assistant":
        wanted = render(written, template, tokenizer)[0]
    else:
        options["add_generation_prompt"] = True
        wanted = render_prompt(written, template, tokenizer)
    assert theirs.apply_chat_template(sent, tokenize=False, **options) == tokenizer.decode(wanted)
    assert theirs.apply_chat_template(sent, tokenize=True, **options) == wanted


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_that_is_calls_and_one_call_at_most_are_rendered_as_we_do(exported, tokenizer, name):
    template, format = get_template(name), format_of(name)
    calls = tuple(ToolCall("", "add", '{"a":1}') for _ in range(1 if format.name == "react" else 2))
    ours = [Message("user", "Well?"), Message("assistant", "", calls=calls)]
    sent = [{"role": "user", "content": "Well?"}]
    sent.append(
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a":1}'}}] * len(calls)}
    )
    tool = Tool.of("add")
    for parallel in (True, False):
        wanted = render(format.render(ours, [tool], parallel), template, tokenizer)[0]
        options = {"tools": [{"name": "add"}], "return_dict": False, "parallel_tool_calls": parallel}
        assert exported(name).apply_chat_template(sent, **options) == wanted


@pytest.mark.parametrize("name", TEMPLATES)
def test_without_tools_and_calls_the_template_says_what_the_plain_one_says(exported, name):
    theirs = exported(name)
    plain = exported(name)
    plain.chat_template = jinja(get_template(name))
    talk = [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "\tb"}]
    for messages in (talk, talk[:1], [{"role": "system", "content": "c"}, *talk]):
        if messages[0]["role"] == "system" and get_template(name).system is None:
            continue
        for prompt in (True, False):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            assert theirs.apply_chat_template(messages, **options) == plain.apply_chat_template(messages, **options)


def call(id_=None):
    return {"id": id_, "type": "function", "function": {"name": "add", "arguments": "{}"}}


def called(*ids):
    return {"role": "assistant", "content": "", "tool_calls": [call(id_) for id_ in ids]}


USER, RESULT = {"role": "user", "content": "x"}, {"role": "tool", "content": "x"}
FIRST = {**RESULT, "tool_call_id": "1"}


@pytest.mark.parametrize(
    "turns",
    [
        [USER, RESULT],
        [USER, called("1"), USER],
        [USER, called("1", "2"), FIRST],
        [USER, called("1", "2"), FIRST, FIRST],
        [USER, called("1", "1"), FIRST, FIRST],
        [USER, called("2"), FIRST],
        [USER, called(None), RESULT, RESULT],
        [USER, called(None), RESULT, USER],
        [{**USER, "tool_calls": [call()]}],
        [USER, USER],
    ],
)
@pytest.mark.parametrize("name", SEVERAL)
def test_what_we_refuse_is_refused(exported, tokenizer, name, turns):
    ours = []
    for turn in turns:
        calls = tuple(ToolCall(made["id"] or "", "add", "{}") for made in turn.get("tool_calls", ()))
        ours.append(Message(turn["role"], turn["content"], calls=calls, call_id=turn.get("tool_call_id")))
    with pytest.raises(InternLMError):
        render_prompt(format_of(name).render(ours, [Tool.of("add")]), get_template(name), tokenizer)
    with pytest.raises(Exception, match=r"each call needs one result|the messages must be"):
        exported(name).apply_chat_template(turns, tools=[described(Tool.of("add"))], tokenize=False)


def test_a_tokenizer_without_the_tokens_of_the_format_refuses_tools_and_nothing_else(exported, wide):
    theirs = exported("internlm2")
    theirs.chat_template = chat_template(get_template("internlm2"), wide)
    plain = theirs.apply_chat_template([USER], tokenize=False)
    assert plain.endswith("<|im_start|>user\nx<|im_end|>\n")
    with pytest.raises(Exception, match=r"lacks a special token that tools need: .*<\|plugin\|>"):
        theirs.apply_chat_template([USER], tools=[described(Tool.of("add"))], tokenize=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_known_by_its_text_and_so_is_one_from_before_it_knew_tools(name, wide, tokenizer):
    template = get_template(name)
    for text in (chat_template(template), chat_template(template, wide), chat_template(template, tokenizer)):
        assert name_of(text) == name
    assert name_of(jinja(template)) == name
    assert name_of("x" + jinja(template)) is None
