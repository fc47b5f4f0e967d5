"""What a client is told when something goes wrong: one error object, everywhere.

{"error": {"message": "…", "type": "invalid_request_error", "param": "temperature", "code": null}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from internlm.errors import InternLMError
from internlm.infer.request import TooLong
from internlm.infer.worker import Busy, Stopping

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
DEFECT = "the server has a defect; its log says more"
PARAMS = {"tokens": "prompt", "stop_strings": "stop", "prompt_logprobs": "logprobs", "stop_ids": "stop_token_ids"}
"""Field of an engine's request → of the client's, where they differ."""


class ApiError(InternLMError):
    """A request that gets an error response; `param` is the field it is about, `code` a word for programs."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def body_of(error: ApiError) -> bytes:
    """Return the body of an error response: ASCII, since a message may hold what UTF-8 cannot write."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    told = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    return json.dumps({"error": told}).encode()


def from_error(error: InternLMError) -> ApiError:
    """Return how an error of ours is told to a client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(str(error), status=429, code="too_many_requests")
    if isinstance(error, Stopping):
        return ApiError(str(error), status=503, code="unavailable")
    code = "context_length_exceeded" if isinstance(error, TooLong) else None
    where = error.where if isinstance(error.where, str) and error.where.isidentifier() else None
    return ApiError(str(error), param=PARAMS.get(where, where) if where else None, code=code)


def from_validation(errors: Sequence[Any], body: Any = None) -> ApiError:
    """Return how a body that does not fit its type is told: the first fault that pydantic found, without its input.

    `body` is its text where it is no JSON, its bytes where no header says that they are.
    """
    if isinstance(body, bytes):
        return ApiError("no header says that the body is JSON: send it with Content-Type: application/json")
    first = errors[0]
    path = [str(part) for part in first.get("loc", ()) if part != "body"]
    if first.get("type") in ("json_invalid", "missing") and (not path or path[0].isdigit()):
        what = "the body is missing"
        if first["type"] == "json_invalid":
            what = "the body is no JSON"
            if isinstance(body, str) and path:
                at = int(path[0])
                reason = str(first.get("ctx", {}).get("error", "it ends here"))
                line, column = body.count("\n", 0, at) + 1, at - body.rfind("\n", 0, at)
                what += f": {reason} (line {line}, column {column})"
        return ApiError(f"{what}: send JSON with Content-Type: application/json")
    is_object = first.get("type") in ("model_attributes_type", "model_type")
    text = "must be an object" if is_object else str(first.get("msg", "is wrong")).removeprefix("Value error, ")
    param = path[0] if path else None
    place = ".".join(part for part in path if "[" not in part)[:200]
    return ApiError(f"{place}: {text}" if place else text, param=param)
