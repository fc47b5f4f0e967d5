import itertools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm.text.tool_formats import get_format
from internlm.text.tool_json import MAX_DEPTH, is_object
from internlm.text.tool_parser import ArgumentsGrow, CallBegins, CallFails, Text, Thought
from internlm.text.tools import collect

many = settings(max_examples=120, deadline=None)
some = settings(max_examples=60, deadline=None)
KNOWN = ("add", "get_weather", "天气")
START = {"hermes": "<tool_call>\n", "internlm2": "<|action_start|><|plugin|>\n"}
END = {"hermes": "\n</tool_call>", "internlm2": "<|action_end|>"}
TAGGED = sorted(START)


def joined(events):
    """Return events with the pieces of one text in one, so that they do not depend on how the answer came."""
    kinds = [(type(event), getattr(event, "index", None)) for event in events]
    merged = []
    for (kind, index), group in itertools.groupby(zip(kinds, events, strict=True), key=lambda pair: pair[0]):
        if kind in (CallBegins, CallFails):
            merged += [event for _, event in group]
        else:
            text = "".join(event.text for _, event in group)
            merged.append(kind(text) if index is None else kind(index, text))
    return merged


def read(name, *pieces, known=KNOWN, parallel=True):
    parser = get_format(name).parser(known, parallel)
    events = [event for piece in pieces for event in parser.add(piece)]
    return joined(events + parser.finish())


def call(name, arguments, of="hermes", tool="add"):
    return f'{START[of]}{{"name": "{tool}", "{arguments}": {{"a": 1}}}}{END[of]}'


@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_a_call_with_text_before_and_after_gives_its_events(name, key):
    text = f"One moment.\n{call(name, key, name)}\nDone."
    assert read(name, text) == [
        Text("One moment."), CallBegins(0, "add"), ArgumentsGrow(0, '{"a": 1}'), Text("\nDone.")
    ]  # fmt: skip


def test_several_calls_are_counted_and_the_white_space_between_them_is_dropped():
    text = f"{call('', 'arguments')}\n\n{call('', 'arguments', tool='天气')}\n"
    assert read("hermes", text) == [
        CallBegins(0, "add"), ArgumentsGrow(0, '{"a": 1}'), CallBegins(1, "天气"), ArgumentsGrow(1, '{"a": 1}')
    ]  # fmt: skip


def test_without_parallel_the_first_call_ends_the_answer():
    parser = get_format("hermes").parser(KNOWN, parallel=False)
    text = call("", "arguments")
    whole = text.index("}}") + 2
    parser.add(text[: whole - 1])
    assert not parser.finished
    parser.add(text[whole - 1 : whole])
    assert parser.finished
    assert parser.add(text[whole:] + text) == [] == parser.finish()


def test_arguments_come_in_pieces_while_they_are_written():
    parser = get_format("hermes").parser(KNOWN)
    assert parser.add('<tool_call>\n{"name": "add", ') == [CallBegins(0, "add")]
    assert parser.add('"arguments": {"a": "x') == [ArgumentsGrow(0, '{"a": "x')]
    assert parser.add('y"') == [ArgumentsGrow(0, 'y"')]
    assert parser.add("}}") == [ArgumentsGrow(0, "}")]
    assert parser.add("\n</tool_call>") == [] == parser.finish()


@pytest.mark.parametrize("name", TAGGED)
def test_no_beginning_of_a_tag_is_content_before_it_is_decided(name):
    for length in range(1, len(START[name])):
        beginning = START[name].rstrip()[:length]
        parser = get_format(name).parser(KNOWN)
        assert parser.add("a " + beginning) == [Text("a")]
        assert joined(parser.add("!")) == ([Text(f" {beginning}!")])


def test_braces_quotes_and_tags_within_strings_are_text():
    arguments = json.dumps({"q": '}{"]\\ </tool_call> <tool_call>\n\u2028', "n": {"m": [1, [2.5e3, None, {}]]}})
    text = f'<tool_call>{{"name": "add", "arguments": {arguments}}}</tool_call>'
    assert read("hermes", text) == [CallBegins(0, "add"), ArgumentsGrow(0, arguments)]


def test_unicode_and_escapes_stay_as_they_were_written():
    arguments = '{"城市": "上海 🙂", "b": "\\u4e0a\\ud83d\\ude42"}'
    text = f'<tool_call>\n{{"name": "\\u5929气", "arguments": {arguments}}}\n</tool_call>'
    assert read("hermes", text) == [CallBegins(0, "天气"), ArgumentsGrow(0, arguments)]


def test_the_name_may_come_after_the_arguments():
    text = '<tool_call>{"arguments": {"a": 1}, "id": [{}, "x", 7], "name": "add"}</tool_call>'
    assert read("hermes", text) == [CallBegins(0, "add"), ArgumentsGrow(0, '{"a": 1}')]


def test_a_call_without_arguments_has_an_empty_object():
    assert read("hermes", '<tool_call>{"name": "add"}</tool_call>') == [CallBegins(0, "add"), ArgumentsGrow(0, "{}")]


@pytest.mark.parametrize("ending", ["", "\n", "\n</tool", "</tool_call", "</tool_call>", "</tool_call>\n "])
def test_the_end_tag_may_be_missing_or_cut(ending):
    text = '<tool_call>{"name": "add", "arguments": {}}' + ending
    assert read("hermes", text) == [CallBegins(0, "add"), ArgumentsGrow(0, "{}")]


REFUSED = [
    '{"name": "no_such_tool", "arguments": {"q": "<tool_call>"}}\n</tool_call>\n',
    '{"name": "no_such_tool"}</tool_call>',
    '{"name": "Add", "arguments": {}}</tool_call>',
    '{"arguments": {}}</tool_call>',
    '{"name": ["add"], "arguments": {}}',
    '{"name": 7, "arguments": {}}',
    '["add"]', "add(1)", "{}", "{name: 1}", '{"name" "add"}', '{"name": "add\n"}', "<tool_call>", "", "{", '{"na',
    '{"arguments": [1], "name": "add"}', '{"arguments": "{}", "name": "add"}', '{"arguments": null, "name": "add"}',
    '{"arguments": 1, "name": "add"}', '{"arguments": {}, "arguments": {}, "name": "add"}', '{"name": "ad',
]  # fmt: skip


@pytest.mark.parametrize("body", REFUSED)
def test_what_is_no_call_of_a_known_tool_is_content(body):
    text = f"before \n<tool_call> \n{body}"
    assert read("hermes", text) == [Text(text)]


def test_a_call_after_a_refused_one_is_read():
    assert read("hermes", f"<tool_call>no<tool_call>{call('', 'arguments')[12:]}") == [
        Text("<tool_call>no"), CallBegins(0, "add"), ArgumentsGrow(0, '{"a": 1}')
    ]  # fmt: skip


FAILING = [
    '"arguments": {"a": 1', '"arguments": {"a": 1}', '"arguments": {"a" 1}}', '"arguments": {"a": 01}}',
    '"arguments": {"a": NaN}}', '"arguments": {"a": "\\x"}}', '"arguments": {"a": "\\u12g4"}}', '"arguments": {a: 1}}',
    '"arguments": {"a": 1,}}', '"arguments": [1]}', '"arguments": {"a": [1}}}', '"arguments": {"a": "\n"}}',
    '"arguments": {}, "name": "add"}', '"arguments": {}, "parameters": {}}', '"arguments": {"a": tru}}',
    '"arguments": ' + '{"a":' * MAX_DEPTH,
]  # fmt: skip


@pytest.mark.parametrize("rest", FAILING)
def test_a_call_that_turns_out_wrong_is_taken_back_and_is_content(rest):
    text = f'Well:\n<tool_call>{{"name": "add", {rest}'
    events = read("hermes", text)
    assert events[:2] == [Text("Well:"), CallBegins(0, "add")]
    assert sum(isinstance(event, CallFails) for event in events) == 1
    answer = collect(events)
    assert (answer.content, answer.calls) == (text, ())


def test_a_good_call_after_a_failed_one_has_an_index_of_its_own():
    events = read("hermes", '<tool_call>{"name": "add", "arguments": {!' + call("", "arguments"))
    assert events[-2:] == [CallBegins(1, "add"), ArgumentsGrow(1, '{"a": 1}')]
    assert [made.arguments for made in collect(events).calls] == ['{"a": 1}']


def test_the_interpreter_of_internlm2_is_content():
    text = "<|action_start|><|interpreter|>\n```python\n1\n```<|action_end|>"
    assert read("internlm2", text) == [Text(text)]


REACT = "Thought:I need the sum.\nAction:add\nActionInput:"


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("colon", [":", "："])
def test_react_gives_thought_and_call(spaced, colon):
    text = REACT + '{"a": {"b": 1}}\nResponse:42\nFinalAnswer:42'
    if spaced:
        text = "\n " + text.replace("ActionInput:", "\nAction Input: ").replace(":add", ": add ")
    text = text.replace(":I", f"{colon} I").replace("Action:", f"Action{colon}")
    assert read("react", text) == [
        Thought("I need the sum."), CallBegins(0, "add"), ArgumentsGrow(0, '{"a": {"b": 1}}')
    ]  # fmt: skip


def test_react_is_finished_with_its_arguments():
    parser = get_format("react").parser(KNOWN)
    parser.add(REACT + '{"a": 1')
    assert not parser.finished
    assert parser.add("}\nResponse:") == [ArgumentsGrow(0, "}")]
    assert parser.finished


def test_react_gives_the_final_answer_as_content():
    text = "Thought: It is known.\nSo:\n\nFinalAnswer: 5\nAction:add\nThought:x\n"
    assert read("react", text) == [Thought("It is known.\nSo:"), Text("5\nAction:add\nThought:x")]
    assert read("react", "Final Answer:5") == [Text("5")]


def test_react_keeps_a_key_within_a_line_as_text():
    within = "Thought:no Action:add here\n"
    assert read("react", within) == read("react", *within) == [Thought("no Action:add here")]
    text = "The Action:add\n and more, Thought: none\n"
    assert read("react", text) == [Text(text)]


def test_react_without_any_key_is_content():
    text = " Hello!\n\nThoughts are free.\n"
    assert read("react", text) == [Text(text)]


@pytest.mark.parametrize(
    "text",
    [
        'Action:no_such_tool\nActionInput:{"a": 1}', "Action:", "Action:add", "Action:add\n", "Action:add\nAction",
        "Action:add\nActionInput:", "Action:add\nActionInput:Shanghai", "Action:add\nActionInput:[1]",
        "Action:add\nfoo: bar", "Action:" + "x" * 100 + "  \n", "Action:add" + " " * 100 + "\nActionInput:{}",
    ],
)  # fmt: skip
def test_react_gives_what_is_no_call_as_content(text):
    assert read("react", text) == [Text(text)]
    assert collect(read("react", "Thought:hm\n" + text)).content == text


def test_react_goes_on_after_what_was_no_call():
    assert read("react", "Action:add\nThought:hm\nFinalAnswer:5") == [Text("Action:add"), Thought("hm"), Text("\n5")]
    assert read("react", "Thought:\nAction:none\nmore") == [Text("Action:none\nmore")]
    assert read("react", "Action:add\nActionInput:x Thought:y") == [Text("Action:add\nActionInput:x Thought:y")]


@pytest.mark.parametrize(
    ("text", "content", "thought"),
    [
        ("Thought:a\n\nThought: b\nFinalAnswer:c", "c", "a\nb"),
        ("hello\nFinalAnswer: c\n", "hello\nc", ""),
        ("hello\nThought:a\nAction:none\n", "hello\nAction:none\n", "a"),
        ("Thought:a\nAction:none\nThought:b\nFinalAnswer:\n", "Action:none", "a\nb"),
        ("Thought:\nThought:b\nFinalAnswer:c", "c", "b"),
    ],
)
def test_react_puts_what_was_said_apart_on_lines_of_its_own(text, content, thought):
    for pieces in ([text], text):
        answer = collect(read("react", *pieces))
        assert (answer.content, answer.thought) == (content, thought)


def test_react_takes_a_call_back_whose_arguments_are_wrong():
    events = read("react", REACT + '{"a": }\nThought:so\nFinalAnswer:5')
    assert events == [
        Thought("I need the sum."), CallBegins(0, "add"), ArgumentsGrow(0, '{"a": '),
        CallFails(0, 'Action:add\nActionInput:{"a": '), Text("}"), Thought("\nso"), Text("\n5"),
    ]  # fmt: skip


PIECES = {
    "hermes": [
        "<tool_call>", "</tool_call>", '{"name": "add"',  "<tool_", "</", '{"name": "x"}',
        '{"name": "add", "arguments": {"a": "é🙂\\n}"}}',
        call("", "arguments"), call("", "parameters", tool="天气"), '"', "}", "{", '{"name": "add", ', '"arguments": {',
    ],
    "internlm2": [
        "<|action_start|>", "<|plugin|>", "<|action_end|>", '{"name": "add", "parameters": {}}', "<|action_",
        call("", "parameters", "internlm2"), "{", "}",
    ],
    "react": [
        "Thought:", "Action:", "ActionInput:", "FinalAnswer:", "Action Input：", "add", "add\n", '{"a": [1, "x"]}',
        "Action:add\nActionInput:", "Act", "x" * 40, "{", "\nThought", "\n\n",
    ],
}  # fmt: skip


@st.composite
def cut_answers(draw):
    """Draw a format, an answer made of what it reads, and the places to cut it at."""
    name = draw(st.sampled_from(sorted(PIECES)))
    pieces = st.sampled_from([*PIECES[name], " ", "\n", "Hello.", "　", "<"])
    text = "".join(draw(st.lists(pieces, max_size=10)))
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return name, text, places


@many
@given(cut_answers(), st.booleans())
def test_the_events_do_not_depend_on_where_the_answer_is_cut(drawn, parallel):
    name, text, places = drawn
    whole = read(name, text, parallel=parallel)
    edges = [0, *places, len(text)]
    assert read(name, *(text[a:b] for a, b in itertools.pairwise(edges)), parallel=parallel) == whole
    assert read(name, *text, parallel=parallel) == whole


@many
@given(cut_answers())
def test_nothing_is_lost_and_calls_hold_json(drawn):
    name, text, _ = drawn
    answer = collect(read(name, text))
    for made in answer.calls:
        assert made.name in KNOWN
        assert isinstance(json.loads(made.arguments), dict)
        assert made.arguments == "{}" or made.arguments in text
    if not answer.calls and name != "react":
        assert answer.content == text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=4)
PUT = ["", ",", ":", "{", "}", "[", "]", '"', "\\", "0", "-", ".", "e", "null", "x", " ", "\n"]


@many
@given(OBJECTS, st.booleans(), st.sampled_from([None, 0, 2]), st.data())
def test_the_scan_agrees_with_pythons_reader(value, ascii_only, indent, data):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert is_object(text)
    at = data.draw(st.integers(0, len(text)))
    changed = text[:at] + data.draw(st.sampled_from(PUT)) + text[at + data.draw(st.integers(0, 2)) :]
    changed = changed.rstrip(" \n")
    try:
        agrees = isinstance(json.loads(changed), dict)
    except ValueError:
        agrees = False
    assert is_object(changed) == agrees


@pytest.mark.parametrize("end", ['"}', '0"}', 'g"}', '\\"}', "}"])
@pytest.mark.parametrize("escape", ["\\u00e", "\\u00e9", "\\u00e9\\u", "\\x", "\\n", "\\\\"])
def test_the_scan_agrees_with_pythons_reader_on_escapes(escape, end):
    text = f'{{"a": "{escape}{end}'
    try:
        agrees = isinstance(json.loads(text), dict)
    except ValueError:
        agrees = False
    assert is_object(text) == agrees


def test_nesting_is_bounded():
    for depth in (MAX_DEPTH, MAX_DEPTH + 1):
        text = '{"a":' + "[" * (depth - 1) + "]" * (depth - 1) + "}"
        assert is_object(text) == (depth == MAX_DEPTH)


@some
@given(OBJECTS, st.text(), st.text(), st.sampled_from(TAGGED))
def test_any_json_and_any_text_around_it_come_back(value, before, after, name):
    arguments = json.dumps(value, ensure_ascii=False)
    text = f'{before}{START[name]}{{"name": "add", "arguments": {arguments}}}{END[name]}{after}'
    answer = collect(read(name, *text))
    assert [made.arguments for made in answer.calls] == [arguments]
    assert answer.content == before.rstrip() + (after if after.strip() else "")


HOSTILE = {
    "hermes": [
        "[" * 40_000, "<" * 20_000, "<tool_call>" * 2_000, "<tool_call>" + " " * 20_000,
        '<tool_call>{"name": "add", "arguments": {"a":' + "[" * 40_000, '<tool_call>{"a": ' + "[" * 40_000,
        '<tool_call>{"name": "' + "a" * 20_000, '<tool_call>{"name": "x", "arguments": {"a": "' + "\\\\" * 10_000,
        '<tool_call>{"name": "add", "arguments": {"a": [' + "1," * 10_000,
        '<tool_call>{"name": "add", "arguments": {"a": 1' + "0" * 20_000,
    ],
    "react": [
        " " * 20_000, "\n" * 20_000, "Action:" * 3_000, "Action:\n" * 3_000, "Action:" + " " * 20_000,
        "Thought:" + " " * 20_000, "Action:add\nActionInput:" + '{"a":' + "[" * 40_000, "Action:add\n" + "\n" * 20_000,
        "Action:add\nActionInput:{" + '"' * 20_000, "Action:add\nActionInput:\n" * 1_000,
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "number"), [(name, number) for name in HOSTILE for number in range(10)])
def test_hostile_answers_cost_no_more_than_their_length(name, number):
    text = HOSTILE[name][number]
    begun = time.process_time()
    whole, by_characters = read(name, text), read(name, *text)
    seconds = time.process_time() - begun
    assert whole == by_characters
    assert collect(whole).calls == ()
    assert seconds / len(text) < 1e-4, f"{seconds:.1f} s for {len(text)} characters; usual are 5 µs each"
