"""Structured output: what a random model writes under a grammar is what was asked for, and what is wrong is refused."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from internlm.errors import EngineError, install_command
from internlm.infer import grammar
from internlm.infer.engine import Engine, Limits
from internlm.infer.request import Request, Result
from internlm.model.config import ModelConfig
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import train_bpe
from tests.infer.engines import sentencepiece_tokenizer
from tests.models import random_model

TEXTS = [
    '{"name": "Ada", "age": 36, "tags": ["a", "b"]}',
    "true false null 你好 👋 -12.5e3 the cat sat on the mat.",
] * 8
SIZE = 320
"""Of the model's vocabulary: more than either tokenizer has."""


BPE = train_bpe(TEXTS, 310)
TOKENIZERS = {"bpe": BPE, "sentencepiece": sentencepiece_tokenizer(TEXTS)}
STOPS = (BPE.special("<|end|>"), BPE.special("<|eos|>"))


SHAPE = ModelConfig(
    vocab_size=SIZE, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=48, context_length=900
)
MODEL = random_model(SHAPE)
PROOF = pytest.mark.proof


def request(kind: str, text: str, tokenizer: Tokenizer = BPE, **settings: Any) -> Request:
    stops = STOPS if tokenizer is BPE else (tokenizer.special("<eoa>"),)
    made = grammar.compile(kind, text, tokenizer, SIZE, stops)
    settings = {"tokens": [10, 11, 12], "max_tokens": 400, "stop_ids": stops, "grammar": made, "seed": 1, **settings}
    return Request(**settings)


def answers(kind: str, text: str, tokenizer: Tokenizer = BPE, **settings: Any) -> list[Result]:
    settings = {"n": 6, **settings}
    return Engine(MODEL, tokenizer).generate([request(kind, text, tokenizer, **settings)])


def allowed(constraint: Any, size: int = SIZE) -> set[int]:
    logits = torch.zeros(size)
    constraint.mask(logits)
    assert set(logits.tolist()) <= {0.0, float("-inf")}
    return set((logits == 0).nonzero().flatten().tolist())


def random_schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    kinds = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const"]
    kind = draw.choice(kinds + ["object"] * 4 + ["array", "any"] * 2 if depth else kinds)
    if kind == "object":
        names = draw.sample(["name", "age", "tags", "你好", "x y", 'quo"te'], draw.randint(0, 4))
        properties = {name: random_schema(draw, depth - 1) for name in names}
        required = [name for name in names if draw.random() < 0.5]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(draw, depth - 1), "minItems": draw.randint(0, 2), "maxItems": 3}
    if kind == "any":
        return {"anyOf": [random_schema(draw, depth - 1), random_schema(draw, depth - 1)]}
    low = draw.randint(-50, 50)
    return {
        "string": {"type": "string", "minLength": draw.randint(0, 3), "maxLength": 6},
        "pattern": {"type": "string", "pattern": "^[a-c你👋]{2,4}$"},
        "integer": {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 999)},
        "number": {"type": "number", "exclusiveMinimum": low, "maximum": low + 2.5},
        "boolean": {"type": "boolean"},
        "null": {"type": ["null", "boolean"]},
        "enum": {"enum": ["red", 2, None, {"a": [1.5]}, "\U0001f469\u200d\U0001f467"]},
        "const": {"const": draw.choice(['a/b\\"\n\t', 17, [], {"k": "值"}])},
    }[kind]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_answers_follow_random_schemas(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    draw = random.Random(5)
    schemas = [random_schema(draw) for _ in range(6)]
    requests = [request("json_schema", json.dumps(s), tokenizer, seed=i) for i, s in enumerate(schemas)]
    whole = 0
    for schema, answer in zip(schemas, Engine(MODEL, tokenizer).generate(requests), strict=True):
        assert answer.finished in ("stop", "length"), answer.problem
        if answer.finished == "stop":
            whole += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))
    assert whole >= 4


def test_a_json_object_is_one() -> None:
    bias = dict.fromkeys(BPE.encode('"') + BPE.encode("}"), 8.0)  # else its strings have no end
    found = answers("json_object", "counts for nothing", logit_bias=bias)
    assert {answer.finished for answer in found} == {"stop"}
    assert all(isinstance(json.loads(answer.text), dict) for answer in found)


TWICE = (r"^(yes|no|maybe)$", r"你好|再见|👋{2}", "👩‍👩‍👧🏽 end")
"""What both vocabularies write always; the rest the second one writes in the long proofs."""


def both_of(texts: list[str]) -> list[Any]:
    """Return every text with every tokenizer."""
    return [
        pytest.param(text, name, marks=[PROOF] * (name != "bpe" and text not in TWICE))
        for text, name in itertools.product(texts, TOKENIZERS)
    ]


@pytest.mark.parametrize(
    ("pattern", "name"),
    both_of([
        r"[0-9]{3}-[a-f]+/\"'\\",
        r"^(yes|no|maybe)$",
        r"(a|b)*abb?",
        r"[^a-z\s]{4}",
        r"你好|再见|👋{2}",
        r"(?i)cat\n+",
        r"-?(0|[1-9][0-9]{0,4})(\.[0-9]{1,3})?",
        r"(.|\n){20,4000}",
    ]),
)  # fmt: skip
def test_answers_match_the_regular_expression(pattern: str, name: str) -> None:
    found = answers("regex", pattern, TOKENIZERS[name], max_tokens=150, n=4)
    stopped = [answer.text for answer in found if answer.finished == "stop"]
    assert {answer.finished for answer in found} <= {"stop", "length"}
    for text in stopped:
        assert re.fullmatch(pattern, text), text
    assert len(stopped) >= (0 if "4000" in pattern else 2)


def test_answers_are_one_of_the_choices_and_all_come_up() -> None:
    choices = ["yes", "yes, sir", "", "no", "你好", 'a "quoted"\nline\\', "👩‍👩‍👧"]
    found = {answer.text for answer in answers("choice", json.dumps(choices), n=120)}
    assert found <= set(choices)
    assert len(found) >= 4


@pytest.mark.parametrize("text", ['start: "(" start ")" | /[0-9]/', 'root ::= "(" root ")" | [0-9]'])
def test_answers_follow_a_grammar_in_lark_and_in_gbnf(text: str) -> None:
    for answer in answers("grammar", text, n=10, max_tokens=200):
        assert answer.finished == "stop"
        digit = answer.text.strip("()")
        depth = (len(answer.text) - 1) // 2
        assert answer.text == "(" * depth + digit + ")" * depth
        assert digit in list("0123456789")


@pytest.mark.parametrize(("text", "name"), both_of(["王小明 é ß", "👩‍👩‍👧🏽 end", "\u0000\u001f\u2028", "a" * 50]))
def test_any_character_can_be_in_a_string(text: str, name: str) -> None:
    schema = json.dumps({"const": text})
    assert [json.loads(a.text) for a in answers("json_schema", schema, TOKENIZERS[name], n=2)] == [text] * 2


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_mask_lets_through_exactly_what_can_go_on(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    stop = 5 if name == "bpe" else tokenizer.special("<eoa>")
    spoken = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if i != stop}
    spoken = {i: data for i, data in spoken.items() if data}
    draw = random.Random(3)
    steps = 0
    for _ in range(12):
        letters = 'ab"{: 你👋é\n'
        choices = ["".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(5)]
        constraint = grammar.compile("choice", json.dumps(choices), tokenizer, SIZE, (stop,)).start()
        written = b""
        while not constraint.is_complete:
            wanted = {i for i, data in spoken.items() if any(c.encode().startswith(written + data) for c in choices)}
            if name == "sentencepiece" and not written:
                wanted = {i for i in wanted if not spoken[i].startswith(b" ")} or wanted
            wanted |= {stop} if written.decode("utf-8", "replace") in choices else set()
            assert allowed(constraint) == wanted
            assert allowed(constraint) == wanted, "asking changes nothing"
            token = draw.choice(sorted(wanted))
            if token == stop:
                break
            constraint.accept(token)
            written += spoken[token]
            steps += 1
        assert written.decode() in choices
    assert steps > 30


def test_no_first_space_is_lost_where_the_vocabulary_puts_one() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    assert tokenizer.decode(tokenizer.encode("a")) == "a" != b"".join(map(tokenizer.token_bytes, tokenizer.encode("a")))
    found = [answer.text for answer in answers("regex", "[ a-z]{4}", tokenizer, n=30)]
    assert all(re.fullmatch("[ a-z]{4}", text) for text in found)
    assert any(" " in text for text in found), "later ones are free to come"
    assert any(answer.text[0] == " " for answer in answers("regex", "[ a-z]{4}", BPE, n=30))
    constraint = grammar.compile("regex", " a", tokenizer, SIZE, ()).start()
    assert {tokenizer.token_bytes(id_) for id_ in allowed(constraint)} >= {b" "}


def test_padding_and_special_tokens_are_never_allowed_and_stop_ids_just_at_an_end() -> None:
    constraint = grammar.compile("regex", "(.|\n)+", BPE, SIZE, STOPS).start()
    first = allowed(constraint)
    assert max(first) < BPE.vocab_size < SIZE
    assert not first & BPE.special_ids
    constraint.accept(BPE.encode("a")[0])
    assert allowed(constraint) & BPE.special_ids == set(STOPS)


def test_a_stop_id_that_has_a_text_is_no_part_of_an_answer() -> None:
    (b,) = BPE.encode("b")
    constraint = grammar.compile("regex", "[abc]{2}", BPE, SIZE, (b,)).start()
    assert b not in allowed(constraint)
    assert BPE.encode("a")[0] in allowed(constraint)
    for _ in range(2):
        constraint.accept(BPE.encode("a")[0])
    assert allowed(constraint) == {b}
    with pytest.raises(EngineError, match="no text that this vocabulary"):
        grammar.compile("regex", "b", BPE, SIZE, (b,))
    constraint = grammar.compile("regex", "ab", BPE, SIZE, (b,)).start()
    constraint.accept(BPE.encode("a")[0])
    with pytest.raises(EngineError, match="only a token that ends the answer"):
        allowed(constraint)


def test_other_stop_ids_do_not_read_the_vocabulary_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """For 100,000 tokens that takes a third of a second, in which no other Python runs."""
    grammar.compile("regex", "[ab]{3}", BPE, SIZE, STOPS)
    monkeypatch.setattr(grammar, "_Vocabulary", None)
    grammar.compile("regex", "[ab]{3}", BPE, SIZE, (*STOPS, BPE.encode("c")[0]))


def test_an_answer_is_complete_when_nothing_can_follow() -> None:
    constraint = grammar.compile("regex", "a(bc)?", BPE, SIZE, STOPS).start()
    states = [constraint.is_complete]
    for letter in "abc":
        constraint.accept(BPE.encode(letter)[0])
        states.append(constraint.is_complete)
    assert states == [False, False, False, True]
    (answer,) = answers("choice", '["mat"]', n=1, stop_ids=())
    assert (answer.text, answer.finished) == ("mat", "stop")


def test_a_token_that_may_not_come_is_an_error() -> None:
    constraint = grammar.compile("regex", "a+", BPE, SIZE, STOPS).start()
    with pytest.raises(EngineError, match="grammar"):
        constraint.accept(BPE.encode("b")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mask_changes_a_row_of_a_batch_in_place_and_no_other(dtype: torch.dtype) -> None:
    logits = torch.randn(3, SIZE, dtype=dtype)
    before = logits.clone()
    grammar.compile("choice", '["a", "cat"]', BPE, SIZE, STOPS).start().mask(logits[1])
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    kept = logits[1].isfinite()
    assert 2 <= int(kept.sum()) <= 5
    assert torch.equal(logits[1][kept], before[1][kept])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_mask_on_a_gpu_is_that_of_the_cpu() -> None:
    constraint = grammar.compile("json_object", "", BPE, SIZE, STOPS).start()
    row = torch.zeros(SIZE, device="cuda")
    constraint.mask(row)
    assert set((row.cpu() == 0).nonzero().flatten().tolist()) == allowed(constraint)


def test_an_answer_that_is_cut_says_so() -> None:
    (answer,) = answers("json_schema", '{"type": "string", "minLength": 300}', n=1, max_tokens=20)
    assert (answer.finished, len(answer.tokens), answer.text[0]) == ("length", 20, '"')


def test_the_answers_of_one_request_do_not_know_of_each_other() -> None:
    together = answers("regex", "[abc]{1,12}", n=5)
    assert len({answer.text for answer in together}) >= 3
    assert all(re.fullmatch("[abc]{1,12}", answer.text) for answer in together)
    assert [answer.text for answer in answers("regex", "[abc]{1,12}", n=2)] == [a.text for a in together[:2]]


def test_preempted_answers_are_the_ones_they_give_alone() -> None:
    schema = json.dumps({"type": "array", "items": {"enum": ["red", "你好", 17]}, "minItems": 4, "maxItems": 6})
    requests = [request("json_schema", schema, tokens=list(range(10, 30)), max_tokens=70, seed=i) for i in range(4)]
    alone = [Engine(MODEL, BPE).generate([one])[0] for one in requests]
    engine = Engine(MODEL, BPE, Limits(cache_tokens=112, length=96, block=4, batch=4))
    assert [a.tokens for a in engine.generate(requests)] == [a.tokens for a in alone]
    assert engine.stats.counters.preemptions > 0


def test_neighbours_without_a_grammar_and_with_one_that_fails_are_left_alone() -> None:
    free = Request(tokens=[20, 21, 22], max_tokens=30, temperature=0)
    wanted = Engine(MODEL, BPE).generate([free])[0].tokens
    a, z = BPE.encode("a")[0], BPE.encode("z")[0]
    assert a < z
    dead = grammar.compile("regex", "az", BPE, z, STOPS)  # a vocabulary that ends before "z"
    got, broken, whole = Engine(MODEL, BPE).generate(
        [free, Request(tokens=[9], grammar=dead), request("choice", '["cat"]', max_tokens=9)]
    )
    assert got.tokens == wanted
    assert (broken.finished, broken.tokens) == ("error", [a])
    assert broken.problem is not None
    assert "no text that this vocabulary can write matches" in broken.problem
    assert (whole.text, whole.finished) == ("cat", "stop")


def nested(depth: int) -> str:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [schema]}
    return json.dumps(schema)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json", "{}", r"is no kind.*json_object, json_schema, .*regex, choice, grammar"),
        ("json_schema", "{", "response_format: is no JSON"),
        pytest.param("json_schema", '{"minimum": NaN}', "NaN is not JSON", marks=PROOF),
        ("json_schema", '{"minimum": ' + "9" * 5000 + "}", "is no JSON"),
        ("json_schema", "true", "a JSON Schema is an object"),
        pytest.param("json_schema", "[]", "a JSON Schema is an object", marks=PROOF),
        ("json_schema", '{"type": "strin"}', "Invalid type: strin"),
        pytest.param(
            "json_schema", '{"enum": []}', "response_format: Unsatisfiable schema: anyOf is empty",
            marks=PROOF,
        ),
        ("json_schema", '{"type": "string", "minLength": 3, "maxLength": 2}', "Unsatisfiable"),
        ("json_schema", '{"$ref": "#"}', "no text that this vocabulary"),
        ("json_schema", json.dumps({"$ref": "#/a", "a": {"$ref": "#/b"}, "b": {"$ref": "#/a"}}), "exceeded"),
        ("json_schema", '{"allOf": [{"$ref": "#"}, {"type": "string"}]}', "circular"),
        ("json_schema", '{"$ref": "http://127.0.0.1:1/schema"}', "does not fetch"),
        pytest.param("json_schema", '{"$ref": "#/$defs/none"}', "does not exist", marks=PROOF),
        ("json_schema", '{"not": {"type": "string"}}', r'Unimplemented keys: \["not"\]'),
        pytest.param(
            "json_schema", '{"x-guidance": {"lenient": true}, "type": "array", "uniqueItems": true}', "uniqueItems",
            marks=PROOF,
        ),
        pytest.param("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf", marks=PROOF),
        ("json_schema", '{"type": "string", "format": "secret"}', "Unknown format: secret"),
        ("json_schema", nested(40), "nested too deeply.*64 levels"),
        ("json_schema", "[" * 50_000, "nested too deeply"),
        ("json_schema", json.dumps({"const": "a" * 70_000}), r"too long.*70,?\d+ characters.*65536"),
        pytest.param("regex", "(", "regex: error: unclosed group", marks=PROOF),
        ("regex", r"(a)\1", "backreference"),
        pytest.param("regex", "(?=a)b", "look-ahead", marks=PROOF),
        ("regex", r"a\bb", "lookarounds"),
        pytest.param("regex", r"[^\s\S]", "no text that this vocabulary", marks=PROOF),
        ("regex", "\ud800", "surrogates"),
        ("regex", "(" * 3000 + "a" + ")" * 3000, "regex: error"),
        ("choice", "yes", "choice: is no JSON"),
        ("choice", "[]", "list of texts, at least one"),
        ("choice", "[1]", "list of texts"),
        ("choice", '["\\ud800"]', "surrogates"),
        ("grammar", "start: foo", r"grammar: at 1\(8\): unknown name: \"foo\""),
        pytest.param("grammar", "start: start", "no text that this vocabulary", marks=PROOF),
        ("grammar", "", "grammar: No 'root' rule found"),
        ("grammar", "root ::= " + "(" * 20_000, "grammar: "),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_soon(kind: str, text: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(EngineError, match=message) as caught:
        grammar.compile(kind, text, BPE, SIZE, STOPS)
    assert time.monotonic() - start < 5
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(a|b)*a(a|b){40}"),
        ("regex", "(((.{1,500}x){1,500}y){1,500}z){1,500}"),
        ("regex", "(a+)+b"),
        ("regex", "|".join(f".*w{i}" for i in range(3000))),
        ("json_schema", '{"type": "string", "pattern": "^(a+)+$"}'),
        ("json_schema", '{"type": "array", "minItems": 1000000000}'),
        ("json_schema", json.dumps({"enum": [f"v{i}" for i in range(4000)]})),
    ],
)
def test_catastrophic_texts_compile_and_step_in_bounded_time(kind: str, text: str) -> None:
    start = time.monotonic()
    (answer,) = answers(kind, text, n=1, max_tokens=30)
    assert answer.finished in ("stop", "length"), answer.problem
    assert time.monotonic() - start < 10


def test_what_would_compile_for_ever_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MOST_SECONDS", 0.5)
    patterns = [{"type": "string", "pattern": f"w{i}"} for i in range(40)]
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"response_format: takes over 0\.5 s to compile"):
        grammar.compile("json_schema", json.dumps({"allOf": patterns}), BPE, SIZE, STOPS)
    assert time.monotonic() - start < 10


def test_what_breaks_the_compiler_breaks_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = tmp_path / "trial.py"
    trial.write_text("import os; os.abort()")
    monkeypatch.setattr(grammar, "_TRIAL", trial)
    with pytest.raises(EngineError, match="regex: takes too much memory to compile, or breaks"):
        grammar.compile("regex", "tried out in a process that breaks", BPE, SIZE, STOPS)


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EngineError, match=re.escape(install_command("serve"))):
        grammar.compile("regex", "not seen before", BPE, SIZE, STOPS)
