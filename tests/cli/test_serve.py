"""What `internlm serve` takes for a key."""

from __future__ import annotations

import argparse

import pytest

from internlm.cli import KEY_VARIABLE, serve
from internlm.errors import UsageError


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(["model", *words])


@pytest.mark.parametrize("empty", ["", " \n"])
def test_a_variable_of_the_key_that_is_set_and_empty_is_not_taken_for_none(
    empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compose passes the line of an unfilled file of variables on so: who wrote it wants a server that asks."""
    monkeypatch.setenv(KEY_VARIABLE, empty)
    for words in ([], ["--api-key", "a"]):
        with pytest.raises(UsageError, match=rf"{KEY_VARIABLE}: is set, and empty.*openssl.*unset {KEY_VARIABLE}"):
            serve._keys(arguments(*words))
    monkeypatch.delenv(KEY_VARIABLE)
    assert serve._keys(arguments()) == ()
