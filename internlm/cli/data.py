"""`internlm data corpus|tokenize|inspect|export`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from internlm.text.tokenizer import Tokenizer

DESCRIPTION = """Build, tokenize and look at training data.

  internlm data corpus --out runs/corpus
  internlm data tokenize runs/corpus/train.jsonl --tokenizer runs/tokenizer --out runs/train
  internlm data inspect runs/train --document 0
  internlm data export runs/train --out back.jsonl"""

_BRITISH = "tokenise"
"""How many write the verb; it works, with a note."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-verbs and their arguments."""
    verbs = parser.add_subparsers(dest="action", required=True, metavar="corpus|tokenize|inspect|export")
    corpus = verbs.add_parser("corpus", help="write the text of the running Python's standard library")
    corpus.add_argument("--out", required=True, help="folder to write")
    corpus.add_argument("--validation-ratio", type=float, default=0.05, help="share of the bytes held out (0.05)")
    corpus.add_argument("--seed", type=int, default=1, help="decides which modules are held out (1)")
    corpus.add_argument("--force", action="store_true", help="replace an existing corpus")
    told = "turn text or conversations into shards of tokens"
    tokenize = verbs.add_parser("tokenize", aliases=[_BRITISH], help=told)
    tokenize.add_argument("inputs", nargs="+", help="files and folders: .txt .md .py … .jsonl .json, also .gz .zst")
    tokenize.add_argument("--tokenizer", required=True, help="folder, tokenizer.json or .model")
    tokenize.add_argument("--out", required=True, help="folder to write")
    formats = ("text", "document", "messages", "sharegpt", "alpaca", "completion")
    tokenize.add_argument("--format", choices=formats, help="of the records; told from files and keys by default")
    tokenize.add_argument("--text-key", default="text", help="key of a document's text (text)")
    tokenize.add_argument("--template", help="chat template for conversations")
    tokenize.add_argument("--workers", type=_positive, help="processes (one per core)")
    tokenize.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="what becomes of bad records")
    tokenize.add_argument("--force", action="store_true", help="replace existing shards")
    inspect = verbs.add_parser("inspect", help="show facts of shards, and one document with what is trained on")
    inspect.add_argument("shards", help="folder of shards")
    inspect.add_argument("--document", type=int, help="number of the document to show")
    export = verbs.add_parser("export", help="turn shards back into text")
    export.add_argument("shards", help="folder of shards")
    export.add_argument("--out", required=True, help=".jsonl file to write")
    export.add_argument("--force", action="store_true", help="replace an existing file")


def _positive(text: str) -> int:
    """Return a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Run the sub-verb."""
    actions = {"corpus": _corpus, "tokenize": _tokenize, _BRITISH: _tokenize, "inspect": _inspect, "export": _export}
    return actions[arguments.action](arguments)


def _corpus(arguments: argparse.Namespace) -> int:
    from internlm.data import corpus

    facts = corpus.build(
        arguments.out, validation_ratio=arguments.validation_ratio, seed=arguments.seed, replace=arguments.force
    )
    for side in ("train", "validation"):
        print(f"{side:11} {facts['documents'][side]:5} documents {facts['bytes'][side] / 1e6:7.2f} MB")
    print(f"questions   {facts['questions']} about {facts['names']} names")
    packed = corpus.compression(Path(arguments.out) / "validation.jsonl")
    print("held-out files, bits per byte: " + ", ".join(f"{name} {bits:.3f}" for name, bits in packed.items()))
    print(f"written to {arguments.out}")
    return 0


def _tokenize(arguments: argparse.Namespace) -> int:
    from internlm.data.tokenize import Options, tokenize

    if arguments.action == _BRITISH:
        print("note: here this is written `internlm data tokenize`", file=sys.stderr)
    options = Options(arguments.tokenizer, arguments.format, arguments.text_key, arguments.template, arguments.on_error)
    facts = tokenize(arguments.inputs, arguments.out, options, workers=arguments.workers, replace=arguments.force)
    total = {key: sum(s[key] for s in facts["shards"]) for key in ("documents", "tokens", "trained_tokens", "bytes")}
    print(
        f"{arguments.out}: {total['documents']:,} documents, {total['tokens']:,} tokens "
        f"({total['trained_tokens']:,} trained on), {total['bytes'] / max(1, total['tokens']):.3f} bytes per token"
    )
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    import numpy as np

    from internlm.data.shards import Shards
    from internlm.errors import DataError
    from internlm.text.tokenizer import Tokenizer

    shards = Shards.open(arguments.shards)
    lengths = shards.lengths
    trained = sum(shard.trained_tokens for shard in shards.shards)
    print(f"documents    {shards.num_documents:,}")
    print(f"tokens       {shards.num_tokens:,}, of them trained on {trained:,} ({trained / shards.num_tokens:.1%})")
    print(f"bytes        {shards.num_bytes:,} ({shards.num_bytes / shards.num_tokens:.3f} per token)")
    print(f"lengths      median {np.sort(lengths)[len(lengths) // 2]}, longest {lengths.max()}")
    print(f"tokenizer    {shards.vocab_size} ids, {shards.fingerprint[:12]}, in {shards.tokenizer_path}")
    print(f"template     {shards.template or 'none: plain documents'}")
    if arguments.document is None:
        return 0
    if not 0 <= arguments.document < shards.num_documents:
        raise DataError("no such document", got=arguments.document, allowed=[f"0 to {shards.num_documents - 1}"])
    ids, mask = shards.document(arguments.document)
    print(f"\ndocument {arguments.document}, {len(ids)} tokens; what is trained on is between ⟦ and ⟧")
    print(_marked(Tokenizer.load(shards.tokenizer_path), ids.tolist(), mask))
    return 0


def _marked(tokenizer: Tokenizer, ids: list[int], mask: Iterable[int] | None) -> str:
    """Return a document's text with its trained stretches marked, in green on a terminal."""
    before, after = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    trained = [True] * len(ids) if mask is None else [bool(m) for m in mask]
    text, start = "", 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or trained[i] != trained[start]:
            part = tokenizer.decode(ids[start:i])
            text += f"{before}⟦{part}⟧{after}" if trained[start] else part
            start = i
    return text


def _export(arguments: argparse.Namespace) -> int:
    from internlm import disk
    from internlm.data.shards import Shards
    from internlm.errors import StorageError
    from internlm.log import Progress
    from internlm.text.tokenizer import Tokenizer

    out = arguments.out
    if Path(out).exists() and not arguments.force:
        raise StorageError("exists already", where=out, do="Choose another name, or pass --force to replace it.")
    shards = Shards.open(arguments.shards)
    tokenizer = Tokenizer.load(shards.tokenizer_path)
    bos, eos = shards.facts["bos_id"], shards.facts["eos_id"]
    shown = Progress("exporting", shards.num_documents, "documents")
    with disk.beside(out) as draft, open(draft, "w", encoding="utf-8") as file, shown:
        for index in range(shards.num_documents):
            tokens, mask = shards.document(index)
            ids = tokens.tolist()
            if mask is None or mask.all():  # a document, around which tokenisation put its ends; no conversation
                ids = ids[ids[:1] == [bos] :]
                ids = ids[: len(ids) - (ids[-1:] == [eos])]
            file.write(json.dumps({"text": tokenizer.decode(ids)}, ensure_ascii=False) + "\n")
            shown.advance()
    print(f"{out}: {shards.num_documents:,} documents")
    return 0
