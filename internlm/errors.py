"""What a user can get wrong, said so that the next step is clear.

The command line prints the message alone and exits with `exit_code`; a traceback means a defect of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class InternLMError(Exception):
    """Base of every error that a user can cause.

    Args:
        what: the complaint, one clause.
        where: file, line, key or tensor name it is about.
        got: the value received, shown with `repr`.
        allowed: the values that would have been taken.
        do: the next step, one sentence; None: the allowed value that `got` is like, if there is one.
    """

    exit_code = 1
    where: object
    """What the complaint is about."""

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        allowed: Iterable[object] | None = None,
        do: str | None = None,
    ) -> None:
        text = what if where is None else f"{where}: {what}"
        if got is not None:
            text += f" (got {got!r})"
        if allowed is not None:
            names = [str(value) for value in allowed]
            text += "; allowed: " + ", ".join(names)
            do = do or (did_you_mean(got, names) if isinstance(got, str) else None)
        if do:
            text += f". {do}"
        super().__init__(text)
        self.where = where


class UsageError(InternLMError):
    """The command line itself is wrong."""

    exit_code = 2


class ConfigError(InternLMError):
    """A recipe has an unknown key, a wrong type or a contradiction."""


class DataError(InternLMError):
    """A text, a conversation or a token shard cannot be used."""


class TokenizerError(InternLMError):
    """A tokenizer file cannot be read, or lacks a token that is needed."""


class StorageError(InternLMError):
    """A file is missing, incomplete, damaged, or could not be written."""


class WeightsError(InternLMError):
    """Weights do not fit the model: missing, left over, or of another shape."""


class TrainingError(InternLMError):
    """Training cannot go on: numbers are not finite, or the run folder does not fit the recipe."""


class EngineError(InternLMError):
    """A generation request cannot be served."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def install_command(extra: str) -> str:
    """Return the command that installs an extra of this package, as the package itself was installed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        return f"in a checkout of internlm: pip install -c constraints.txt '.[{extra}]'"  # no index has it
    if root == Path.cwd():
        return f"pip install -c constraints.txt -e '.[{extra}]'"
    return f"pip install -c '{root}/constraints.txt' -e '{root}[{extra}]'"


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return `Did you mean 'x'?` for the closest of `known`, or None when nothing is close."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else None
