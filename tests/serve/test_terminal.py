"""`internlm chat`: turns, commands, interrupts, one-shot and piped use."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from internlm.checkpoint import store
from internlm.cli import main
from internlm.errors import EngineError, TokenizerError, UsageError
from internlm.infer.engine import Delta, Engine, Request
from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.serve.terminal import HIDDEN, Chat, Settings, converse, say
from internlm.text.chat import Message, render_prompt
from internlm.text.templates import get_template
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import train_bpe
from internlm.weights import transformers as folders
from internlm.weights.talk import Talk
from internlm.weights.weight import of_tensors

TOKENIZER = train_bpe(["What is the sum of the numbers? Be brief, and say 4 now."] * 3, 300)
SHAPE = ModelConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, ffn_size=16, context_length=128)
TEMPLATE = get_template("internlm")


class Parrot(Engine):
    """Answers every request with the next of its lines, and keeps the prompts."""

    def __init__(self, *lines: str, max_length: int = 128) -> None:
        super().__init__(build(SHAPE, 0), TOKENIZER, max_length=max_length)
        self.lines, self.requests = list(lines), []

    def stream(self, request: Request) -> Iterator[Delta]:  # type: ignore[override]
        self.requests.append(request)
        words = self.lines.pop(0).split(" ")
        for number, word in enumerate(words):
            yield Delta(0, [1], word + " " * (number < len(words) - 1), "stop" if number == len(words) - 1 else None)


def talk(chat: Chat, *lines: str) -> str:
    script = iter(lines)

    def read() -> str:
        try:
            return next(script)
        except StopIteration:
            raise EOFError from None

    out = io.StringIO()
    converse(chat, read, out)
    return out.getvalue()


def test_every_question_sees_the_turns_before_it() -> None:
    engine = Parrot("It is 4.", "And now 5.")
    assert talk(Chat(engine, TEMPLATE, Settings(system="Be brief.")), "What?", "More?") == "It is 4.\nAnd now 5.\n"
    turns = [Message("system", "Be brief."), Message("user", "What?")]
    assert engine.requests[0].tokens == render_prompt(turns, TEMPLATE, TOKENIZER)
    turns += [Message("assistant", "It is 4."), Message("user", "More?")]
    assert engine.requests[1].tokens == render_prompt(turns, TEMPLATE, TOKENIZER)
    assert set(engine.requests[0].stop_ids) == {TOKENIZER.eos_id, TOKENIZER.special("<|end|>")}


def test_clear_forgets_and_exit_leaves() -> None:
    engine = Parrot("one", "two", "never")
    assert talk(Chat(engine, TEMPLATE, Settings()), "a", "/clear", "b", "/exit", "c") == "one\ntwo\n"
    assert engine.requests[1].tokens == render_prompt([Message("user", "b")], TEMPLATE, TOKENIZER)


def test_help_and_unknown_commands_ask_nothing() -> None:
    notes: list[str] = []
    engine = Parrot("reply")
    out = talk(Chat(engine, TEMPLATE, Settings(), notes.append), "/help", "/quit", "  ", "/usr/bin is what?")
    assert "/clear" in out
    assert "no such command: /quit" in notes[0]
    assert len(engine.requests) == 1, "a path is a question, not a command"


def test_a_base_model_continues_and_remembers_nothing() -> None:
    engine = Parrot("x", "y")
    talk(Chat(engine, None, Settings()), "Once upon", "a time")
    assert engine.requests[0].tokens == [TOKENIZER.bos_id, *TOKENIZER.encode("Once upon")]
    assert engine.requests[1].tokens == [TOKENIZER.bos_id, *TOKENIZER.encode("a time")]
    assert engine.requests[1].continuation


def test_the_oldest_turns_are_dropped_when_the_context_is_full_and_that_is_said() -> None:
    notes: list[str] = []
    engine = Parrot(*["What is the sum of the numbers? say"] * 8, max_length=64)
    chat = Chat(engine, TEMPLATE, Settings(max_tokens=16), notes.append)
    talk(chat, *[f"What is the sum? {i}" for i in range(8)])
    assert all(len(request.tokens) <= 48 for request in engine.requests)
    assert any("oldest 1 turn dropped" in note for note in notes)
    assert chat.history[-2].content == "What is the sum? 7"
    assert chat.history[0].content != "What is the sum? 0"


def test_a_question_longer_than_the_context_is_refused_and_the_conversation_goes_on() -> None:
    notes: list[str] = []
    chat = Chat(Engine(build(SHAPE, 0), TOKENIZER), TEMPLATE, Settings(max_tokens=2, seed=0), notes.append)
    talk(chat, "What is the sum? " * 40, "What?")
    assert "tokens are too many" in notes[0]
    assert not any("too many" in note for note in notes[1:])


def test_a_refused_question_leaves_the_conversation_as_it_was() -> None:
    notes: list[str] = []
    chat = Chat(Engine(build(SHAPE, 0), TOKENIZER), TEMPLATE, Settings(max_tokens=2, seed=0), notes.append)
    chat.history = before = [Message("user", "a"), Message("assistant", "b")]
    with pytest.raises(EngineError, match="too many"):
        list(chat.answer("What is the sum? " * 40))
    assert chat.history == before == [Message("user", "a"), Message("assistant", "b")]
    assert not any("dropped" in note for note in notes)


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said() -> None:
    class Interrupted(Parrot):
        def stream(self, request: Request) -> Iterator[Delta]:  # type: ignore[override]
            for number, delta in enumerate(super().stream(request)):
                if number == 1:
                    os.kill(os.getpid(), signal.SIGINT)
                yield delta

    engine = Interrupted("one two three four", "fine")
    before = signal.getsignal(signal.SIGINT)
    chat = Chat(engine, TEMPLATE, Settings())
    assert talk(chat, "count") == "one two \n"
    assert chat.last[2] == "abort"
    assert chat.history[-1] == Message("assistant", "one two ")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_format_with_one_question_forgets_the_one_before() -> None:
    engine = Parrot("x", "y")
    chat = Chat(engine, get_template("alpaca"), Settings())
    talk(chat, "a", "b")
    assert engine.requests[1].tokens == render_prompt([Message("user", "b")], get_template("alpaca"), TOKENIZER)


def test_control_characters_do_not_reach_the_terminal() -> None:
    out = io.StringIO()
    answer = say(Chat(Parrot("a\x1b[2J\tb\nc\x07"), TEMPLATE, Settings()), "x", out)
    assert out.getvalue() == "a[2J\tb\nc\n"
    assert answer == "a\x1b[2J\tb\nc\x07"


def test_what_does_not_fit_is_said_before_the_first_question() -> None:
    with pytest.raises(UsageError, match="no place for a system message"):
        Chat(Parrot(), get_template("internlm-v1.0"), Settings(system="x"))
    with pytest.raises(TokenizerError, match="no such special token"):
        Chat(Parrot(), get_template("chatml"), Settings())
    with pytest.raises(UsageError, match="needs a tokenizer"):
        Chat(Engine(build(SHAPE, 0)), None, Settings())


def test_the_same_seed_gives_the_same_conversation() -> None:
    def conversation(seed: int) -> str:
        chat = Chat(Engine(build(SHAPE, 0), TOKENIZER), TEMPLATE, Settings(seed=seed, max_tokens=6))
        return talk(chat, "a", "a")

    assert conversation(1) == conversation(1)
    assert conversation(1) != conversation(2)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "out"
    folders.export(of_tensors(build(SHAPE, 0).named_parameters()), SHAPE, folder, Talk(TOKENIZER, "internlm"))
    return folder


OPTIONS = ["--temperature", "0", "--max-tokens", "5"]


def test_a_piped_question_is_answered_like_one_given_with_p(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "internlm", "chat", str(exported), *OPTIONS]
    piped = subprocess.run(command, input=b"What is\nthe sum?\n", capture_output=True, timeout=120)
    assert piped.returncode == 0, piped.stderr.decode()
    assert main(["chat", str(exported), "-p", "What is\nthe sum?", *OPTIONS]) == 0
    answer = capsys.readouterr().out
    assert piped.stdout.decode() == answer
    assert main(["chat", str(exported), "-p", "What is\nthe sum?", "--json", *OPTIONS]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["answer"].translate(HIDDEN) + "\n" == answer
    assert (facts["tokens"], facts["finished"]) == (5, "length")
    prompt = render_prompt([Message("user", "What is\nthe sum?")], TEMPLATE, Tokenizer.load(exported))
    assert facts["prompt_tokens"] == len(prompt)


def test_a_checkpoint_of_a_run_answers_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TOKENIZER.save(tmp_path / "tokenizer")
    tensors = {f"model.{name}": p.detach() for name, p in build(SHAPE, 0).named_parameters()}
    for template in ("internlm", None):
        run = tmp_path / str(template)
        store.save(store.path_of(run, 3), tensors, SHAPE, tmp_path / "tokenizer", {"step": 3, "template": template})
        assert main(["chat", str(run), "-p", "What?", *OPTIONS]) == 0
        said = capsys.readouterr()
        assert said.out
        assert ("no chat format is recorded" in said.err) == (template is None)


@pytest.mark.parametrize(
    ("words", "stdin", "code", "message"),
    [
        (["nothing", "-p", "x"], "", 1, "no such folder"),
        (["MODEL"], "\n", 2, "the question is empty"),
        (["MODEL", "-p", ""], "", 2, "the question is empty"),
        (["MODEL", "-p", "x", "--template", "internln"], "", 1, "Did you mean 'internlm'?"),
        (["MODEL", "-p", "x", "--temperature", "-1"], "", 1, "temperature: is out of range"),
        (["MODEL", "-p", "x", "--template", "none", "--system", "y"], "", 2, "no place for a system message"),
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
