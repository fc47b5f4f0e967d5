"""`internlm chat` with a model in the process: prompts, context, one-shot and piped use."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from internlm.checkpoint import listing
from internlm.cli import main
from internlm.errors import EngineError, InternLMError, TokenizerError, UsageError
from internlm.infer.engine import Engine, Limits
from internlm.infer.request import Request
from internlm.model.transformer import Transformer, build
from internlm.serve.chat.answer import Settings
from internlm.serve.chat.conversation import Chat
from internlm.serve.chat.local import FromEngine
from internlm.serve.chat.terminal import HIDDEN
from internlm.text.chat import Message, render_prompt
from internlm.text.templates import TEMPLATES, get_template
from internlm.text.tokenizer import Tokenizer
from internlm.weights.talk import Talk
from tests.models import save_checkpoint
from tests.serve.parrots import ENDLESS, SHAPE, TOKENIZER, chain_model, export

TEMPLATE = get_template("internlm")
TALK = Talk(TOKENIZER, "internlm")


class Watched(Engine):
    """Keeps the requests."""

    def __init__(self, model: Transformer, limits: Limits | None = None) -> None:
        super().__init__(model, TOKENIZER, limits)
        self.requests: list[Request] = []

    def add(self, request: Request) -> int:
        self.requests.append(request)
        return super().add(request)


def endless(template: str | None = "internlm", **limits: int) -> tuple[Watched, FromEngine]:
    engine = Watched(chain_model(ENDLESS, SHAPE), Limits(batch=1, **limits))
    return engine, FromEngine(engine, Talk(TOKENIZER, template))


GREEDY = Settings(temperature=0, max_tokens=6)


def test_the_prompt_is_the_conversation_in_the_chat_format() -> None:
    engine, answerer = endless()
    chat = Chat(answerer, GREEDY, "Be brief.")
    first = "".join(chat.answer("What?"))
    "".join(chat.answer("More?"))
    turns = [Message("system", "Be brief."), Message("user", "What?")]
    assert engine.requests[0].tokens == render_prompt(turns, TEMPLATE, TOKENIZER)
    turns += [Message("assistant", first), Message("user", "More?")]
    assert engine.requests[1].tokens == render_prompt(turns, TEMPLATE, TOKENIZER)
    assert set(engine.requests[0].stop_ids) == {TOKENIZER.eos_id, TOKENIZER.special("<|end|>")}


def test_the_answer_is_what_the_model_says_in_whole_characters() -> None:
    _, answerer = endless()
    pieces = list(answerer.answer([Message("user", "a")], Settings(temperature=0, max_tokens=30)))
    assert "".join(pieces).startswith(ENDLESS + ENDLESS)
    assert "你" in pieces
    assert not any("\ufffd" in piece for piece in pieces[:-1])


def test_every_setting_reaches_the_engine() -> None:
    engine, answerer = endless()
    values = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "max_tokens": 3, "seed": 9,
    }  # fmt: skip
    list(answerer.answer([Message("user", "a")], Settings(**values, stop=("x",))))  # type: ignore[arg-type]
    assert {name: getattr(engine.requests[0], name) for name in values} == values
    assert engine.requests[0].stop_strings == ("x",)
    assert set(Settings().as_json()) == values.keys() | {"stop"}


def test_a_base_model_continues_and_remembers_nothing() -> None:
    engine, answerer = endless(None)
    chat = Chat(answerer, GREEDY)
    for question in ("Once upon", "a time"):
        "".join(chat.answer(question))
    assert engine.requests[0].tokens == [TOKENIZER.bos_id, *TOKENIZER.encode("Once upon")]
    assert engine.requests[1].tokens == [TOKENIZER.bos_id, *TOKENIZER.encode("a time")]
    assert engine.requests[1].continuation


def test_a_format_with_one_question_sends_only_the_last() -> None:
    alpaca = get_template("alpaca")
    engine, answerer = endless("alpaca", length=120)
    chat = Chat(answerer, GREEDY, "Brief.")
    for question in ("a", "b"):
        "".join(chat.answer(question))
    expected = [Message("system", "Brief."), Message("user", "b")]
    assert engine.requests[1].tokens == render_prompt(expected, alpaca, TOKENIZER)


def test_a_long_conversation_keeps_room_for_an_answer() -> None:
    notes: list[str] = []
    engine, answerer = endless(length=64)
    chat = Chat(answerer, Settings(temperature=0, max_tokens=16), note=notes.append)
    for number in range(8):
        assert "".join(chat.answer(f"What is the sum? {number}")) == "Be 4你say.Be 4你s"
    assert all(len(request.tokens) <= 48 for request in engine.requests)
    assert any("oldest 1 turn dropped" in note for note in notes)
    assert chat.history[-2].content == "What is the sum? 7"
    assert chat.history[0].content != "What is the sum? 0"


def test_a_question_longer_than_the_context_is_refused_and_the_conversation_stays_as_it_was() -> None:
    notes: list[str] = []
    _, answerer = endless()
    chat = Chat(answerer, GREEDY, note=notes.append)
    chat.history = before = [Message("user", "a"), Message("assistant", "b")]
    with pytest.raises(EngineError, match="tokens are too many"):
        list(chat.answer("What is the sum? " * 40))
    assert chat.history == before == [Message("user", "a"), Message("assistant", "b")]
    assert not notes
    assert "".join(chat.answer("What?"))


def test_an_answer_that_is_cut_says_what_cut_it() -> None:
    notes: list[str] = []
    _, answerer = endless(length=32)
    chat = Chat(answerer, GREEDY, note=notes.append)
    "".join(chat.answer("a"))
    assert notes == ["the answer was cut after 6 tokens (max_tokens)"]
    chat.use(Settings(temperature=0, max_tokens=1000), None)
    chat.clear()
    "".join(chat.answer("a"))
    assert "(the model's context)" in notes[1]


def test_a_broken_model_fails_the_answer_and_not_the_chat() -> None:
    model = chain_model(ENDLESS, SHAPE)
    chat = Chat(FromEngine(Engine(model, TOKENIZER), TALK), GREEDY)
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(EngineError, match="the answer failed: the model gives logits that are not finite"):
        list(chat.answer("a"))
    assert not chat.history
    with torch.no_grad():
        model.head.weight[0, 0] = 0
    assert "".join(chat.retry())


def test_an_answer_that_is_left_early_frees_its_place_and_is_kept() -> None:
    engine, answerer = endless(step_tokens=8)
    chat = Chat(answerer, Settings(temperature=0, max_tokens=100))
    pieces = chat.answer("a")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert (chat.history[1].content, chat.last and chat.last.finished) == (said, "abort")
    assert engine.stats.running == engine.stats.waiting == 0
    assert "".join(chat.answer("What is the sum of the numbers?")).startswith(ENDLESS)


def test_an_interrupt_is_heard_while_a_long_prompt_is_read() -> None:
    engine, answerer = endless(step_tokens=8)
    steps = 0
    step = engine.step

    def watched() -> list:
        nonlocal steps
        steps += 1
        answerer.interrupt()
        return step()

    engine.step = watched  # type: ignore[method-assign]
    assert not "".join(answerer.answer([Message("user", "What is the sum? " * 8)], GREEDY))
    assert steps == 2, "one of the prompt, one that ends it"
    assert answerer.facts.finished == "abort"


def test_a_step_that_ctrl_c_breaks_off_ends_the_answer_and_not_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, answerer = endless()
    chat = Chat(answerer, Settings(temperature=0, max_tokens=100))
    pieces = chat.answer("a")
    said = next(pieces)

    def breaks(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.cache, "run", breaks)
        with pytest.raises(KeyboardInterrupt):
            next(pieces)
    assert chat.history[1].content == said
    assert engine.stats.running == engine.stats.waiting == 0
    assert "".join(chat.answer("b")).startswith(ENDLESS)


def test_facts_count_tokens_and_what_was_cached() -> None:
    _, answerer = endless(block=4)
    chat = Chat(answerer, GREEDY)
    for question in ("What is the sum?", "More?"):
        "".join(chat.answer(question))
    facts = chat.last
    assert facts is not None
    prompt = render_prompt([*chat.history[:2], Message("user", "More?")], TEMPLATE, TOKENIZER)
    assert (facts.prompt_tokens, facts.tokens, facts.finished) == (len(prompt), 6, "length")
    first = len(render_prompt(chat.history[:1], TEMPLATE, TOKENIZER)) + 5  # what ends an answer is not computed
    assert facts.cached_tokens == first // 4 * 4, "the first turn, in whole blocks"
    assert facts.first_s is not None
    assert 0 < facts.first_s < facts.seconds


def test_what_does_not_fit_is_said_before_the_first_question() -> None:
    engine = Engine(build(SHAPE, 0), TOKENIZER)
    with pytest.raises(UsageError, match="no place for a system message"):
        Chat(FromEngine(engine, Talk(TOKENIZER)), system="x")
    with pytest.raises(TokenizerError, match="no such special token"):
        FromEngine(engine, Talk(TOKENIZER, "chatml"))
    with pytest.raises(UsageError, match="needs a tokenizer"):
        FromEngine(Engine(build(SHAPE, 0)), Talk())
    with pytest.raises(EngineError, match="top_k: is out of range"):
        Chat(FromEngine(engine, Talk(TOKENIZER)), Settings(top_k=-1))


@pytest.mark.parametrize(
    "line", ["temperature nan", "temperature inf", "top_p -inf", "seed 1e3", "seed -1", "stop [1]", "max_tokens 1e999"]
)
def test_numbers_that_are_none_are_refused(line: str) -> None:
    chat = Chat(FromEngine(Engine(build(SHAPE, 0), TOKENIZER), Talk(TOKENIZER)))
    before = chat.settings
    with pytest.raises(InternLMError):
        chat.use(before.parsed(*line.split(" ", 1)), None)
    assert chat.settings == before


def test_the_greatest_seed_is_good_for_many_answers() -> None:
    chat = Chat(FromEngine(Engine(build(SHAPE, 0), TOKENIZER), TALK), Settings(seed=2**63 - 1, max_tokens=2))
    for _ in range(2):
        "".join(chat.answer("a"))
    assert chat.answers == 2


def test_the_same_seed_gives_the_same_conversation() -> None:
    def conversation(seed: int) -> list[Message]:
        chat = Chat(FromEngine(Engine(build(SHAPE, 0), TOKENIZER), TALK), Settings(seed=seed, max_tokens=6))
        for _ in range(2):
            "".join(chat.answer("a"))
        return chat.history

    assert conversation(1) == conversation(1)
    assert conversation(1) != conversation(2)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(build(SHAPE, 0), SHAPE, tmp_path_factory.mktemp("model") / "out")


OPTIONS = ["--temperature", "0", "--max-tokens", "5"]


def test_a_piped_question_is_answered_like_one_given_with_p(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What is\nthe sum?\n")))
    assert main(["chat", str(exported), *OPTIONS]) == 0
    piped = capsys.readouterr().out
    assert main(["chat", str(exported), "-p", "What is\nthe sum?", *OPTIONS]) == 0
    answer = capsys.readouterr().out
    assert piped == answer
    assert main(["chat", str(exported), "-p", "What is\nthe sum?", "--json", *OPTIONS]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["answer"].translate(HIDDEN) + "\n" == answer
    assert (facts["tokens"], facts["finished"], facts["cached_tokens"]) == (5, "length", 0)
    assert facts["seconds"] > 0
    prompt = render_prompt([Message("user", "What is\nthe sum?")], TEMPLATE, Tokenizer.load(exported))
    assert facts["prompt_tokens"] == len(prompt)


def test_a_checkpoint_of_a_run_answers_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in build(SHAPE, 0).named_parameters()}
    for template in ("internlm", None):
        run = tmp_path / str(template)
        meta = {"step": 3, "template": template}
        save_checkpoint(run / "checkpoints" / listing.name_of(3), tensors, SHAPE, TOKENIZER, meta)
        assert main(["chat", str(run), "-p", "What?", *OPTIONS]) == 0
        said = capsys.readouterr()
        assert said.out
        assert (f"--template chooses one of {', '.join(TEMPLATES)}" in said.err) == (template is None)


def test_the_spelling_of_lmdeploy_is_understood_with_a_note(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(exported), "-p", "x", *OPTIONS]) == 0
    plain = capsys.readouterr()
    words = ["chat", "turbomind", str(exported), "--model-name", "internlm-chat-7b", "-p", "x", *OPTIONS]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out == plain.out
    assert "`turbomind` is an engine of LMDeploy" in said.err
    assert "--model internlm-chat-7b has no effect" in said.err


@pytest.mark.parametrize(
    ("words", "stdin", "code", "message"),
    [
        (["nothing", "-p", "x"], "", 1, "no such folder"),
        (["MODEL"], "\n", 2, "the question is empty"),
        (["MODEL", "-p", ""], "", 2, "the question is empty"),
        (["MODEL", "-p", "x", "--template", "internln"], "", 1, "Did you mean 'internlm'?"),
        (["MODEL", "-p", "x", "--temperature", "-1"], "", 1, "temperature: is out of range"),
        (["MODEL", "-p", "x", "--top-k", "-1"], "", 1, "top_k: is out of range"),
        (["MODEL", "-p", "x", "--template", "none", "--system", "y"], "", 2, "no place for a system message"),
        (["MODEL", "-p", "x", "--device", "abacus"], "", 2, "no such device"),
        (["MODEL", "-p", "x", "--api-key", "k"], "", 2, "--api-key: means nothing without --url"),
        (["-p", "x"], "", 2, "give one folder of a model, or --url"),
        (["lmdeploy", "MODEL", "-p", "x"], "", 2, "give one folder"),
        (["MODEL", "--url", "http://127.0.0.1:1", "-p", "x"], "", 2, "not both"),
        (["--url", "http://127.0.0.1:1", "--device", "cpu", "-p", "x"], "", 2, "--device: is the server's business"),
        (["--url", "127.0.0.1:1", "-p", "x"], "", 1, "is no URL"),
    ],
)
def test_wrong_use_says_what_is_wrong(
    words: list[str],
    stdin: str,
    code: int,
    message: str,
    exported: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    assert main(["chat", *(word.replace("MODEL", str(exported)) for word in words)]) == code
    assert message in capsys.readouterr().err


def test_json_needs_a_question(exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    assert main(["chat", str(exported), "--json"]) == 2
    assert "--json needs a question" in capsys.readouterr().err
