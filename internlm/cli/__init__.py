"""The command line: `internlm VERB …`. One file per verb; nothing heavy is imported before the verb is known.

A verb module has `DESCRIPTION`, `add_arguments(parser)` and `run(arguments) -> int`. Exit codes: 0 done, 1 failed,
2 wrong usage; an interrupt exits with 130. Of several ranks each exits so, and its messages bear its number.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence

from internlm import __version__
from internlm.errors import InternLMError, UsageError, did_you_mean

VERBS = {
    "data": "build, tokenize and look at training data",
    "tokenizer": "train and look at tokenizers",
    "train": "train a model from a recipe",
    "launch": "start a training on several ranks, of one machine or more",
    "monitor": "show a run that is under way, or over",
    "checkpoints": "list and check the checkpoints of a run",
    "convert": "convert weights between formats",
    "chat": "talk to a model in the terminal",
    "serve": "serve a model to OpenAI's clients",
    "web": "serve a model and open its chat page",
    "deploy": "hand a model over to LMDeploy, vLLM, SGLang or llama.cpp",
    "doctor": "show versions, devices and which fast paths are active",
}

KEY_VARIABLE = "INTERNLM_API_KEY"
"""Environment variable of the key that a server asks for, and a client sends."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the process's exit code; a rank ends here."""
    code = _main(argv)
    if "internlm.ranks" in sys.modules:
        from internlm import ranks

        ranks.end(code)
    return code


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    name = f"internlm {words[0]}" if words and words[0] in VERBS else "internlm"
    speaker = f"[rank {_rank(words)}] " if _rank(words) else ""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal of another encoding cannot show becomes a ?
    try:
        return _run(words)
    except InternLMError as error:
        print(f"{speaker}{name}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if not speaker:
            print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `internlm … | head`
        sys.stderr.close()
        return 1
    except OSError as error:
        print(f"{speaker}{name}: error: {error.strerror or error} ({error.filename or 'output'})", file=sys.stderr)
        return 1


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(), flush=True)
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"internlm {__version__}", flush=True)
        return 0
    verb = words[0]
    if verb not in VERBS:
        advice = did_you_mean(verb, VERBS) or f"Verbs: {', '.join(VERBS)}"
        raise UsageError(f"unknown verb {verb!r}. {advice}")
    module = importlib.import_module(f"internlm.cli.{verb}")
    parser = argparse.ArgumentParser(
        prog=f"internlm {verb}", description=module.DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    arguments = parse(parser, words[1:], getattr(module, "advise", None))
    from internlm import log, ranks

    if verb == "train":
        ranks.adopt_slurm()
    log.setup(rank=_rank(words))
    code: int = module.run(arguments)
    if sys.stdout is not None:
        sys.stdout.flush()  # a disk that is full says so here, not after the exit code
    return code


def _rank(words: Sequence[str]) -> int:
    """Return the number of this process: only a training, which checks it, has ranks."""
    number = os.environ.get("RANK", "")
    return int(number) if words[:1] == ["train"] and number.isascii() and number.isdigit() else 0


Advise = Callable[[list[str], list[str]], str]
"""Says what to do about options that a verb lacks, given those and all words."""


def parse(parser: argparse.ArgumentParser, words: list[str], advise: Advise | None = None) -> argparse.Namespace:
    """Return the arguments; `key=value` may stand before and after options. What is wrong ends the process."""
    try:
        arguments, unknown = parser.parse_known_intermixed_args(words)
    except TypeError:  # argparse knows no mixture where there are verbs below the verb
        arguments, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{'. ' + advise(unknown, words) if advise else ''}")
    return arguments


def add_placement(add: Callable[..., object]) -> None:
    """Declare where a model answers, with a parser's `add_argument`."""
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    kinds = ["fp32", "fp16", "bf16", "int8", "none"]
    add("--pack", choices=kinds, metavar="KIND", help="on a CPU: fp32 (default, exact), fp16, bf16, int8, none")


def _overview() -> str:
    lines = [f"internlm {__version__}: from text to a talking model", "", "usage: internlm VERB [options]", ""]
    lines += [f"  {verb:12}{text}" for verb, text in VERBS.items()]
    lines += ["", "`internlm VERB --help` says more."]
    return "\n".join(lines)
