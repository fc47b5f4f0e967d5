"""`internlm serve`."""

from __future__ import annotations

import argparse
import os
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from internlm.cli import KEY_VARIABLE, add_placement
from internlm.errors import UsageError, install_command

if TYPE_CHECKING:
    from internlm.serve.api.asked import Served

DESCRIPTION = """\
Serve a model (a run, a checkpoint, a Transformers folder) to OpenAI's clients, with a chat page at /.

  internlm serve out                                       http://127.0.0.1:8000, for this machine only
  internlm serve out --host 0.0.0.0 --api-key secret       for others, who need the key

Keys also come from a file (--api-key-file, one a line) and from the variable INTERNLM_API_KEY. Ctrl-C or SIGTERM lets
answers under way end; a second one does not. LMDeploy's `api_server DIR --server-name … --server-port …` works."""

_LIMITS: dict[object, str] = {"batch": "--max-batch", "length": "--max-length", "cache_bytes": "--cache-gib"}
"""The engine's names → the options."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.usage = "%(prog)s [options] DIR"
    add = parser.add_argument
    add("model", nargs="+", metavar="DIR", help="run, checkpoint, Transformers folder, GGUF file …")
    add("--host", "--server-name", metavar="HOST", help="where to listen; default: 127.0.0.1")
    add("--port", "--server-port", type=int, metavar="PORT", help="default: 8000; 0: any that is free")
    add("--model-name", action="append", metavar="NAME", help="what clients call it; may be given several times")
    add("--template", metavar="NAME", help="chat format (default: as recorded); `none`: no chat")
    add("--tokenizer", type=Path, metavar="PATH", help="tokenizer, where none lies beside the model")
    add_placement(add)
    add("--max-batch", "--max-batch-size", type=int, metavar="N", help="answers at once; default: 16, on a GPU 256")
    add(
        "--max-length", "--session-len", type=int, metavar="N", help="tokens of prompt and answer; default: the model's"
    )
    add("--cache-gib", type=float, metavar="GIB", help="memory for keys and values; default: by what is free")
    add("--kv", choices=["plain", "int8"], metavar="FORM", help="of keys and values: plain (default), int8 (half)")
    add("--max-waiting", type=int, default=256, metavar="N", help="answers that may wait; more get 429; default: 256")
    add("--request-timeout", type=float, metavar="S", help="seconds after which an answer ends; default: none")
    add("--drain-seconds", type=float, default=30.0, metavar="S", help="for answers under way at the end; default: 30")
    add("--api-key", action="append", metavar="KEY", help="clients must send it; may be given several times")
    add("--api-keys", nargs="+", action="extend", dest="api_key", metavar="KEY", help=argparse.SUPPRESS)
    add("--api-key-file", type=Path, metavar="FILE", help="keys, one a line")
    add("--allow-origin", action="append", default=[], metavar="URL", help="a site whose pages may call (CORS)")
    add("--ssl-certfile", metavar="FILE", help="TLS certificate (PEM)")
    add("--ssl-keyfile", metavar="FILE", help="its private key (PEM)")


def run(arguments: argparse.Namespace, ready: Callable[[str], None] | None = None) -> int:
    """Serve until a signal comes; `ready` gets the address when there is something to see."""
    _foreign_spelling(arguments)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"the server needs {error.name}", do=install_command("serve")) from error
    from internlm.infer.worker import Worker
    from internlm.serve.api import run as process
    from internlm.serve.api.app import make_app
    from internlm.serve.api.gate import Access

    _check(arguments)
    keys = _keys(arguments)
    access = Access(keys, tuple(arguments.allow_origin), _hosts(arguments, keys))
    address = process.Address(arguments.host, arguments.port, arguments.ssl_certfile, arguments.ssl_keyfile)
    listener = process.bind(address)  # a port that is taken says so now, not after the weights were read
    served = _open(arguments)
    worker = Worker(served.engine, max_waiting=arguments.max_waiting)
    app = make_app(served, worker, access)
    _warn_of_strangers(arguments.host, keys)
    server = process.Server(app, worker, address, drain_seconds=arguments.drain_seconds)
    url = process.url_of(address, listener)
    _note(f"serving {', '.join(served.names)} at {url} (Ctrl-C ends)")
    if ready is not None:
        ready(url)
    return process.run(server, listener)


def _hosts(arguments: argparse.Namespace, keys: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the names of a server for this machine alone that asks for no key; None where any name will do."""
    from internlm.infer.client import LOOPBACK

    if keys or arguments.host not in LOOPBACK or "*" in arguments.allow_origin:
        return None
    return tuple(name for origin in arguments.allow_origin if (name := urllib.parse.urlsplit(origin).hostname))


def _warn_of_strangers(host: str, keys: tuple[str, ...]) -> None:
    """Say so when others may use the model without a key."""
    from internlm.infer.client import LOOPBACK

    if host not in LOOPBACK and not keys:
        _note("warning: anyone who reaches this machine may use the model: --api-key KEY asks for a key")


def _foreign_spelling(arguments: argparse.Namespace) -> None:
    """Take LMDeploy's `api_server DIR`, and its default address, and say how it is written here."""
    words = arguments.model
    lmdeploy = len(words) == 2 and words[0] == "api_server"
    if lmdeploy:
        _note(f"note: here this is written `internlm serve {words[1]}`, with --host and --port")
    elif len(words) > 1:
        raise UsageError("one model is served", got=" ".join(words))
    arguments.model = words[-1]
    if arguments.host is None:
        arguments.host = "127.0.0.1"
    if arguments.port is None:
        arguments.port = 23333 if lmdeploy else 8000


def _check(arguments: argparse.Namespace) -> None:
    """Check what no one else does."""
    for name in ("max_waiting", "drain_seconds"):
        if not 0 <= getattr(arguments, name) < float("inf"):
            raise UsageError("must be 0 or more", where=f"--{name.replace('_', '-')}", got=getattr(arguments, name))
    for name in ("cache_gib", "request_timeout"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError("must be over 0", where=f"--{name.replace('_', '-')}", got=value)
    for name in arguments.model_name or ():
        if not name.strip():
            raise UsageError("is empty", where="--model-name")
    for option, file in (("--ssl-certfile", arguments.ssl_certfile), ("--ssl-keyfile", arguments.ssl_keyfile)):
        if file is not None and not Path(file).is_file():
            raise UsageError("no such file", where=option, got=file)
    if arguments.ssl_keyfile and not arguments.ssl_certfile:
        raise UsageError("a key needs its certificate: --ssl-certfile", where="--ssl-keyfile")
    if arguments.ssl_certfile:
        import ssl

        try:  # now, not after the weights were read
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(arguments.ssl_certfile, arguments.ssl_keyfile)
        except (ssl.SSLError, OSError) as error:
            do = "Both files are PEM; without --ssl-keyfile the certificate's file must hold the key too."
            raise UsageError(f"cannot be used: {error}", where="--ssl-certfile", do=do) from error


def _keys(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return all keys: of the command line, the file and the environment."""
    keys = [key.strip() for key in arguments.api_key or []]  # a header has no space at its end
    if arguments.api_key_file is not None:
        try:
            lines = arguments.api_key_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot be read: {error}", where="--api-key-file") from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise UsageError("holds no key", where=arguments.api_key_file)
        keys += found
    if (variable := os.environ.get(KEY_VARIABLE)) is not None:
        if not variable.strip():  # a file of variables that nobody has filled in asks for a key, and would have none
            do = f"Give it a key, such as `openssl rand -hex 32` makes, or `unset {KEY_VARIABLE}` to serve without."
            raise UsageError("is set, and empty", where=KEY_VARIABLE, do=do)
        keys.append(variable.strip())
    if not all(keys):
        raise UsageError("a key is empty", where="--api-key")
    return tuple(dict.fromkeys(keys))


def _open(arguments: argparse.Namespace) -> Served:
    """Return the model, ready to be served."""
    import secrets

    from internlm.errors import EngineError
    from internlm.infer.engine import Engine, Limits
    from internlm.infer.placement import Placement
    from internlm.model.config import DynamicScaling
    from internlm.serve.api.asked import Served
    from internlm.source import Hints, open_source
    from internlm.text.templates import TEMPLATES

    place = Placement.here(arguments.device, arguments.pack)
    source = open_source(arguments.model, Hints(tokenizer=arguments.tokenizer, template=arguments.template))
    if source.talk.template is None and arguments.template is None:
        _note(f"no chat format is recorded: /v1/completions only; --template chooses one of {', '.join(TEMPLATES)}")
    limits = Limits.on(
        place.device, batch=arguments.max_batch, length=arguments.max_length, cache=arguments.kv,
        cache_bytes=None if arguments.cache_gib is None else int(min(arguments.cache_gib * 2**30, 2**63)),
    )  # fmt: skip
    source.talk.check(source.config.vocab_size)  # now, not after the weights were read
    try:
        engine = Engine.of(source, place, limits, seed=secrets.randbits(30))
    except EngineError as error:
        if error.where not in _LIMITS:
            raise
        raise UsageError(str(error).replace(str(error.where), _LIMITS[error.where], 1)) from error
    engine.warm_up()
    trained, scaling = source.config.context_length, source.config.rope.scaling
    if engine.length > trained and not isinstance(scaling, DynamicScaling):
        what = f"the model was trained for {trained} tokens, and what it writes beyond them has no meaning"
        _note(f"warning: --max-length {engine.length}: {what}")
    names = tuple(dict.fromkeys(arguments.model_name or [Path(arguments.model).resolve().name]))
    return Served(engine, source.talk, names, timeout=arguments.request_timeout)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
