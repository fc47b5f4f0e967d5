import codecs
import json

import pytest

from internlm.errors import ConfigError, DataError, TokenizerError
from internlm.text.chat import Message, render, render_prompt
from internlm.text.templates import TEMPLATES, Special, get_template
from internlm.text.tool_formats import FORMATS, format_of, get_format
from internlm.text.tool_json import moved_schema
from internlm.text.tools import Tool, ToolCall, collect, new_call_id
from internlm.text.training import train_bpe

WEATHER = Tool("get_weather", "Tells the weather.", {"type": "object", "properties": {"city": {"type": "string"}}})
ADD = Tool("add", "", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
CALL = ToolCall("call_1", "get_weather", '{"city": "上海"}')
ASKED = Message("user", "And in Shanghai?")
CALLED = Message("assistant", "One moment.", calls=(CALL,))
TOLD = Message("tool", '{"degrees": 22}', call_id="call_1")
TALK = [ASKED, CALLED, TOLD, Message("assistant", "It is 22 °C.")]
USUAL = [("react", "internlm-v1.1"), ("react", "internlm-v1.0"), ("internlm2", "internlm2"), ("hermes", "chatml")]


@pytest.fixture(scope="module")
def tokenizer(sources):
    """A byte-level tokenizer with the special tokens of every template and tool format."""
    names = ["<s>", "</s>", "<eoh>", "<eoa>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    names += ["<|end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    names += ["<|action_start|>", "<|action_end|>", "<|plugin|>", "<|interpreter|>"]
    return train_bpe(sources, 700, names)


def prompt(format, template, messages, tools, tokenizer):
    return tokenizer.decode(render_prompt(format.render(messages, tools), get_template(template), tokenizer))


def described(tool):
    return json.dumps({"name": tool.name, "description": tool.description, "parameters": tool.parameters})


def test_hermes_gives_the_text_written_by_hand(tokenizer):
    text = prompt(format_of("chatml"), "chatml", [Message("system", "Be kind."), *TALK, ASKED], [WEATHER], tokenizer)
    assert text == (
        "<|im_start|>system\nBe kind.\n\n# Tools\n\nThese functions can be called:\n<tools>\n"
        f'{{"type": "function", "function": {described(WEATHER)}}}\n</tools>\n\n'
        "A call is a JSON object with the function's name and arguments, between two tags:\n<tool_call>\n"
        '{"name": <name>, "arguments": <object>}\n</tool_call>\nSeveral calls may follow one another.<|im_end|>\n'
        "<|im_start|>user\nAnd in Shanghai?<|im_end|>\n<|im_start|>assistant\nOne moment.\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "上海"}}\n</tool_call><|im_end|>\n'
        '<|im_start|>user\n<tool_response>\n{"degrees": 22}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\nIt is 22 °C.<|im_end|>\n"
        "<|im_start|>user\nAnd in Shanghai?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_internlm2_gives_the_text_written_by_hand(tokenizer):
    format = format_of("internlm2")
    text = prompt(format, "internlm2", [Message("system", "Be kind."), *TALK, ASKED], [WEATHER], tokenizer)
    assert text.removeprefix(tokenizer.decode([tokenizer.bos_id])) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        f"<|im_start|>system name=<|plugin|>\n[{described(WEATHER)}]<|im_end|>\n"
        "<|im_start|>user\nAnd in Shanghai?<|im_end|>\n"
        "<|im_start|>assistant\nOne moment.<|action_start|><|plugin|>\n"
        '{"name": "get_weather", "parameters": {"city": "上海"}}<|action_end|><|im_end|>\n'
        '<|im_start|>environment name=<|plugin|>\n{"degrees": 22}<|im_end|>\n'
        "<|im_start|>assistant\nIt is 22 °C.<|im_end|>\n"
        "<|im_start|>user\nAnd in Shanghai?<|im_end|>\n<|im_start|>assistant\n"
    )
    alone = prompt(format, "internlm2", [ASKED], [WEATHER], tokenizer)
    assert alone.count("<|im_start|>system") == alone.count("<|im_start|>system name=<|plugin|>") == 1


def test_react_gives_the_text_written_by_hand(tokenizer):
    format = format_of("internlm-v1.1")
    text = prompt(format, "internlm-v1.1", [Message("system", "Be kind."), *TALK, ASKED], [WEATHER, ADD], tokenizer)
    assert text.removeprefix(tokenizer.decode([tokenizer.bos_id])) == (
        "<|System|>:Be kind.\n\nYou can use these tools:\n"
        f"{described(WEATHER)}\n{described(ADD)}\n\n"
        "To use one, write\nThought:what has to be found out next\n"
        "Action:the tool's name, one of get_weather, add\nActionInput:its arguments, a JSON object\n"
        "and you are given\nResponse:what the tool returned\n"
        "When you know the answer, or need no tool, write\nThought:why this is the answer\nFinalAnswer:the answer\n"
        "<|User|>:And in Shanghai?\n"
        '<|Bot|>:Thought:One moment.\nAction:get_weather\nActionInput:{"city": "上海"}<eoa>\n'
        '<|System|>:Response:{"degrees": 22}\n\n<|Bot|>:FinalAnswer:It is 22 °C.<eoa>\n'
        "<|User|>:And in Shanghai?\n<|Bot|>:"
    )


def test_react_tells_the_tools_to_the_user_of_a_template_without_system_messages(tokenizer):
    text = prompt(format_of("internlm-v1.0"), "internlm-v1.0", TALK[:3], [WEATHER], tokenizer)
    assert "<|User|>:You can use these tools:\n" in text
    assert "FinalAnswer:the answer\n\nAnd in Shanghai?<eoh>\n" in text
    assert text.endswith('<eoa>\n<|User|>:Response:{"degrees": 22}\n<eoh>\n<|Bot|>:')


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("template", sorted(TEMPLATES.keys() - {"alpaca"}))
def test_every_format_goes_through_every_template(name, template, tokenizer):
    messages = get_format(name, template).render(TALK, [WEATHER, ADD])
    ids, mask = render(messages, get_template(template), tokenizer)
    begun = render_prompt(messages[:-1], get_template(template), tokenizer)
    assert ids[: len(begun)] == begun
    learned = [tokenizer.decode([id_ for id_, trained in zip(ids, mask, strict=True) if trained])]
    assert "22 °C" in learned[0]
    assert "上海" in learned[0]
    assert "degrees" not in learned[0]
    assert "Tells the weather" in tokenizer.decode(begun)


def test_the_special_tokens_of_a_call_are_ids_and_are_learned(tokenizer):
    ids, mask = render(format_of("internlm2").render(TALK[:2], [WEATHER]), get_template("internlm2"), tokenizer)
    learned = [id_ for id_, trained in zip(ids, mask, strict=True) if trained]
    names = ("<|action_start|>", "<|plugin|>", "<|action_end|>", "<|im_end|>")
    assert [id_ for id_ in learned if id_ in tokenizer.special_ids] == [tokenizer.special(name) for name in names]


def test_special_names_in_contents_arguments_and_results_stay_text(tokenizer):
    bad = "<|im_end|><|action_start|><|plugin|><|im_start|>"
    call = ToolCall("1", "add", json.dumps({"a": bad}))
    talk = [Message("system", bad), Message("user", bad), Message("assistant", bad, calls=(call,))]
    tool = Tool("add", bad, {"description": bad})
    clean = [Message(m.role, "x", calls=(ToolCall("1", "add", "{}"),) * bool(m.calls)) for m in talk]
    for messages, told in ((talk, tool), (clean, ADD)):
        messages.append(Message("tool", bad if messages is talk else "x", call_id="1"))
        written = format_of("internlm2").render(messages, [told])
        ids = render_prompt(written, get_template("internlm2"), tokenizer)
        specials = "".join(tokenizer.decode([id_]) for id_ in ids[1:] if id_ in tokenizer.special_ids)
        assert specials == (
            "<|im_start|><|im_end|><|im_start|><|plugin|><|im_end|><|im_start|><|im_end|>"
            "<|im_start|><|action_start|><|plugin|><|action_end|><|im_end|><|im_start|><|plugin|><|im_end|><|im_start|>"
        )


def test_a_tokenizer_without_the_tokens_of_internlm2_is_an_error(wide):
    with pytest.raises(TokenizerError, match="plugin"):
        render_prompt(format_of("internlm2").render([ASKED], [WEATHER]), get_template("internlm2"), wide)
    render_prompt(get_format("hermes", "internlm2").render([ASKED], [WEATHER]), get_template("internlm2"), wide)


def test_without_tools_nothing_changes():
    talk = [Message("system", "Be kind."), ASKED, Message("assistant", "No.")]
    for name, template in USUAL:
        assert get_format(name, template).render(talk) == talk
        assert get_format(name, template).render([]) == []


@pytest.mark.parametrize(("name", "template"), USUAL)
@pytest.mark.parametrize("content", ["", "One moment.", "两行\n文字 🙂"])
@pytest.mark.parametrize("number", [1, 2])
def test_what_is_rendered_is_parsed_back(name, template, content, number, tokenizer):
    if name == "react" and number > 1:
        return
    calls = tuple(
        ToolCall(str(n), "get_weather", json.dumps({"城": ["}", n]}, ensure_ascii=False)) for n in range(number)
    )
    format = get_format(name, template)
    talk = [ASKED, Message("assistant", content, calls=calls)]
    ids, mask = render(format.render(talk, [WEATHER]), get_template(template), tokenizer)
    learned = [id_ for id_, trained in zip(ids, mask, strict=True) if trained]
    parser, decoder = format.parser({"get_weather"}), codecs.getincrementaldecoder("utf-8")()
    pieces = (decoder.decode(tokenizer.token_bytes(id_, skip_special=False)) for id_ in learned[:-1])
    answer = collect([event for piece in pieces for event in parser.add(piece)] + parser.finish())
    assert (answer.thought if name == "react" else answer.content) == content
    assert [(call.name, call.arguments) for call in answer.calls] == [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("thought", ["", "It is known.\nSo: 5"])
def test_a_final_answer_of_react_is_parsed_back(thought):
    message = Message("assistant", "Action:add\n5", thought=thought)
    (_, _, answer) = format_of("internlm-v1.1").render([ASKED, message], [ADD])
    parser = format_of("internlm-v1.1").parser({"add"})
    read = collect(parser.add(answer.content) + parser.finish())
    assert (read.content, read.thought) == ("Action:add\n5", thought)


def test_react_gives_the_thought_before_a_call_back():
    message = Message("assistant", "", calls=(CALL,), thought="Hm.\nYes.")
    (_, answer) = format_of("internlm-v1.1").render([ASKED, message])
    assert answer.content.startswith("Thought:Hm.\nYes.\nAction:get_weather\n")
    both = Message("assistant", "One moment.", calls=(CALL,), thought="Hm.")
    (_, answer) = format_of("internlm-v1.1").render([ASKED, both])
    assert answer.content.startswith("Thought:Hm.\nOne moment.\nAction:get_weather\n")


ONE = Message("tool", "x", call_id="1")


def two(*results):
    calls = (ToolCall("1", "add", '{"a": 1}'), ToolCall("2", "add", '{"a": 2}'))
    return [ASKED, Message("assistant", "", calls=calls), *results]


def test_results_come_in_the_order_of_their_calls():
    swapped = two(Message("tool", "two", call_id="2"), Message("tool", "one", call_id="1"))
    unnamed = two(Message("tool", "one"), Message("tool", "two"))
    for talk in (swapped, unnamed):
        assert get_format("hermes").render(talk)[2] == Message(
            "user", "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>"
        )
        assert [message.content for message in get_format("react").render(talk)[1:]] == [
            'Action:add\nActionInput:{"a": 1}', "Response:one\n", 'Action:add\nActionInput:{"a": 2}', "Response:two\n"
        ]  # fmt: skip
        environment = "<|im_end|>\n<|im_start|>environment name=<|plugin|>\n"
        assert get_format("internlm2").render(talk)[2].content == f"one{environment}two"


@pytest.mark.parametrize(
    "talk",
    [
        two(ONE), two(ONE, ONE), two(ONE, ONE, ONE),
        two(ONE, Message("tool", "x", call_id="3")), two(ASKED), [ASKED, TOLD], two(ONE, Message("tool", "x")),
        two(*[Message("tool", "x")] * 3),
        [ASKED, Message("assistant", "", calls=(CALL, CALL)), TOLD, TOLD], [Message("user", "x", calls=(CALL,))],
        [ASKED, Message("assistant", "", calls=(CALL,)), Message("tool", None, call_id="call_1")],
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_calls_and_results_that_do_not_belong_together_are_an_error(name, talk):
    with pytest.raises(DataError, match="message"):
        get_format(name).render(talk, [ADD])


@pytest.mark.parametrize("arguments", ["", "[]", "1", "{", "{}{}", '{"a": NaN}', "{'a': 1}", '{"a":' * 100_000, None])
def test_arguments_that_are_no_json_object_are_an_error(arguments):
    talk = [ASKED, Message("assistant", "", calls=(ToolCall("1", "add", arguments),))]
    with pytest.raises(DataError, match="message 2: the arguments of add") as error:
        get_format("hermes").render(talk)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["", "a b", "add\nFinalAnswer:", "x" * 65, 'a"', "<tool_call>"])
def test_a_name_that_could_be_structure_is_an_error(name):
    with pytest.raises(DataError, match="name"):
        Tool(name)
    with pytest.raises(DataError, match="name"):
        get_format("react").render([ASKED, Message("assistant", "", calls=(ToolCall("1", name, "{}"),))])


def test_parameters_are_not_nested_without_end():
    deep = {}
    for _ in range(10_000):
        deep = {"items": [deep]}
    with pytest.raises(DataError, match="deeper"):
        Tool("add", "", deep)


@pytest.mark.parametrize(
    ("talk", "match"),
    [
        ([*TALK, ASKED, ASKED], "message 6: user and assistant"),
        ([*TALK, CALLED], "message 5: user and assistant"),
        ([*TALK[:3], ASKED], "message 4: user and assistant"),
        ([CALLED, TOLD], "message 1: user and assistant"),
        ([*TALK, Message("system", "x"), ASKED], "message 5: a system message"),
    ],
)
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_messages_out_of_turn_are_named_by_their_own_number(name, talk, match):
    with pytest.raises(DataError, match=match):
        get_format(name).render(talk, [WEATHER])


def history(template, messages, tokenizer, tools=()):
    """Return the text of a prompt without bos, from messages that need not take turns."""
    written = format_of(template).render_history(messages, tools)
    text = tokenizer.decode(render_prompt(written, get_template(template), tokenizer))
    return text.removeprefix(tokenizer.decode([tokenizer.bos_id]))


GO_ON, GREETING, NOTE = Message("user", "Go on."), Message("assistant", "Hello!"), Message("system", "Note.")


def test_what_a_user_says_after_a_result_follows_it_in_its_own_frame(tokenizer):
    talk = [ASKED, CALLED, TOLD, GO_ON]
    assert history("chatml", talk, tokenizer).endswith(
        '<|im_start|>user\n<tool_response>\n{"degrees": 22}\n</tool_response><|im_end|>\n'
        "<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert history("internlm2", talk, tokenizer).endswith(
        '<|im_start|>environment name=<|plugin|>\n{"degrees": 22}<|im_end|>\n'
        "<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert history("internlm-v1.1", talk, tokenizer).endswith(
        '<|System|>:Response:{"degrees": 22}\n\n<|User|>:Go on.\n<|Bot|>:'
    )
    assert history("internlm-v1.0", talk, tokenizer).endswith(
        '<|User|>:Response:{"degrees": 22}\n<eoh>\n<|User|>:Go on.<eoh>\n<|Bot|>:'
    )


def test_a_greeting_and_a_system_message_in_the_midst_keep_their_frames(tokenizer):
    talk = [GREETING, ASKED, Message("assistant", "Yes."), NOTE, GO_ON, NOTE]
    said = [("assistant", "Hello!"), ("user", ASKED.content), ("assistant", "Yes.")]
    said += [("system", "Note."), ("user", "Go on."), ("system", "Note.")]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in said)
    assert history("chatml", talk, tokenizer) == text + "<|im_start|>assistant\n"
    assert "<|im_start|>assistant\nHello!" in history("chatml", talk, tokenizer, [WEATHER])
    assert history("chatml", [GREETING, ASKED], tokenizer, [WEATHER]).startswith("<|im_start|>system\n# Tools")
    told = history("internlm-v1.0", [GREETING, ASKED], tokenizer, [WEATHER])
    assert told.startswith("<|Bot|>:FinalAnswer:Hello!<eoa>\n<|User|>:You can use these tools:\n")
    assert history("chatml", [CALLED, TOLD], tokenizer).startswith("<|im_start|>assistant\nOne moment.\n<tool_call>")


def test_what_takes_turns_is_written_as_for_training():
    for name, template in USUAL:
        for talk in (TALK[:3], [Message("system", "Be kind."), *TALK, ASKED], []):
            format_ = get_format(name, template)
            assert format_.render_history(talk, [WEATHER]) == format_.render(talk, [WEATHER])


def test_arguments_that_the_model_got_wrong_are_shown_to_it_and_not_trained(tokenizer):
    talk = [ASKED, Message("assistant", "", calls=(ToolCall("1", "add", '{"a":'),)), Message("tool", "no", call_id="1")]
    assert '{"name": "add", "arguments": {"a":}\n</tool_call>' in history("chatml", talk, tokenizer)
    assert '{"name": "add", "parameters": {"a":}<|action_end|>' in history("internlm2", talk, tokenizer)
    assert 'Action:add\nActionInput:{"a":<eoa>' in history("internlm-v1.1", talk, tokenizer)


@pytest.mark.parametrize(
    ("template", "talk", "match"),
    [
        ("chatml", [GREETING], "take turns"),
        ("chatml", [NOTE], "a system message only"),
        ("chatml", [ASKED, TOLD], "without a call"),
        ("chatml", [ASKED, CALLED, GO_ON], "each call needs one result"),
        ("chatml", [ASKED, GREETING, GREETING, ASKED], "take turns"),
        ("chatml", [ASKED, Message("assistant", "", calls=(ToolCall("1", "a b", "{}"),))], "a tool's name"),
        ("internlm-v1.0", [ASKED, GREETING, NOTE, GO_ON], "no such role"),
        ("alpaca", [GREETING, ASKED], "take turns"),
        ("alpaca", [ASKED, NOTE], "can only be the first"),
    ],
)
def test_a_history_that_the_format_cannot_write_is_an_error(template, talk, match, tokenizer):
    with pytest.raises(DataError, match=match):
        history(template, talk, tokenizer)


def test_react_cannot_end_with_two_calls():
    with pytest.raises(DataError, match="one call"):
        get_format("react").render(two())


def test_calls_that_no_format_wrote_are_an_error(wide):
    with pytest.raises(DataError, match=r"message 2: the calls .* 'get_weather'"):
        render_prompt([ASKED, CALLED, ASKED], get_template("chatml"), wide)
    with pytest.raises(DataError, match="message 2: template chatml has no such role"):
        render_prompt([ASKED, TOLD], get_template("chatml"), wide)


def test_formats_belong_to_templates():
    usual = {template: format_of(template).name for template in TEMPLATES}
    assert usual == {
        "internlm": "hermes", "internlm-v1.0": "react", "internlm-v1.1": "react", "internlm2": "internlm2",
        "chatml": "hermes", "llama3": "hermes", "alpaca": "hermes",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="hermes"):
        get_format("hermse")
    with pytest.raises(ConfigError, match="template"):
        format_of("chatlm")


def test_formats_say_what_ends_an_answer_and_which_tokens_must_be_shown():
    assert get_format("react").stops == ("\nResponse:",)
    assert get_format("hermes").stops == get_format("hermes").specials == ()
    assert set(get_format("internlm2").specials) == {"<|action_start|>", "<|plugin|>", "<|action_end|>"}


def test_call_ids_differ():
    assert len({new_call_id() for _ in range(100)}) == 100


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_only_required_and_named_calls_are_forced(name):
    format = get_format(name)
    assert format.schema([ADD], "auto") is None
    assert format.schema([ADD], "none") is None
    assert format.schema([ADD], "required") == format.schema([WEATHER, ADD], "add")
    with pytest.raises(DataError, match="get_weather"):
        format.schema([WEATHER], "add")
    with pytest.raises(DataError):
        format.schema([], "required")


FORCED = {"hermes": '{"name": "add", "arguments": {"a": 1}}', "internlm2": '{"name": "add", "parameters": {"a": 1}}'}


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("tools", [[ADD], [WEATHER, ADD]], ids=len)
def test_a_forced_answer_is_parsed_as_a_call(name, tools, tokenizer):
    forced = get_format(name).schema(tools, "required")
    written = FORCED.get(name, '{"a": 1}')
    if forced.kind == "labelled_schema":
        label = "add\nActionInput:"
        assert forced.grammar[label] == ADD.parameters
        written = label + written
    parser = get_format(name).parser({tool.name for tool in tools}, parallel=False)
    answer = collect(parser.add(forced.text) + parser.add(written) + parser.finish())
    assert [(call.name, call.arguments) for call in answer.calls] == [("add", '{"a": 1}')]
    assert (answer.content, parser.finished) == ("", True)
    chatml = get_template("chatml")
    begun = render_prompt([ASKED], chatml, tokenizer, begin=forced.begin)
    plain = render_prompt([ASKED], chatml, tokenizer)
    assert begun[: len(plain)] == plain
    assert tokenizer.decode(begun[len(plain) :]) == forced.text


def test_the_schema_of_a_call_names_the_tool_and_holds_its_parameters():
    assert get_format("hermes").schema([ADD, WEATHER], "add").grammar == {
        "type": "object",
        "properties": {"name": {"enum": ["add"]}, "arguments": ADD.parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
    several = get_format("internlm2").schema([ADD, WEATHER], "required").grammar["anyOf"]
    assert [schema["properties"]["name"]["enum"] for schema in several] == [["add"], ["get_weather"]]
    assert several[1]["properties"]["parameters"] == WEATHER.parameters
    labelled = get_format("react").schema([ADD, WEATHER], "required").grammar
    assert labelled == {"add\nActionInput:": ADD.parameters, "get_weather\nActionInput:": WEATHER.parameters}
    named = get_format("react").schema([ADD, WEATHER], "add")
    assert (named.begin, named.grammar) == (("Action:add\nActionInput:",), ADD.parameters)
    assert get_format("internlm2").schema([ADD], "add").begin == (
        Special("<|action_start|>"), Special("<|plugin|>"), "\n"
    )  # fmt: skip


def test_references_within_parameters_still_hold_in_the_schema_of_a_call():
    tree = {"properties": {"t": {"$ref": "#/$defs/tree"}, "$ref": {"type": "string"}}, "$defs": {"tree": {"$ref": "#"}}}
    schema = get_format("hermes").schema([ADD, Tool("grow", "", tree)], "required").grammar
    moved = schema["anyOf"][1]["properties"]["arguments"]
    target = schema
    for step in moved["properties"]["t"]["$ref"].removeprefix("#/").split("/"):
        target = target[int(step)] if isinstance(target, list) else target[step]
    assert target is moved["$defs"]["tree"]
    assert target == {"$ref": "#/anyOf/1/properties/arguments"}
    assert moved["type"] == "object"
    assert moved["properties"]["$ref"] == {"type": "string"}
    assert moved_schema(tree, "") == tree
    values = {"properties": {"default": {"$ref": "#"}, "a": {"const": {"$ref": "#"}, "enum": [{"$ref": "#"}]}}}
    moved = moved_schema(values, "/x")["properties"]
    assert moved == {"default": {"$ref": "#/x"}, "a": values["properties"]["a"]}, "data stay, and names are no keys"
