"""The one pool of ranks of a test session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Return the pool."""
    pool = Ranks()
    yield pool
    pool.close()
