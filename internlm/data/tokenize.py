"""Text → shards, over all cores, going on where a killed run stopped.

The input is cut into units of about `unit_bytes`, each tokenized by one worker into one shard beside the output:

    OUT.unfinished/00003.tokens .offsets .mask, then 00003.json, which makes the unit complete

When all are there they are moved into OUT in one commit. A unit's card holds a hash of its input and of every option: a
second run with the same makes the rest. The number of workers changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from internlm import disk, runtime, storage
from internlm.data import shards
from internlm.data.formats import (
    BadRecords,
    Conversation,
    Document,
    OnError,
    Piece,
    Sample,
    cut,
    find_files,
    read_piece,
)
from internlm.data.shards import ShardFacts, ShardWriter
from internlm.errors import DataError
from internlm.log import Progress
from internlm.text.chat import render
from internlm.text.templates import Template, get_template
from internlm.text.tokenizer import Tokenizer
from internlm.text.tool_formats import format_of

logger = logging.getLogger(__name__)

_BATCH = 256  # documents per call of the tokenizer: enough to spread its overhead


@dataclass(frozen=True)
class Options:
    """All besides the input that decides the tokens."""

    tokenizer: str
    """Its path."""
    format: str | None = None
    """One of formats.FORMATS; None: told from the files."""
    text_key: str = "text"
    template: str | None = None
    """Chat template for conversations."""
    on_error: OnError = "raise"


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
        options: what decides the tokens.
        workers: processes; None: one per core.
        unit_bytes: input per unit of work; None: a 16th of it, between 1 and 16 MiB.
        replace: whether an existing folder of shards may be replaced.

    Raises:
        DataError: an input is missing, empty or damaged. StorageError: as `storage.writing` and `disk.hold`.
    """
    out = Path(out)
    storage.check_free(out, shards.KIND, replace=replace)
    tokenizer = Tokenizer.load(options.tokenizer)
    template = None if options.template is None else get_template(options.template)
    for role, found in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if found is None:
            logger.warning("warning: the tokenizer has no %s token: documents will not have one", role)
    units = _cut(_without_output(find_files(inputs), out), options.format, unit_bytes)
    work = _Work(out.with_name(out.name + ".unfinished"), options, tokenizer, template)
    with disk.explained(f"writing {work.folder}"):
        work.folder.mkdir(parents=True, exist_ok=True)
    disk.hold(work.folder)
    facts = _run(units, work, workers or runtime.available_cpus())
    if not any(shard.documents for shard in facts):
        raise DataError("the input holds no documents", where=", ".join(map(str, inputs)))
    if template is not None and all(shard.trained_tokens == shard.tokens for shard in facts):
        logger.warning("warning: template %s has no effect: the input holds no conversations", template.name)
        template = None
    meta = shards.meta(
        facts, vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint, bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id, template=None if template is None else template.name,
    )  # fmt: skip
    with storage.writing(out, shards.KIND, replace=replace) as folder:
        for shard in facts:
            for name in shard.files(shards.dtype_for(tokenizer.vocab_size)):
                _link(work.folder / name, folder.path / name)
            folder.hashes.update(shard.sha256)
        (folder.path / "tokenizer").mkdir()
        tokenizer.save(folder.path / "tokenizer")
        folder.meta.update(meta)
    shutil.rmtree(work.folder)
    return meta


@dataclass(frozen=True)
class _Work:
    """What all units share; sent to each worker once."""

    folder: Path
    """Where their shards are written."""
    options: Options
    tokenizer: Tokenizer
    template: Template | None

    def card(self, unit: list[Piece]) -> str:
        """Return a hash of all that decides a unit's tokens."""
        inputs = [(asdict(piece), os.stat(piece.path).st_size, os.stat(piece.path).st_mtime_ns) for piece in unit]
        options = {**asdict(self.options), "tokenizer": self.tokenizer.fingerprint, "template": repr(self.template)}
        ends = [self.tokenizer.bos_id, self.tokenizer.eos_id]  # not in the vocabulary file, so not in its fingerprint
        return hashlib.sha256(json.dumps([inputs, options, ends, shards.FORMAT]).encode()).hexdigest()


_Job = tuple[int, list[Piece], str]  # number of the unit, its input, its card
_Made = tuple[ShardFacts, int]  # its shard, and how many documents without text were left out


def _run(units: list[list[Piece]], work: _Work, workers: int) -> list[ShardFacts]:
    """Tokenize the units that are not complete yet; return the facts of all, in order."""
    made: dict[int, _Made] = {}
    todo: list[_Job] = []
    for index, unit in enumerate(units):
        card = work.card(unit)
        if done := _complete(work, index, card):
            made[index] = done
        else:
            todo.append((index, unit, card))
    if made:
        logger.info("going on: %d of %d units are complete", len(made), len(units))
    total = sum(piece.num_bytes for _, unit, _ in todo for piece in unit) / 1e6
    with Progress("tokenising", total, "MB") as shown:
        for index, done in _map(todo, work, min(workers, len(todo))):
            made[index] = done
            shown.advance(sum(piece.num_bytes for piece in units[index]) / 1e6)
    if empty := sum(number for _, number in made.values()):
        logger.warning("warning: %d documents without text left out", empty)
    return [made[index][0] for index in range(len(units))]


def _map(jobs: list[_Job], work: _Work, workers: int) -> Iterator[tuple[int, _Made]]:
    """Run the jobs, in this process or in several; the first error ends them all."""
    if workers <= 1:
        yield from (_tokenize_unit(work, *job) for job in jobs)
        return
    # spawn: a fork of a process that has threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(work,)) as pool:
        futures = [pool.submit(_work_on, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps because memory ran out",
                do="Give the same command again with fewer --workers: what is complete is kept.",
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_work: _Work | None = None  # of a worker process


def _start_worker(work: _Work) -> None:
    global _work
    _work = work


def _work_on(job: _Job) -> tuple[int, _Made]:
    assert _work is not None, "the pool starts every worker with its work"
    return _tokenize_unit(_work, *job)


def _tokenize_unit(work: _Work, index: int, pieces: list[Piece], card: str) -> tuple[int, _Made]:
    """Write one unit's shard, then its card."""
    name, options, empty = f"{index:05d}", work.options, 0
    with disk.explained(f"writing {work.folder / name}"):
        writer = ShardWriter(work.folder, name, work.tokenizer.vocab_size)
        for piece in pieces:
            bad = BadRecords(piece.path, options.on_error)
            batch: list[Sample] = []
            for sample in read_piece(piece, options.format, options.text_key, bad):
                if isinstance(sample, Document) and not sample.text.strip():
                    empty += 1
                    continue
                batch.append(sample)
                if len(batch) == _BATCH:
                    _encode(batch, work, writer, bad)
                    batch = []
            _encode(batch, work, writer, bad)
            bad.report()
        facts = writer.close()
        disk.write_json(work.folder / f"{name}.json", {"card": card, "facts": asdict(facts), "empty": empty})
    return index, (facts, empty)


def _encode(batch: list[Sample], work: _Work, writer: ShardWriter, bad: BadRecords) -> None:
    tokenizer = work.tokenizer
    encoded = iter(tokenizer.encode_batch([sample.text for sample in batch if isinstance(sample, Document)]))
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    last = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for sample in batch:
        if isinstance(sample, Document):
            writer.add([*first, *next(encoded), *last], None, sample.num_bytes)
        elif work.template is None:
            raise DataError("holds conversations", where=sample.source, do="Name a chat template with --template.")
        else:
            try:
                tools = format_of(work.template.name)  # as the server writes them
                written = tools.render(sample.messages, sample.tools, sample.parallel)
                ids, mask = render(written, work.template, tokenizer)
                mask = _without_context(mask, sample)
            except DataError as error:
                bad.add(DataError(str(error), where=sample.source))
            else:
                writer.add(ids, mask, sample.num_bytes)


def _without_context(mask: list[bool], sample: Conversation) -> list[bool]:
    """Return the mask, each stretch of which is one answer, without those that are not learned."""
    if not sample.context:
        return mask
    begins = [trained and not before for before, trained in pairwise([False, *mask])]
    answers = list(accumulate(begins))  # of each token: the number of the answer it is in, or comes after
    if answers[-1] != sum(message.role == "assistant" for message in sample.messages):
        raise DataError(
            "has an answer of weight 0, and several calls in one message, which this template writes as several",
            do="Give the calls one by one, each with its result.",
        )
    return [trained and answer not in sample.context for trained, answer in zip(mask, answers, strict=True)]


def _without_output(files: list[Path], out: Path) -> list[Path]:
    """Leave out the output's files, which may lie inside an input folder."""
    out = out.resolve()
    own = re.compile(re.escape(str(out)) + r"(\.unfinished|\.(partial|replaced)-\d+)?/")
    return [file for file in files if not own.match(str(file.resolve()))]


def _cut(files: list[Path], format: str | None, unit_bytes: int | None) -> list[list[Piece]]:
    if unit_bytes is None:
        unit_bytes = min(max(sum(file.stat().st_size for file in files) // 16, 1 << 20), 16 << 20)
    units: list[list[Piece]] = []
    room = 0
    for file in files:
        for piece in cut(file, format, unit_bytes):
            size = piece.num_bytes
            if not units or size > room:
                units.append([])
                room = unit_bytes
            units[-1].append(piece)
            room -= size
    return units


def _complete(work: _Work, index: int, card: str) -> _Made | None:
    """Return what a unit gave if an earlier run completed it with the same card."""
    try:
        found = json.loads((work.folder / f"{index:05d}.json").read_text(encoding="utf-8"))
        facts, empty, is_same = ShardFacts(**found["facts"]), int(found["empty"]), found["card"] == card
    except (OSError, ValueError, KeyError, TypeError):
        return None
    dtype = shards.dtype_for(work.tokenizer.vocab_size)
    return (facts, empty) if is_same and facts.are_whole(work.folder, dtype) else None


def _link(source: Path, target: Path) -> None:
    """Give a file a second name: the first stays until the commit."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
