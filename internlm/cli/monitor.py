"""`internlm monitor`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internlm.train.watch.monitor import Monitor

DESCRIPTION = """\
Show a run that is under way, or over: progress, losses, speed, checkpoints, ranks, warnings. Only its files are read:
any machine that sees the folder will do.

  internlm monitor runs/a             until the run is done, or Ctrl-C
  internlm monitor runs/a --once      one time; so it is where the output is no terminal
  internlm monitor runs/a --json      one JSON object

NO_COLOR=1 turns colours off."""

_COLOURS = {"red": "31", "green": "32", "yellow": "33"}
_ASCII = "_.-~=+*#"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument("--once", action="store_true", help="print it one time")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--every", metavar="SECONDS", type=float, default=2.0, help="between two looks (default 2)")


def run(arguments: argparse.Namespace) -> int:
    """Show the run."""
    from internlm.errors import UsageError
    from internlm.train.watch.monitor import Monitor

    if not arguments.every > 0:
        raise UsageError(f"--every {arguments.every:g}: must be above 0")
    watch = Monitor(arguments.run)
    watch.look()
    if arguments.json:
        print(json.dumps(watch.facts()))
    elif arguments.once or not sys.stdout.isatty():
        print("\n".join(_picture(watch.facts(), None)))
    else:
        _live(watch, arguments.every)
    return 0


def _picture(facts: dict[str, Any], height: int | None) -> list[str]:
    """Return the lines of a picture, coloured where the terminal takes it, and no more than fit."""
    from internlm.train.watch.monitor import BLOCKS, lines

    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
        blocks = BLOCKS
    except (UnicodeEncodeError, LookupError):
        blocks = _ASCII
    shown = lines(facts, shutil.get_terminal_size().columns, blocks)[:height]
    return [
        f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if colours and colour in _COLOURS else text for colour, text in shown
    ]


def _live(watch: Monitor, every_s: float) -> None:
    """Show the run on the whole screen until it is done; the last picture stays."""
    with contextlib.suppress(KeyboardInterrupt), _whole_screen():
        while True:
            watch.look()
            facts = watch.facts()
            picture = _picture(facts, max(1, shutil.get_terminal_size().lines - 1))
            sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\r\n" for line in picture) + "\x1b[J")
            sys.stdout.flush()
            if facts["state"] == "done":
                break
            time.sleep(every_s)
    print("\n".join(_picture(watch.facts(), None)))


@contextlib.contextmanager
def _whole_screen() -> Iterator[None]:
    """Lend the terminal's second screen, without a cursor."""

    def end(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, end)
    sys.stdout.write("\x1b[?1049h\x1b[?25l")
    try:
        yield
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, before)
