"""Files → Samples. A new dataset format is one function from a record to a Sample, and a line in RECORDS.

    notes.txt, guide.md, code.py …       the file is one document
    corpus.jsonl(.gz, .zst)              one JSON object a line
    corpus.json                          a list of JSON objects

A record is told by its keys: `messages` makes a conversation (OpenAI's form), anything else a document under
`text_key`. Every complaint names file and line. Nothing is passed over in silence.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from internlm.errors import DataError
from internlm.text.chat import Message

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
_LINES = (".jsonl", ".ndjson")
_PACKED = (".gz", ".zst")
_TEXT = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".js", ".ts", ".java", ".sh", ".html", ".tex")


@dataclass(frozen=True)
class Document:
    """A text that is learned whole."""

    text: str
    source: str = ""
    """Where it comes from, for people."""

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class Conversation:
    """Messages, of which the assistant's are learned."""

    messages: tuple[Message, ...]

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all contents."""
        return sum(len(m.content.encode("utf-8", "surrogatepass")) for m in self.messages)


Sample = Document | Conversation
Record = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A part of an input that is read by itself: a file, or whole lines of one."""

    path: str
    start: int = 0
    """First byte."""
    stop: int | None = None
    """End, in bytes; None: the end of the file."""
    first_line: int = 1
    """Number of the first line, for error messages."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the part, as stored."""
        return (Path(self.path).stat().st_size if self.stop is None else self.stop) - self.start


def _document(record: Record, text_key: str, where: str) -> Document:
    if text_key not in record:
        raise DataError(f"has no key {text_key!r}", where=where, allowed=record, do="Name the key with --text-key.")
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(f"{text_key!r} is {type(text).__name__}, not a string", where=where)
    return Document(text, str(record.get("source", "")))


def _messages(record: Record, text_key: str, where: str) -> Conversation:
    turns = record.get("messages")
    if not isinstance(turns, list) or not turns:
        raise DataError("'messages' is not a list of at least one message", where=where, got=turns)
    messages = []
    for number, turn in enumerate(turns):
        place = f"{where}, message {number}"
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise DataError("a message is an object with 'role' and 'content'", where=place, got=turn)
        for key in ("role", "content"):
            if not isinstance(turn[key], str):
                raise DataError(f"{key!r} is {type(turn[key]).__name__}, not a string", where=place)
        messages.append(Message(turn["role"], turn["content"]))
    return Conversation(tuple(messages))


RECORDS: dict[str, Callable[[Record, str, str], Sample]] = {"document": _document, "messages": _messages}
FORMATS = ("text", *RECORDS)


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """Return the input files; folders are searched through, in order of name.

    Raises:
        DataError: an input does not exist, or a folder holds nothing readable.
    """
    files: list[Path] = []
    for given in map(Path, inputs):
        if given.is_dir():
            found = sorted(p for p in given.rglob("*") if p.is_file() and _is_readable(p))
            if not found:
                raise DataError("holds no text or JSON files", where=given, do="Endings: .jsonl .json .txt .md .py …")
            files += found
        elif given.is_file():
            files.append(given)
        else:
            raise DataError("no such file or folder", where=given)
    return files


def read_samples(
    path: str | Path, format: str | None = None, text_key: str = "text", on_error: OnError = "raise"
) -> Iterator[Sample]:
    """Yield every sample of a file or folder; arguments as for `read_piece`.

    Raises:
        DataError: something is missing, damaged or of a wrong type; with its place.
    """
    for file in find_files([path]):
        yield from read_piece(Piece(str(file)), format, text_key, on_error)


def read_documents(path: str | Path, format: str | None = None, text_key: str = "text") -> Iterator[Document]:
    """Yield every document of a file or folder; a conversation gives one document per message."""
    for sample in read_samples(path, format, text_key):
        if isinstance(sample, Document):
            yield sample
        else:
            yield from (Document(message.content) for message in sample.messages)


def read_piece(piece: Piece, format: str | None, text_key: str, on_error: OnError = "raise") -> Iterator[Sample]:
    """Yield the samples of one piece.

    Args:
        piece: what to read.
        format: one of FORMATS, or None to tell it from the file's ending and each record's keys.
        text_key: key of a document's text.
        on_error: "skip" leaves bad records out, counts them, and says so at the end.
    """
    if format is not None and format not in FORMATS:
        raise DataError("no such format", got=format, allowed=FORMATS)
    skipped = 0
    for where, record in _records(piece, format):
        try:
            if isinstance(record, DataError):
                raise record
            yield record if isinstance(record, Document) else _to_sample(record, format, text_key, where)
        except DataError as error:
            if on_error == "raise":
                raise
            if not skipped:
                logger.warning("warning: skipping: %s", error)
            skipped += 1
    if skipped:
        logger.warning("warning: %s: %d bad records left out", piece.path, skipped)


def cut_lines(path: Path, target_bytes: int) -> list[Piece]:
    """Cut a file of JSON lines into pieces of about `target_bytes`, on line ends. Packed files stay whole."""
    size = path.stat().st_size
    if path.suffix not in _LINES or size <= target_bytes:
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


def _is_readable(path: Path) -> bool:
    name = path.with_suffix("") if path.suffix in _PACKED else path
    return name.suffix in (*_LINES, ".json", *_TEXT)


def _to_sample(record: Any, format: str | None, text_key: str, where: str) -> Sample:
    if not isinstance(record, dict):
        raise DataError(f"a record is a JSON object, not {type(record).__name__}", where=where)
    kind = format or ("messages" if "messages" in record else "document")
    return RECORDS[kind](record, text_key, where)


def _records(piece: Piece, format: str | None) -> Iterator[tuple[str, Any]]:
    """Yield (place, record); a record that cannot be parsed comes as the error it raises."""
    path = Path(piece.path)
    inner = path.with_suffix("") if path.suffix in _PACKED else path
    if format == "text" or inner.suffix not in (*_LINES, ".json"):
        with _open(path) as file:
            data = file.read()
        yield str(path), _decode(data, str(path), lambda text: Document(text, str(path)))
    elif inner.suffix == ".json":
        with _open(path) as file:
            data = file.read()
        records = _decode(data, str(path), json.loads)
        if isinstance(records, DataError):
            yield str(path), records
        elif not isinstance(records, list):
            raise DataError("a .json file holds a list of records", where=path, do="For one record a line use .jsonl.")
        else:
            yield from ((f"{path}: record {i}", record) for i, record in enumerate(records, 1))
    else:
        yield from _lines(piece)


def _lines(piece: Piece) -> Iterator[tuple[str, Any]]:
    path = Path(piece.path)
    at = piece.start
    with _open(path) as file:
        if piece.start:
            file.seek(piece.start)
        for number, line in enumerate(file, piece.first_line):
            if piece.stop is not None and at >= piece.stop:
                return
            at += len(line)
            if line.strip():
                where = f"{path}:{number}"
                yield where, _decode(line, where, json.loads)


def _decode(data: bytes, where: str, parse: Callable[[str], Any]) -> Any:
    """Return what `parse` makes of the bytes, or the error that says why not."""
    try:
        return parse(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"is not UTF-8: {error.reason} at byte {error.start}", where=where)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(error.doc.rstrip()) - 1 or "Unterminated" in error.msg
        what = "the JSON is cut short" if cut else f"is not JSON: {error.msg} at column {error.pos + 1}"
        return DataError(what, where=where, got=error.doc.strip()[-40:], do="Mend the line, or pass --on-error skip.")


def _open(path: Path) -> IO[bytes]:
    """Open a file, unpacking it by its ending."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise DataError("zstandard is needed to read it", where=path, do="pip install 'internlm[data]'") from None
        return io.BufferedReader(zstandard.open(path, "rb"))
    return open(path, "rb")
