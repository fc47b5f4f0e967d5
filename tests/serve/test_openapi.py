"""Every operation of the OpenAPI schema under random requests, some that fit it and some that do not (schemathesis).

No answer is a server error, and every one is what the schema says: status, content type, headers, body. A few requests
to each in the suite, always the same ones; hundreds under `--proof`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from internlm.serve.api.app import Access
from tests.serve.servers import Running, serving, slow_engine

schemathesis = pytest.importorskip("schemathesis")

KEY = "the-key"
FREE = ["GET /health", "GET /ready"]
OPERATIONS = [
    "GET /internlm/models", "GET /metrics", "GET /v1/models", "GET /v1/models/{name}",
    "POST /detokenize", "POST /internlm/chat/completions", "POST /tokenize",
    "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/encode",
]  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {
    "POST /detokenize": {"tokens": [5]},
    "POST /internlm/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "POST /tokenize": {"prompt": "the cat"},
    "POST /v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "POST /v1/completions": {"prompt": [5, 6]},
    "POST /v1/encode": {"input": "the cat"},
}
"""What can be answered, to which random fields are added."""
CHECKS = [
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "ignored_auth",
]  # fmt: skip
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    # A short context and little time: what is asked for counts here, not what is written.
    with serving(slow_engine(context=64), access=Access(keys=(KEY,)), timeout=1.0) as running:
        yield running


@pytest.fixture(scope="module")
def operations(server: Running) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json", headers=headers)
    return {found.ok().label: found.ok() for found in schema.get_all_operations()}


@pytest.fixture
def examples(pytestconfig: pytest.Config) -> int:
    return 200 if pytestconfig.getoption("--proof") else 3


def ask(operation: Any, mode: Any, most: int, check: Callable[[Any, random.Random], None]) -> None:
    """Call `check` with up to `most` requests to an operation, and with dice."""
    quiet = {"database": None, "deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}

    @hypothesis.settings(max_examples=most, derandomize=True, phases=[hypothesis.Phase.generate], **quiet)
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), seed=st.integers(0, 2**32))
    def run(case: Any, seed: int) -> None:
        check(case, random.Random(seed))

    run()


def test_every_operation_is_asked(operations: dict[str, Any]) -> None:
    assert sorted(operations) == sorted(OPERATIONS + FREE)


@pytest.mark.parametrize("name", OPERATIONS + FREE)
def test_answers_are_those_of_the_schema(name: str, server: Running, operations: dict[str, Any], examples: int) -> None:
    schemathesis.checks.load_all_checks()
    checks = schemathesis.checks.CHECKS.get_by_names(CHECKS)
    seen: list[int] = []

    def check(case: Any, dice: random.Random) -> None:
        response = case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, checks=checks)
        seen.append(response.status_code)

    def check_few(case: Any, dice: random.Random) -> None:
        """Keep so few of the random fields that many a request can be answered."""
        kept = dice.sample(sorted(case.body), min(3, len(case.body)))
        case.body = {key: case.body[key] for key in kept} | NEEDED[name]
        if "completions" in name and dice.random() < 0.5:
            case.body["stream"] = True
        check(case, dice)

    modes = schemathesis.GenerationMode
    ask(operations[name], modes.POSITIVE, examples, check)
    if name in NEEDED:
        ask(operations[name], modes.POSITIVE, examples, check_few)
        ask(operations[name], modes.NEGATIVE, examples, check)
        assert 400 in seen
    assert 200 in seen or "{" in name
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize("name", OPERATIONS)
def test_without_a_key_there_is_no_answer(name: str, operations: dict[str, Any]) -> None:
    def check(case: Any, dice: random.Random) -> None:
        response = case.call()
        assert response.status_code == 401
        case.validate_response(response)

    ask(operations[name], schemathesis.GenerationMode.POSITIVE, 1, check)
