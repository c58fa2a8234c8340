"""The door: what every request passes before any route sees it, and every answer on its way out.

It gives each request an id, refuses what is too large, asks who calls and whether that token may, and turns whatever went
wrong into an answer in the shape of the protocol that was called. Every path needs a token but those of `OPEN`.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import secrets
import time
from collections.abc import Callable
from typing import Any

import structlog
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api.auth import Auth, Rates
from api.problems import Problem, media_type, problem_of, protocol_of
from jobs.errors import MimoqError

#: Paths that anybody may ask for.
OPEN = frozenset({"/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"})
#: Paths whose answer to a POST is a response of the upstream: who asks must be allowed to read too.
WAITING = frozenset({"/v1/chat/completions", "/v1/messages"})
#: Bytes of all headers of a request.
HEADER_BYTES = 32_768

_ENDED = Problem(
    503,
    "stopping",
    "this process is being stopped; if this was a submit, it may have been made: look for it before you send it again",
    headers={"Retry-After": "1"},
)

log = structlog.get_logger("api")

#: Told of each answer: route template (None: no route fits), method, status, seconds.
Observer = Callable[[str | None, str, int, float], None]


class Door:
    """ASGI middleware around the routes."""

    def __init__(self, app: Any, auth: Auth, rates: Rates, observe: Observer) -> None:
        self._app = app
        self._auth = auth
        self._rates = rates
        self._observe = observe
        # Ids that tell nothing of how many there were. Chance for each request would be a system call for each.
        self._key = secrets.token_bytes(32)
        self._numbers = itertools.count()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        number = next(self._numbers).to_bytes(8, "big")
        request_id = f"req_{hashlib.blake2b(number, key=self._key, digest_size=12).hexdigest()}"
        scope["request_id"] = request_id
        status, whole = 0, False

        async def answer(message: Any) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                name = b"request-id" if protocol_of(scope["path"]) == "anthropic" else b"x-request-id"
                message["headers"] = [*message.get("headers", ()), (name, request_id.encode())]
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self._admit(scope)
            await self._app(scope, receive, answer)
        except asyncio.CancelledError:  # by the server, whose patience at the end is over
            if not status:
                await answer_to(scope, _ENDED)(scope, receive, answer)
        except Exception as error:
            if whole:  # the answer told of this very error, or it came too late to matter to whoever asked
                if status < 500:
                    log.error("failed_after_answer", request_id=request_id, error=type(error).__name__)
            elif status and not isinstance(error, Problem):
                # Half an answer is out: the connection is closed, so that nobody takes it for a whole one.
                log.error("answer_cut", request_id=request_id, error=type(error).__name__)
                raise
            elif not status:
                await answer_to(scope, error)(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", None)
            self._observe(route, scope["method"], status, time.monotonic() - began)

    async def _admit(self, scope: Any) -> None:
        headers, path = scope["headers"], scope["path"]
        if sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES:
            raise Problem(431, "headers_too_large", f"the headers have over {HEADER_BYTES:,} bytes in all")
        if path in OPEN:
            return
        caller = await self._auth.caller(headers)
        self._rates.count(caller)
        reads = scope["method"] in ("GET", "HEAD", "OPTIONS")
        caller.need("read" if reads else "submit")
        if path in WAITING:
            caller.need("read")
        scope["caller"] = caller


def answer_to(scope: Any, error: Exception) -> Response:
    """The answer to what went wrong."""
    problem = _problem(error)
    protocol, request_id = protocol_of(scope["path"]), scope["request_id"]
    if protocol != "native" and problem.status == 422:  # which those know as 400
        problem.status = 400
    if problem.status >= 500 and not isinstance(error, (Problem, MimoqError)):
        log.error("request_failed", request_id=request_id, error=type(error).__name__, exc_info=error)
    return Response(
        problem.body(protocol, request_id), problem.status, headers=problem.headers, media_type=media_type(protocol)
    )


async def handle(request: Request, error: Exception) -> Response:
    """`answer_to` as the routes' exception handler."""
    return answer_to(request.scope, error)


def _problem(error: Exception) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, MimoqError):
        return problem_of(error)
    if isinstance(error, RequestValidationError):
        places = [(".".join(map(str, item["loc"][1:])), item["msg"]) for item in error.errors()[:5]]
        told = "; ".join(f"{place}: {message}" for place, message in places)
        return Problem(422, "invalid", told, param=places[0][0])
    if isinstance(error, HTTPException):
        words = {404: "there is nothing at this address", 405: "this address takes other methods: see Allow"}
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        detail = words.get(error.status_code, "the request can't be served")
        return Problem(error.status_code, code, detail, headers=dict(error.headers or {}))
    return Problem(500, "internal_error", "mimoq has failed here; its log says more, under the request id")
