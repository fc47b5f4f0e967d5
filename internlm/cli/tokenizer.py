"""`internlm tokenizer train|inspect`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

DESCRIPTION = """\
Train and look at tokenizers.

  internlm tokenizer train corpus/*.jsonl --vocab-size 4096 --out runs/tokenizer
  internlm tokenizer inspect runs/tokenizer --text "def hello():"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the two actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="train|inspect")
    train = actions.add_parser("train", help="train a byte-level BPE tokenizer on text files")
    train.add_argument("input", nargs="+", help="text files (one document each), or .jsonl with a text in each line")
    train.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    train.add_argument(
        "--vocab-size", required=True, type=int, metavar="N", help="ids in all, bytes and special tokens too"
    )
    train.add_argument("--text-key", default="text", metavar="KEY", help="the text's key in .jsonl (default: text)")
    train.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="what becomes of bad records")
    train.add_argument("--force", action="store_true", help="replace a tokenizer that is there already")
    inspect = actions.add_parser("inspect", help="show a tokenizer, and what it makes of a text")
    inspect.add_argument("tokenizer", help="a .model file, a tokenizer.json, or a folder with one of them")
    inspect.add_argument("--text", help="text to take apart")


def run(arguments: argparse.Namespace) -> int:
    """Do the action and return the exit code."""
    return _train(arguments) if arguments.action == "train" else _inspect(arguments)


def _train(arguments: argparse.Namespace) -> int:
    from internlm.data.formats import find_files
    from internlm.text import training

    files = find_files(arguments.input)  # each once, however often it is given
    texts = _texts(files, arguments)
    made = training.train_to_folder(texts, arguments.out, arguments.vocab_size, replace=arguments.force)
    facts = training.report(made, _texts(files, arguments))
    print(
        f"{arguments.out}: {made.vocab_size:,} ids; {facts['bytes']:,} bytes of training text give "
        f"{facts['tokens']:,} tokens ({facts['bytes_per_token']:.2f} bytes per token, "
        f"{facts['vocabulary_used_ratio']:.0%} of the ids used)"
    )
    return 0


def _texts(files: list[Path], arguments: argparse.Namespace) -> Iterator[str]:
    from internlm.data.formats import read_documents
    from internlm.log import Progress

    with Progress("reading", None, "documents") as shown:
        for file in files:
            for document in read_documents(file, arguments.text_key, arguments.on_error):
                yield document.text
                shown.advance()


def _inspect(arguments: argparse.Namespace) -> int:
    from internlm.text.tokenizer import Tokenizer, well_formed

    tokenizer = Tokenizer.load(arguments.tokenizer)
    roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    print(f"file         {tokenizer.path}")
    print(f"fingerprint  sha256:{tokenizer.fingerprint}")
    print(f"vocabulary   {tokenizer.vocab_size:,} ids")
    print("roles        " + ", ".join(f"{role} {'none' if id_ is None else id_}" for role, id_ in roles.items()))
    names = [f"{id_} {name}" for name, id_ in tokenizer.special_tokens.items()]
    shown = names if len(names) <= 16 else [*names[:8], f"… {len(names) - 9} more …", names[-1]]
    print(f"special      {len(names)}: " + ", ".join(shown))
    if arguments.text is None:
        return 0
    ids = tokenizer.encode(arguments.text)
    is_exact = tokenizer.decode(ids) == arguments.text
    print(f"\n{'id':>8}  {'bytes':24}  text")
    for id_ in ids:
        piece = tokenizer.token_bytes(id_)
        print(f"{id_:>8}  {piece.hex(' '):24}  {piece.decode('utf-8', 'backslashreplace')!r}")
    size = len(well_formed(arguments.text).encode())
    print(f"\n{size} bytes, {len(ids)} tokens; the round trip is {'exact' if is_exact else 'NOT exact'}")
    if not is_exact:
        print(f"it gives {tokenizer.decode(ids)!r}", file=sys.stderr)
    return 0
