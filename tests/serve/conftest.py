"""The chat page in a browser, over a server that says what a test wants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.chromium import chromium, opened
from tests.serve.openai_stub import Stub, serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving() as found:
        yield found


@pytest.fixture
def page(browser: Any, stub: Stub) -> Iterator[Any]:
    with opened(browser, stub.url) as found:
        yield found
