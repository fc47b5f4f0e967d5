"""Text → shards, over all cores, going on where a killed run stopped.

The input is cut into units of about `unit_bytes`, each tokenised by one worker into one shard beside the output:

    OUT.unfinished/00003.tokens .offsets .mask, then 00003.json, which makes the unit complete

When all are there they are moved into OUT in one commit. A unit's name card holds a hash of its input and of every
option, so a second run with the same input and options takes what is complete and makes the rest. The result does not
depend on the number of workers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internlm import runtime, storage
from internlm.data import shards
from internlm.data.formats import Document, OnError, Piece, Sample, cut_lines, find_files, read_piece
from internlm.data.shards import ShardFacts, ShardWriter
from internlm.errors import DataError
from internlm.log import Progress
from internlm.text.chat import render
from internlm.text.templates import get_template
from internlm.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_BATCH = 256  # documents per call of the tokenizer: enough to spread its overhead


@dataclass(frozen=True)
class Options:
    """Everything besides the input that decides the tokens."""

    tokenizer: str
    """Path of the tokenizer."""
    format: str | None = None
    """One of formats.FORMATS; None: told from the files."""
    text_key: str = "text"
    """Key of a document's text."""
    template: str | None = None
    """Chat template for conversations."""
    on_error: OnError = "raise"
    """What becomes of bad records."""


def tokenize(
    inputs: Sequence[str | Path],
    out: str | Path,
    options: Options,
    *,
    workers: int | None = None,
    unit_bytes: int | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Write a folder of shards; return its facts.

    Documents become [bos] + ids + [eos]; conversations what the template renders, with its loss mask.

    Args:
        inputs: files and folders.
        out: the folder.
        options: tokenizer, format, template.
        workers: processes; None: one per core.
        unit_bytes: input per unit of work, which is also what a killed run may lose per worker; None: a 16th of the
            input, between 1 and 16 MiB.
        replace: whether an existing folder of shards may be replaced.

    Raises:
        DataError: an input is missing, empty or damaged. StorageError: the output exists, or the disk is full.
    """
    out = Path(out)
    storage.check_free(out, shards.KIND, replace=replace)
    tokenizer = Tokenizer.load(options.tokenizer)
    if options.template is not None:
        get_template(options.template)  # a misspelt name fails now, not in a worker
    for role, found in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if found is None:
            logger.warning("warning: the tokenizer has no %s token: documents will not have one", role)
    units = _cut(find_files(inputs), unit_bytes)
    unfinished = out.with_name(out.name + ".unfinished")
    with storage.explained(f"writing {unfinished}"):
        unfinished.mkdir(parents=True, exist_ok=True)
    cards = [_card(unit, options, tokenizer) for unit in units]
    facts = _run(units, cards, unfinished, options, tokenizer.fingerprint, workers or runtime.available_cpus())
    if not any(shard.documents for shard in facts):
        raise DataError("the input holds no documents", where=", ".join(map(str, inputs)))
    meta = shards.meta(
        facts,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        template=options.template,
    )
    with storage.writing(out, shards.KIND, replace=replace) as folder:
        for shard in facts:
            for path in unfinished.glob(f"{shard.name}.*"):
                if path.suffix != ".json":
                    _link(path, folder.path / path.name)
        (folder.path / "tokenizer").mkdir()
        tokenizer.save(folder.path / "tokenizer")
        folder.meta.update(meta)
    shutil.rmtree(unfinished)
    return meta


def _run(
    units: list[list[Piece]], cards: list[str], folder: Path, options: Options, fingerprint: str, workers: int
) -> list[ShardFacts]:
    """Tokenise what is not complete yet; return the facts of all units, in order."""
    facts: dict[int, ShardFacts] = {}
    todo = []
    for index, card in enumerate(cards):
        done = _complete(folder, index, card)
        if done is None:
            todo.append(index)
        else:
            facts[index] = done
    if facts:
        logger.info("going on: %d of %d units are complete", len(facts), len(units))
    total = sum(piece.num_bytes for index in todo for piece in units[index]) / 1e6
    with Progress("tokenising", total, "MB") as shown:
        jobs = [(units[index], index, cards[index], str(folder), options, fingerprint) for index in todo]
        for index, done, size in _map(jobs, min(workers, len(todo))):
            facts[index] = done
            shown.advance(size / 1e6)
    return [facts[index] for index in range(len(units))]


def _map(jobs: list[Any], workers: int) -> Iterator[tuple[int, ShardFacts, int]]:
    """Run the jobs, in this process or in several; the first error ends them all."""
    if workers <= 1:
        yield from map(_tokenise_unit, jobs)
        return
    # spawn: a fork of a process that has threads may hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_tokenise_unit, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, fingerprint: str) -> Tokenizer:
    """Load the tokenizer once per worker, not once per unit; the fingerprint tells another file at the same path."""
    return Tokenizer.load(path)


def _tokenise_unit(job: tuple[list[Piece], int, str, str, Options, str]) -> tuple[int, ShardFacts, int]:
    """Write one unit's shard, then its card. Runs in a worker."""
    pieces, index, card, folder_name, options, fingerprint = job
    folder, name = Path(folder_name), f"{index:05d}"
    tokenizer = _tokenizer(options.tokenizer, fingerprint)
    with storage.explained(f"writing {folder / name}"):
        writer = ShardWriter(folder, name, tokenizer.vocab_size)
        for piece in pieces:
            batch: list[Sample] = []
            for sample in read_piece(piece, options.format, options.text_key, options.on_error):
                batch.append(sample)
                if len(batch) == _BATCH:
                    _encode(batch, tokenizer, options, writer, piece)
                    batch = []
            _encode(batch, tokenizer, options, writer, piece)
        facts = writer.close()
        storage.write_text(folder / f"{name}.json", json.dumps({"card": card, "facts": asdict(facts)}))
    return index, facts, sum(piece.num_bytes for piece in pieces)


def _encode(batch: list[Sample], tokenizer: Tokenizer, options: Options, writer: ShardWriter, piece: Piece) -> None:
    documents = [sample for sample in batch if isinstance(sample, Document)]
    encoded = iter(tokenizer.encode_batch([document.text for document in documents]))
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    last = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for sample in batch:
        if isinstance(sample, Document):
            ids, mask = [*first, *next(encoded), *last], None
        else:
            if options.template is None:
                raise DataError("holds conversations", where=piece.path, do="Name a chat template with --template.")
            ids, mask = render(sample.messages, get_template(options.template), tokenizer)
        writer.add(ids, mask, sample.num_bytes)


def _cut(files: list[Path], unit_bytes: int | None) -> list[list[Piece]]:
    """Gather pieces into units of about `unit_bytes`."""
    if unit_bytes is None:
        unit_bytes = min(max(sum(file.stat().st_size for file in files) // 16, 1 << 20), 16 << 20)
    units: list[list[Piece]] = []
    room = 0
    for file in files:
        for piece in cut_lines(file, unit_bytes):
            size = piece.num_bytes
            if not units or size > room:
                units.append([])
                room = unit_bytes
            units[-1].append(piece)
            room -= size
    return units


def _card(unit: list[Piece], options: Options, tokenizer: Tokenizer) -> str:
    """Return a hash of a unit's input and of everything that decides its tokens."""
    inputs = [(asdict(piece), os.stat(piece.path).st_size, os.stat(piece.path).st_mtime_ns) for piece in unit]
    facts = [inputs, {**asdict(options), "tokenizer": tokenizer.fingerprint}, shards.FORMAT]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _complete(folder: Path, index: int, card: str) -> ShardFacts | None:
    """Return the facts of a unit that an earlier run completed with the same input and options."""
    try:
        found = shards.read_facts(folder / f"{index:05d}.json")
        return ShardFacts(**found["facts"]) if found["card"] == card else None
    except (OSError, ValueError, KeyError):
        return None


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links: the first stays until the commit."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
