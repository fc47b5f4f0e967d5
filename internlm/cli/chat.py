"""`internlm chat`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from internlm.cli import KEY_VARIABLE, add_placement
from internlm.errors import UsageError

if TYPE_CHECKING:
    from internlm.serve.chat.answer import Answerer, Settings
    from internlm.serve.chat.conversation import Chat
    from internlm.serve.chat.terminal import Screen

DESCRIPTION = """\
Talk to a model: a run, a checkpoint or a Transformers folder, or one behind an OpenAI-style URL.

  internlm chat out                               questions and answers; /help says more; Ctrl-C stops an answer
  internlm chat out -p "What is a prime?"         one question
  internlm chat out < question.txt                the whole input is one question
  internlm chat runs/a --temperature 0            always the most probable token
  internlm chat --url http://127.0.0.1:8000       the same with the model of a server

A model trained without a chat format goes on with the text it is given. Remarks go to stderr, answers to stdout."""

_ENGINES = ("turbomind", "pytorch", "torch")
"""LMDeploy's: `lmdeploy chat turbomind DIR`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("words", metavar="DIR", nargs="*", help="run, checkpoint, Transformers folder, GGUF file …")
    parser.add_argument("--url", help="of a server, in the place of DIR")
    parser.add_argument("--model", "--model-name", metavar="NAME", help="the server's model (default: its first)")
    parser.add_argument("--api-key", metavar="KEY", help=f"of the server; better in {KEY_VARIABLE}")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="ask this and leave")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--template", metavar="NAME", help="chat format (default: as recorded); `none`: continue text")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="default: %(default)s; 0: greedy")
    parser.add_argument("--top-p", type=float, default=0.8, metavar="P", help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="default: 0, all tokens")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of an answer; default: %(default)s")
    parser.add_argument("--seed", type=int, metavar="S", help="makes answers repeatable")
    add_placement(parser.add_argument)
    parser.add_argument("--json", action="store_true", help="print one JSON object (with -p or piped input)")
    parser.add_argument("--no-history", action="store_true", help="do not remember what is typed")


def run(arguments: argparse.Namespace) -> int:
    """Answer one question, or converse."""
    from internlm.serve.chat.answer import Settings
    from internlm.serve.chat.conversation import Chat
    from internlm.serve.chat.terminal import Screen, Terminal, say

    question = _question(arguments)
    screen = Screen(sys.stdout, sys.stderr)
    settings = Settings(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
    )
    chat = Chat(_answerer(arguments, settings, screen), settings, arguments.system, screen.note)
    if question is None:
        from internlm.serve.chat.lines import InputHistory, open_input, state_file

        inputs = InputHistory(None if arguments.no_history else state_file())
        screen.note(f"{chat.answerer.name}; /help lists the commands, /exit leaves")
        Terminal(chat, screen, inputs).converse(open_input(inputs))
        return 0
    if not arguments.json:
        say(chat, chat.answer(question), screen)
    else:
        answer = "".join(chat.answer(question))
        print(json.dumps({"answer": answer, **_facts(chat)}, ensure_ascii=False))
    return 130 if chat.last is not None and chat.last.finished == "abort" else 0


def _question(arguments: argparse.Namespace) -> str | None:
    """Return the one question there is to ask; None where a person will type."""
    question: str | None = arguments.prompt
    if question is None and sys.stdin is None:
        raise UsageError("there is no input to read a question from", do="Give -p TEXT.")
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")
    if question is None and arguments.json:
        raise UsageError("--json needs a question", do="Give -p, or pipe one in.")
    if question is not None and not question.strip():
        raise UsageError("the question is empty", do="Give -p TEXT, or pipe a text in.")
    return question


def _answerer(arguments: argparse.Namespace, settings: Settings, screen: Screen) -> Answerer:
    """Return who answers."""
    words = list(arguments.words)
    if len(words) == 2 and words[0] in _ENGINES:
        screen.note(f"`{words.pop(0)}` is an engine of LMDeploy; here there is one engine, and it needs no name")
    if arguments.url is not None:
        if words:
            raise UsageError("give a folder or --url, not both", got=words[0])
        for name in ("template", "device", "pack"):
            if getattr(arguments, name) is not None:
                raise UsageError("is the server's business, and means nothing with --url", where=f"--{name}")
        from internlm.infer.client import Client
        from internlm.serve.chat.answer import FromServer

        key = (arguments.api_key or os.environ.get(KEY_VARIABLE, "")).strip()  # without the line end of a file
        return FromServer(Client(arguments.url, arguments.model, key or None))
    if len(words) != 1:
        raise UsageError("give one folder of a model, or --url", got=" ".join(words) or None)
    if arguments.api_key is not None:
        raise UsageError("means nothing without --url", where="--api-key")
    if arguments.model is not None:
        screen.note(f"--model {arguments.model} has no effect without --url; --template chooses a chat format")
    return _engine(arguments, words[0], settings, screen)


def _engine(arguments: argparse.Namespace, path: str, settings: Settings, screen: Screen) -> Answerer:
    import secrets

    from internlm.infer.engine import Engine, Limits
    from internlm.infer.placement import Placement
    from internlm.serve.chat import local
    from internlm.source import Hints, open_source
    from internlm.text.templates import TEMPLATES

    place = Placement.here(arguments.device, arguments.pack, alone=True)
    source = open_source(path, Hints(template=arguments.template))
    if source.talk.template is None and arguments.template is None:
        names = ", ".join(TEMPLATES)
        screen.note(f"no chat format is recorded: the model goes on with your text; --template chooses one of {names}")
    source.talk.check(source.config.vocab_size)  # all this now, not after the weights were read
    local.check(settings, arguments.system, source.talk.format)
    engine = Engine.of(source, place, Limits.on(place.device, batch=1), seed=secrets.randbits(30))
    return local.FromEngine(engine, source.talk, path)


def _facts(chat: Chat) -> dict[str, object]:
    """Return what --json says beside the answer."""
    assert chat.last is not None, "an answer was given"
    names = ("prompt_tokens", "cached_tokens", "tokens", "finished", "first_s", "seconds")
    found = {name: getattr(chat.last, name) for name in names}
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}
