"""What is answered when something can't be done: one exception, written in the shape of the protocol that was called.

Native routes answer RFC 9457, those of OpenAI and Anthropic their own error objects. Texts are ours and say what to do;
they never repeat a prompt, an answer or a token.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from jobs.errors import (
    Conflict,
    InvalidRequest,
    MimoqError,
    NoRoom,
    NotFound,
    StoreFull,
    StoreUnavailable,
    UsageError,
)

Protocol = Literal["native", "openai", "anthropic"]

#: Seconds after which a store that was away is worth another try.
STORE_AWAY_S = 1
#: Characters of a detail; what libraries say of bad input may be long.
DETAIL_CHARS = 1_000

_TITLES = {
    400: "Bad request",
    401: "No valid token",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    408: "Too slow",
    409: "Conflict",
    413: "Too large",
    415: "Unsupported media type",
    422: "Not valid",
    429: "Too many requests",
    431: "Headers too large",
    500: "Internal error",
    502: "No good answer",
    503: "Not available",
    504: "Not answered in time",
    507: "No room",
}
#: What paths of OpenAI's protocol begin with.
_OPENAI = ("/v1/chat/completions", "/v1/files", "/v1/batches", "/v1/uploads", "/v1/models")
#: Tells SDKs not to try again: it would be refused again, or paid for again.
FINAL = {"x-should-retry": "false"}
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class Problem(Exception):
    """An error answer: status, a code for programs, a detail for people, further headers and members."""

    def __init__(
        self, status: int, code: str, detail: str, *, headers: dict[str, str] | None = None, **members: Any
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail[:DETAIL_CHARS]
        self.headers = headers or {}
        self.members = members

    def members_of(self, protocol: Protocol, request_id: str) -> dict[str, Any]:
        """The JSON object of the answer."""
        if protocol == "openai":
            kind = _OPENAI_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
            code = "invalid_api_key" if self.status == 401 else self.code  # as clients know it
            error = {"message": self.detail, "type": kind, "param": None, "code": code, **self.members}
            return {"error": error}
        own = {name: value for name, value in self.members.items() if name != "param"}  # which is OpenAI's
        if protocol == "anthropic":
            kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            error = {"type": kind, "message": self.detail, **own}
            return {"type": "error", "error": error, "request_id": request_id}
        return {
            "type": f"urn:mimoq:problem:{self.code}",
            "title": _TITLES.get(self.status, "Error"),
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            **own,
        }

    def body(self, protocol: Protocol, request_id: str) -> bytes:
        """The answer's body."""
        return msgspec.json.encode(self.members_of(protocol, request_id))


def media_type(protocol: Protocol) -> str:
    """Of an error answer."""
    return "application/problem+json" if protocol == "native" else "application/json"


def protocol_of(path: str) -> Protocol:
    """Whose shapes a path speaks."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    if path.startswith(_OPENAI):
        return "openai"
    return "native"


def problem_of(error: MimoqError) -> Problem:
    """The answer to an error of the store or of a request."""
    if isinstance(error, NotFound):
        return Problem(404, "not_found", str(error))
    if isinstance(error, Conflict):
        return Problem(409, "conflict", str(error))
    if isinstance(error, InvalidRequest):
        return Problem(422, "invalid_request", str(error))
    if isinstance(error, UsageError):
        return Problem(422, "invalid", str(error))
    if isinstance(error, NoRoom):
        return Problem(507, "no_room", error.plain)
    if isinstance(error, StoreFull):
        return Problem(507, "store_full", str(error))
    if isinstance(error, StoreUnavailable):
        again = {"Retry-After": str(STORE_AWAY_S)}
        return Problem(503, "store_unavailable", str(error), headers=again)
    return Problem(500, "failed", str(error))


def not_found(what: str) -> Problem:
    """No such thing, or not this tenant's: nobody learns which."""
    return Problem(404, "not_found", f"there is no such {what}")
