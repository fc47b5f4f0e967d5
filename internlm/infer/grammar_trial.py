"""Compile a grammar in a process of its own, which may take too long, take too much memory, or crash.

    python grammar_trial.py < {"lark": "start: …", "is_foreign": false}  → {"lark": "start: …", "problem": null}

`grammar` runs this file by its path before it compiles a text of a stranger in its own process: the library bounds most
of its work, and a few schemas of a kilobyte (twenty patterns in one `allOf`) keep it busy for ever. It imports nothing
else of this package, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import json
import sys

MOST_MEMORY = 2**30
"""Bytes of address space, where the system can limit it."""
MOST_SECONDS = 60
"""Of computing, likewise, for when who started the process and stops it earlier was killed."""


def main() -> None:
    """Read one request from standard input and answer it on standard output."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
    request = json.load(sys.stdin)
    lark, problem = try_out(request["lark"], request["is_foreign"])
    json.dump({"lark": lark, "problem": problem}, sys.stdout)


def try_out(lark: str, is_foreign: bool) -> tuple[str, str | None]:
    """Return a grammar, which may be GBNF if it `is_foreign`, as Lark, and what is wrong with it."""
    import llguidance
    from llguidance.gbnf_to_lark import any_to_lark

    if is_foreign:
        try:
            lark = any_to_lark(lark)
        except Exception as error:  # its reader of GBNF raises what it likes
            return lark, str(error)
    limits = llguidance.LLParserLimits(verbose_errors=False)
    grammar = llguidance.LLMatcher.grammar_from_lark(lark)
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return lark, matcher.get_error() or None


if __name__ == "__main__":
    main()
