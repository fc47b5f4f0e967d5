"""The one pool of ranks of a test session, and the cases that only the long proofs try."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from tests.parallel.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Return the pool."""
    pool = Ranks()
    yield pool
    pool.close()


def of_proof(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Return cases, for `parametrize`, that run with --proof only."""
    return [pytest.param(*case, marks=pytest.mark.proof) for case in cases]
