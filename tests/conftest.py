"""Fixtures that every room shares."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["INTERNLM_ALLOCATOR"] = "off"  # tests measure nothing: no restarts

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proof", action="store_true", help="run the long proofs in full length")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
