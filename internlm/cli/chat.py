"""`internlm chat`: talk to a model in the terminal."""

from __future__ import annotations

import argparse
import io
import json
import sys
from typing import TYPE_CHECKING

from internlm.errors import UsageError

if TYPE_CHECKING:
    from internlm.serve.terminal import Chat

DESCRIPTION = """\
Talk to a model: a run, a checkpoint or a Transformers folder.

  internlm chat out                               questions and answers; /help, /clear, /exit; Ctrl-C stops an answer
  internlm chat out -p "What is a prime?"         one question
  internlm chat out < question.txt                the whole input is one question
  internlm chat runs/a --temperature 0            always the most probable token

A model trained without a chat format goes on with the text it is given. Remarks go to stderr, answers to stdout."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="DIR", help="run, checkpoint or Transformers folder")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="ask this and leave")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--template", metavar="NAME", help="chat format (default: as recorded); `none`: continue text")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="default: %(default)s; 0: greedy")
    parser.add_argument("--top-p", type=float, default=0.8, metavar="P", help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of an answer; default: %(default)s")
    parser.add_argument("--seed", type=int, metavar="S", help="makes answers repeatable")
    parser.add_argument("--device", default="auto", help="cpu, cuda, … (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object (with -p or piped input)")


def run(arguments: argparse.Namespace) -> int:
    """Answer one question, or converse."""
    from internlm.serve import terminal

    question = arguments.prompt
    if question is None and sys.stdin is None:
        raise UsageError("there is no input to read a question from", do="Give -p TEXT.")
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")
    if question is None and arguments.json:
        raise UsageError("--json needs a question", do="Give -p, or pipe one in.")
    if question is not None and not question.strip():
        raise UsageError("the question is empty", do="Give -p TEXT, or pipe a text in.")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer may hold what the terminal cannot show
    chat = _open(arguments)
    if question is None:
        return _talk(chat)
    if not arguments.json:
        terminal.say(chat, question, sys.stdout)
    else:
        answer = "".join(chat.answer(question))
        prompt_tokens, tokens, finished = chat.last
        facts = {"answer": answer, "prompt_tokens": prompt_tokens, "tokens": tokens, "finished": finished}
        print(json.dumps(facts, ensure_ascii=False))
    return 130 if chat.last[2] == "abort" else 0


def _open(arguments: argparse.Namespace) -> Chat:
    """Return a conversation with the model."""
    import secrets

    import torch

    from internlm.checkpoint.source import open_source
    from internlm.infer.engine import Engine
    from internlm.serve.terminal import Chat, Settings, note_to_stderr
    from internlm.text.templates import get_template

    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise UsageError("no such device here", where="--device", got=device, allowed=["auto", "cpu", "cuda"])
    source = open_source(arguments.model)
    name = arguments.template or source.talk.template
    if name is None:
        note_to_stderr("no chat format is recorded: the model goes on with your text; --template NAME chooses one")
    template = None if name in (None, "none") else get_template(name)
    # bf16 products are several times slower than fp32 on CPUs without AMX.
    model = source.model(torch.float32 if device == "cpu" else torch.bfloat16, device)
    engine = Engine(model, source.talk.tokenizer, max_batch=1, seed=secrets.randbits(30))
    settings = Settings(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        system=arguments.system,
        stops=source.talk.stops,
    )
    return Chat(engine, template, settings, note_to_stderr)


def _talk(chat: Chat) -> int:
    """Converse at a terminal."""
    import contextlib

    from internlm.serve.terminal import converse

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (editing and history at the prompt)
    print("/help lists the commands, /exit leaves", file=sys.stderr)
    converse(chat, lambda: input("\n> "), sys.stdout)
    return 0
