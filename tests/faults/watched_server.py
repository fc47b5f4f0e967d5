"""`internlm serve` as it is, in a process that tells on SIGUSR1 what it holds, and whose engine breaks on SIGUSR2.

Fork("serve", DIR, "--port", "0", hook=partial(install, told, said))
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import signal
import threading
from typing import Any

from internlm.infer.engine import Engine
from internlm.infer.request import Delta
from internlm.infer.schedule import Text
from internlm.serve.api import app
from internlm.serve.api.inbox import Ticket
from tests.serve.servers import tell_files

make_app, step = app.make_app, Engine.step
breaks = False


class _Malloc(ctypes.Structure):
    """What glibc says of its heap (`mallinfo2`)."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]


def allocated() -> int:
    """Return the bytes that were allocated and not freed, of C, C++ and Rust, and of Python what is larger than 512."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Malloc
    told = ask()
    return int(told.uordblks + told.hblkhd)


def breaking_step(engine: Engine) -> list[Delta]:
    """A step that raises what no request is to blame for, on the engine's own thread."""
    if breaks:
        raise SystemError("the ground is gone")
    return step(engine)


def watched(*arguments: Any, **options: Any) -> Any:
    """Return the application, and begin to listen for signals."""
    made = make_app(*arguments, **options)
    service = made.state.service

    def tell(*_: Any) -> None:
        gc.collect()
        kinds = [type(thing) for thing in gc.get_objects()]
        held = {
            "bytes": allocated(),
            "tasks": len(asyncio.all_tasks(service.inbox._loop)),
            "tickets": len(service.inbox.tickets),
            "ticket objects": kinds.count(Ticket),
            "sequences": kinds.count(Text),
            "jobs": len(service.worker._jobs),
            # Those of the two pools, which grow to a bound, apart.
            "threads": sum(not one.name.startswith(("prompt_", "grammar_")) for one in threading.enumerate()),
            "objects": len(kinds),
        }
        print(json.dumps(held), flush=True)

    def break_down(*_: Any) -> None:
        global breaks
        breaks = True

    signal.signal(signal.SIGUSR1, tell)
    signal.signal(signal.SIGUSR2, break_down)
    return made


def install(told: str, said: str) -> None:
    """Let the server of this process be watched, and its two streams go to files that others read meanwhile."""
    tell_files(told, said)
    app.make_app = watched
    Engine.step = breaking_step  # type: ignore[method-assign]
