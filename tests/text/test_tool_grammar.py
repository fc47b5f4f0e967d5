"""What a model that must call a tool can write, in every format."""

import json

import pytest
import torch

from internlm.errors import EngineError
from internlm.infer import grammar
from internlm.text.tool_formats import FORMATS, get_format
from internlm.text.tools import Tool, collect

pytest.importorskip("llguidance")

ADD = Tool("add", "", {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False})
DEEP = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/list"}},
    "required": ["x"],
    "additionalProperties": False,
}
DEEP["$defs"] = {"list": {"type": "array", "items": {"$ref": "#/$defs/list"}}}
NEST = Tool("nest.it", "", DEEP)
HEAD = {
    "hermes": '{{"name": "{}", "arguments": ',
    "internlm2": '{{"name": "{}", "parameters": ',
    "react": "{}\nActionInput:",
}
TAIL = {"hermes": "}", "internlm2": "}", "react": ""}


def compiled(forced, tokenizer):
    return grammar.compile(forced.kind, json.dumps(forced.grammar), tokenizer, tokenizer.vocab_size, [tokenizer.eos_id])


def takes(grammar, text, tokenizer):
    """Return whether the grammar lets a model write a text and end there."""
    running = grammar.start()
    for id_ in [*tokenizer.encode(text), tokenizer.eos_id]:
        logits = torch.zeros(tokenizer.vocab_size)
        running.mask(logits)
        if logits[id_] < 0:
            return False
        if id_ != tokenizer.eos_id:
            running.accept(id_)
            if running.is_complete:
                return text.endswith(tokenizer.decode([id_]))
    return True


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_required_call_has_a_name_of_the_list_and_the_arguments_of_that_tool(name, small):
    forced = get_format(name).schema([ADD, NEST], "required")
    rules = compiled(forced, small)
    good = [("add", '{"a": 1}'), ("nest.it", '{"x": [[], [[[[]]]]]}')]
    bad = [("sub", '{"a": 1}'), ("add", '{"x": []}'), ("nest.it", '{"a": 1}'), ("add", '{"a": "1"}'), ("nestXit", "{}")]
    for tool, arguments in [*good, *bad]:
        text = HEAD[name].format(tool) + arguments + TAIL[name]
        assert takes(rules, text, small) == ((tool, arguments) in good), text
        parser = get_format(name).parser({"add", "nest.it"}, parallel=False)
        answer = collect(parser.add(forced.text) + parser.add(text) + parser.finish())
        if (tool, arguments) in good:
            assert [(call.name, call.arguments) for call in answer.calls] == [(tool, arguments)]


@pytest.mark.parametrize("text", ["[]", "{}", '{"a": 1}', "{"])
def test_labels_without_schemas_are_an_error(text, small):
    with pytest.raises(EngineError, match="JSON"):
        grammar.compile("labelled_schema", text, small, small.vocab_size, [small.eos_id])
