"""Files → Samples.

    notes.txt, guide.md, code.py …       the file is one document
    corpus.jsonl(.gz, .zst)              one JSON object a line
    corpus.json                          a list of JSON objects

A record is told by its keys: `messages`, or those of another form in `internlm.data.messages`, make a conversation, any
others a document under `text_key`. One without `messages` that may be two of these is an error until its format is
given. A file of another ending is one document, unless the format of its records is given: then it holds lines; tables
and pages are refused. Every complaint names file and line.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from internlm import hub
from internlm.data.messages import (
    DIALECTS,
    LOST,
    Record,
    read_context,
    read_messages,
    read_parallel,
    read_tools,
    refuse,
    text_under,
)
from internlm.data.packed import PACKED, opened
from internlm.errors import DataError
from internlm.log import warn_once
from internlm.text.chat import Message
from internlm.text.tools import Tool

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
_LINES = (".jsonl", ".ndjson")
_LINES_DO = "Name a file of one record a line .jsonl."
_TABLES = {
    ".csv": "read_csv(FILE)",
    ".tsv": "read_csv(FILE, sep='\\t')",
    ".parquet": "read_parquet(FILE)",
    ".arrow": None,
    ".feather": "read_feather(FILE)",
    ".xlsx": "read_excel(FILE)",
    ".xls": "read_excel(FILE)",
}
"""Endings of tables → how pandas reads them."""
_PAGES = (".pdf", ".docx", ".doc", ".odt", ".epub")
_TEXT = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".js", ".ts", ".java", ".sh", ".html", ".tex")


@dataclass(frozen=True)
class Document:
    """A text that is learned whole."""

    text: str
    source: str = ""
    """Where it comes from, for people."""

    @property
    def num_bytes(self) -> int:
        """Bytes in UTF-8."""
        return len(self.text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class Conversation:
    """Messages, of which the assistant's are learned."""

    messages: tuple[Message, ...]
    source: str = field(default="", compare=False)
    """Its file and line, for error messages."""
    tools: tuple[Tool, ...] = ()
    """What the model is told that it may call."""
    parallel: bool = True
    """Whether it is told that an answer may hold several calls."""
    context: frozenset[int] = frozenset()
    """Numbers, from 1, of the answers that are not learned."""

    @property
    def texts(self) -> list[str]:
        """All that is said: contents, thoughts, arguments of calls, descriptions of tools."""
        said = [text for m in self.messages for text in (m.thought, m.content, *(call.arguments for call in m.calls))]
        return [*(tool.text for tool in self.tools), *filter(None, said)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all texts in UTF-8."""
        return sum(Document(text).num_bytes for text in self.texts)


Sample = Document | Conversation


@dataclass
class BadRecords:
    """Bad records of one file: raised, or left out and counted."""

    path: str
    on_error: OnError = "raise"
    count: int = 0

    def add(self, error: DataError) -> None:
        """Raise the error, or count it."""
        if self.on_error == "raise":
            raise error
        if not self.count:
            logger.warning("warning: skipping: %s", error)
        self.count += 1

    def report(self) -> None:
        """Say how many were left out."""
        if self.count:
            logger.warning("warning: %s: %d bad records left out", self.path, self.count)


@dataclass(frozen=True)
class Piece:
    """A file, or whole lines of one."""

    path: str
    start: int = 0
    stop: int | None = None
    """In bytes; None: the end of the file."""
    first_line: int = 1
    """Its number, for error messages."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the part, as stored."""
        return (Path(self.path).stat().st_size if self.stop is None else self.stop) - self.start


def _document(record: Record, text_key: str, where: str) -> Document:
    do = "Name the key of a document with --text-key; write a conversation as `messages`."
    return Document(text_under(record, text_key, do), str(record.get("source", "")))


def _messages(record: Record, text_key: str, where: str) -> Conversation:
    refuse(record, (*LOST, "history", "system"))
    messages = read_messages(record)
    return Conversation(messages, where, read_tools(record, messages), read_parallel(record), read_context(record))


def _dialect(name: str) -> Callable[[Record, str, str], Conversation]:
    return lambda record, text_key, where: _messages(DIALECTS[name].read(record), text_key, where)


RECORDS: dict[str, Callable[[Record, str, str], Sample]] = {
    "document": _document,
    "messages": _messages,
    **{name: _dialect(name) for name in DIALECTS},
}
FORMATS = ("text", *RECORDS)


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """Return the input files, each once; folders are searched through, in order of name.

    Raises:
        DataError: an input does not exist, or a folder holds nothing readable.
    """
    files: list[Path] = []
    for name in inputs:
        if "/" in str(name):
            hub.require_here(name, dataset=True)
        if "://" in str(name):
            raise DataError(
                "is an address, and nothing is downloaded here", where=name, do="Download it, then give FILE."
            )
        given = Path(name)
        if given.is_dir():
            found = _walk(given)
            readable = [p for p in found if _ending(p) in (*_LINES, ".json", *_TEXT)]
            if not readable:
                raise DataError("holds no text or JSON files", where=given, do="Endings: .jsonl .json .txt .md .py …")
            for file in readable:
                if not file.exists():
                    raise DataError("is a link to nothing", where=file, do="Put its file there, or take the link away.")
            if others := sorted(set(found) - set(readable)):
                logger.warning("warning: %d files of other kinds are left out, such as %s", len(others), others[0])
            files += readable
        elif given.is_file():
            _refuse_binary(given)
            files.append(given)
        else:
            raise DataError("no such file or folder", where=given)
    unique = {file.resolve(): file for file in files}
    if len(unique) < len(files):
        logger.warning("warning: %d files were given more than once; each is read once", len(files) - len(unique))
    return list(unique.values())


def _walk(folder: Path) -> list[Path]:
    """Return the files under a folder, links to nothing too, in order of name; each folder is entered once.

    What can be reached through a link and without has the name without.
    """
    found: list[Path] = []
    waiting, seen = deque([folder]), set()
    while waiting:
        at = waiting.popleft()
        if (real := at.resolve()) in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(at.iterdir())
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", where=at) from error
        for entry in entries:
            if entry.is_dir():
                (waiting.append if entry.is_symlink() else waiting.appendleft)(entry)
            elif entry.is_file() or not entry.exists():
                found.append(entry)
    return sorted(found)


def _refuse_binary(path: Path) -> None:
    ending = _ending(path)
    if ending in _TABLES:
        reader = _TABLES[ending]
        how = f", such as with pandas: {reader}.to_json(NEW, orient='records', lines=True)" if reader else ""
        raise DataError("is a table, which is not read", where=path, do=f"Write it as .jsonl, one row a line{how}.")
    if ending in _PAGES:
        raise DataError("holds pages, which are not read", where=path, do="Save it as plain text.")


def read_samples(
    path: str | Path,
    format: str | None = None,
    text_key: str = "text",
    on_error: OnError = "raise",
    *,
    any_text: bool = False,
) -> Iterator[Sample]:
    """Yield every sample of a file or folder; options and errors as of `read_piece`."""
    for file in find_files([path]):
        bad = BadRecords(str(file), on_error)
        yield from read_piece(Piece(str(file)), format, text_key, bad, any_text=any_text)
        bad.report()


def read_documents(path: str | Path, text_key: str = "text", on_error: OnError = "raise") -> Iterator[Document]:
    """Yield every document of a file or folder, one for each text of a conversation. See `read_samples`."""
    for sample in read_samples(path, None, text_key, on_error, any_text=True):
        yield from [sample] if isinstance(sample, Document) else map(Document, sample.texts)


def read_piece(
    piece: Piece,
    format: str | None = None,
    text_key: str = "text",
    bad: BadRecords | None = None,
    *,
    any_text: bool = False,
) -> Iterator[Sample]:
    """Yield the samples of one piece.

    Args:
        piece: what to read.
        format: one of FORMATS; None: told from the file's ending and each record's keys.
        text_key: key of a document's text.
        bad: where bad records go; None: the first ends the reading.
        any_text: whether a record that may be a document or a conversation is a document, and no error.

    Raises:
        DataError: the file is damaged, or a record is bad and not to be left out.
    """
    if format not in (None, *FORMATS):
        raise DataError("no such format", got=format, allowed=FORMATS)
    bad = bad or BadRecords(piece.path)
    for where, record in _records(piece, format):
        try:
            if isinstance(record, DataError):
                raise record
            sample = record if isinstance(record, Document) else _to_sample(record, format, text_key, where, any_text)
        except DataError as error:
            bad.add(DataError(str(error), where=where))
        else:
            yield sample


def cut(path: Path, format: str | None, target_bytes: int) -> list[Piece]:
    """Cut a file of JSON lines into pieces of about `target_bytes`, on line ends; other and packed files stay whole."""
    size = path.stat().st_size
    if _layout(path, format) != "lines" or path.suffix.lower() in PACKED or size <= target_bytes:
        return [Piece(str(path))]
    pieces, start, line = [], 0, 1
    with open(path, "rb") as file:
        while start < size:
            head = file.read(target_bytes)
            tail = file.readline()
            stop = start + len(head) + len(tail)
            pieces.append(Piece(str(path), start, stop, line))
            line += head.count(b"\n") + tail.count(b"\n")
            start = stop
    return pieces


def _ending(path: Path) -> str:
    """Return the ending that tells what a file holds, packed or not, in lower case."""
    inner = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return inner.suffix.lower()


def _layout(path: Path, format: str | None) -> Literal["text", "list", "lines"]:
    """Return how the records of a file are laid out."""
    ending = _ending(path)
    if format == "text":
        return "text"
    if ending == ".json":
        return "list"
    return "lines" if ending in _LINES or format is not None else "text"


def _to_sample(record: Any, format: str | None, text_key: str, where: str, any_text: bool) -> Sample:
    if not isinstance(record, dict):
        do = "A file that is one list is named .json." if isinstance(record, list) else None
        raise DataError(f"a record is a JSON object, not {type(record).__name__}", do=do)
    return RECORDS[format or _kind_of(record, text_key, any_text)](record, text_key, where)


def _kind_of(record: Record, text_key: str, any_text: bool) -> str:
    if "messages" in record:
        return "messages"
    found = {name: dialect.keys for name, dialect in DIALECTS.items() if record.keys() >= set(dialect.keys)}
    if not found:
        return "document"
    if text_key in record:
        found = {"document": (text_key,), **found}
    if len(found) > 1 and not any_text:
        what = "has the keys of " + " and of ".join(f"{name} ({', '.join(keys)})" for name, keys in found.items())
        raise DataError(what, do=f"Say which: --format {' or '.join(found)}.")
    return next(iter(found))


def _records(piece: Piece, format: str | None) -> Iterator[tuple[str, Any]]:
    """Yield (place, record); a record that cannot be parsed comes as the error it raises."""
    path = Path(piece.path)
    layout = _layout(path, format)
    with opened(path) as file:
        if layout == "lines":
            if not path.stat().st_size:
                warn_once(logger, f"{path}: is empty")
            yield from _lines(piece, file)
            return
        data = file.read()
    if layout == "list":
        yield from _listed(data, piece.path)
    elif b"\0" in data:
        do = "If it is UTF-16: `iconv -f utf-16 -t utf-8`."
        yield piece.path, DataError("holds zero bytes, which no text in UTF-8 does", do=do)
    else:
        yield piece.path, _decode(data, lambda text: Document(text, piece.path))


def _listed(data: bytes, path: str) -> Iterator[tuple[str, Any]]:
    records = _decode(data, json.loads, "file")
    if isinstance(records, list):
        yield from ((f"{path}: record {i}", record) for i, record in enumerate(records, 1))
    elif not isinstance(records, DataError):
        yield path, DataError("a .json file holds a list of records", do=_LINES_DO)
    elif isinstance(_decode(data.lstrip().partition(b"\n")[0], json.loads), dict):
        yield path, DataError("holds one JSON object a line", do=_LINES_DO)
    else:
        yield path, records


def _lines(piece: Piece, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    at = piece.start
    if piece.start:
        file.seek(piece.start)
    for number, line in enumerate(file, piece.first_line):
        if piece.stop is not None and at >= piece.stop:
            return
        at += len(line)
        if line.strip():
            yield f"{piece.path}:{number}", _decode(line, json.loads)


def _decode(data: bytes, parse: Callable[[str], Any], part: str = "line") -> Any:
    """Return what `parse` makes of a line or a file, or the error that says why it cannot."""
    do = f"Mend the {part}, or pass --on-error skip, which leaves the {part} out."
    try:
        return parse(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        recode = "Write it in UTF-8, such as with `iconv -f latin1 -t utf-8`."
        return DataError(f"is not UTF-8: {error.reason} at byte {error.start}", do=recode)
    except json.JSONDecodeError as error:
        at_end = error.pos >= len(error.doc.rstrip()) - 1 and not error.msg.startswith("Extra data")
        cut = at_end or "Unterminated" in error.msg
        what = "the JSON is cut short" if cut else f"is not JSON: {error.msg} at column {error.colno}"
        return DataError(what, got=error.doc.strip()[-40:], do=do)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        return DataError(f"is JSON that cannot be read: {error}", do=do)
