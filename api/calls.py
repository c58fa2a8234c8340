"""Waiting calls: the ordinary request of an ordinary SDK, queued on the interactive lane, answered when its answer comes.

What goes wrong: the client goes away, or `MIMOQ_SYNC_TIMEOUT_S` is over. The job goes on; the same call made again by
the SDK (it says so) finds it instead of paying for another. What mimoq has given up, after all its own attempts, the
SDK is told not to try again. A streamed answer is made from the finished response; until that is there, comments keep
the connection alive.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from api import bodies, replay, submitting
from api.auth import Caller
from api.core import Core
from api.problems import FINAL, Problem, problem_of, protocol_of
from api.retries import Retry, gone, is_retry
from api.routing import Route, caller_of, core_of, takes
from api.shapes import NewBatchOptions
from api.submitting import Key
from jobs import joins
from jobs.errors import Conflict, InvalidRequest, MimoqError, StoreFull
from jobs.looks import JobLook
from jobs.requests import CHAT, MESSAGES, parse_body
from jobs.results import upstream_error
from jobs.singles import Single
from jobs.states import JobState, job_id

#: Seconds in which a streamed call may still get an error as its status; then its stream begins.
STATUS_S = 1.0
#: Seconds between two comments that keep a stream alive.
ALIVE_S = 5.0
#: Seconds after its time is over in which a call that is made again finds its job.
JOIN_S = 3_600

#: Bytes of a stream that are written together.
BLOCK_BYTES = 65_536
JOB_HEADER = "x-mimoq-job-id"

router = APIRouter(tags=["calls"], route_class=Route)


class Asked(msgspec.Struct):
    """What this call is told by its body."""

    stream: bool | None = False
    stream_options: dict[str, Any] | None = None


_decode_asked = msgspec.json.Decoder(Asked).decode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def _documented(shape: str, response: str, error: str) -> dict[str, Any]:
    """How a waiting call is documented."""
    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
    one = {"schema": {"type": "object", "description": response}}
    failed = {"description": error, "content": {"application/json": {"schema": {"type": "object"}}}}
    answers: dict[str, Any] = {
        "200": {
            "description": "The upstream's response as it came, or its stream.",
            "headers": {JOB_HEADER: {"description": "The job.", "schema": {"type": "string"}}},
            "content": {"application/json": one, "text/event-stream": {"schema": event}},
        },
        "4XX": failed,
        "5XX": failed,
    }
    return {"openapi_extra": {**takes(shape), "responses": answers}, "response_class": Response}


@router.post(CHAT, summary="Complete a chat", **_documented("ChatBody", "A chat completion.", "OpenAI's error object."))
async def complete_chat(request: Request, key: Key = None, retry: Retry = None) -> Response:
    """The call of OpenAI's SDKs."""
    return await _call(request, CHAT, key, retry)


@router.post(
    MESSAGES, summary="Create a message", **_documented("MessagesBody", "A message.", "Anthropic's error object.")
)
async def create_message(request: Request, key: Key = None, retry: Retry = None) -> Response:
    """The call of Anthropic's SDKs."""
    return await _call(request, MESSAGES, key, retry)


async def _call(request: Request, endpoint: str, key: str | None, retry: str | None) -> Response:
    core, caller = core_of(request), caller_of(request)
    again = is_retry(retry)
    with bodies.place(request):
        body = await bodies.read(request, core.settings.api_max_body_bytes)
        single, asked = await core.aside(len(body), lambda: _read(core, caller, endpoint, body, key, again))
        try:
            batch_id = (await core.submit(single)).batch_id
        except Conflict as error:
            raise Problem(409, "conflict", str(error), headers=FINAL) from None
        except StoreFull:
            found = await core.threads.call(lambda store: joins.join(store.client, single.join)) if again else None
            if found is None:
                raise
            batch_id = found
    return WaitingCall(core, caller, batch_id, single.join, endpoint, asked)


def _read(core: Core, caller: Caller, endpoint: str, body: bytes, key: str | None, again: bool) -> tuple[Single, Asked]:
    """What a call asks for. Raises a `Problem`."""
    try:
        made = parse_body(body, endpoint, model=core.model)
        asked = _decode_asked(made.body)
    except InvalidRequest as error:
        raise Problem(400, "invalid_request", str(error)) from None
    except msgspec.ValidationError:
        raise Problem(400, "invalid_request", "stream_options: must be an object") from None
    digest = joins.digest_of(caller.tenant, endpoint, body)
    new = submitting.new_batch(core, caller, NewBatchOptions(lane="interactive"), key, digest)
    return Single(new, made, digest, math.ceil(core.settings.sync_timeout_s) + JOIN_S, again), asked


class WaitingCall(Response):
    """The answer to a waiting call, given once the job has ended."""

    def __init__(self, core: Core, caller: Caller, batch_id: str, digest: str, endpoint: str, asked: Asked) -> None:
        super().__init__()
        self._core = core
        self._caller = caller
        self._batch_id = batch_id
        self._job_id = job_id(batch_id, 0)
        self._digest = digest
        self._protocol = protocol_of(endpoint)
        self._asked = asked
        self._own = {JOB_HEADER: self._job_id}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Waits, and answers; whoever leaves before that leaves the job to the same call made again."""
        core = self._core
        async with core.waiters.on(self._batch_id, 0) as waiter:
            look = asyncio.create_task(core.wait(self._caller, waiter, self._job_id, core.settings.sync_timeout_s))
            leaving = asyncio.create_task(gone(receive))
            answered = False
            try:
                patience_s = STATUS_S if self._asked.stream else None
                await asyncio.wait((look, leaving), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                if self._asked.stream and not leaving.done() and (not look.done() or _succeeded(look.result())):
                    await self._stream(look, leaving, send)
                elif look.done():
                    await self._whole(look.result(), scope["request_id"])(scope, receive, send)
                answered = _terminal(look) and not leaving.done()
            finally:
                look.cancel()
                leaving.cancel()
                with suppress(MimoqError):
                    tell = joins.answered if answered else joins.left
                    await core.threads.call(lambda store: tell(store.client, self._digest, self._batch_id))

    def _whole(self, look: JobLook, request_id: str) -> Response:
        """The answer that is no stream."""
        if _succeeded(look):
            assert look.stored is not None
            return Response(bytes(look.stored.result), headers=self._own, media_type="application/json")
        if (passed := _upstream_error(look)) is not None:
            status, body = passed
            if self._protocol == "anthropic":
                body = _as_anthropic(body, request_id)
            return Response(body, status, headers=self._own | FINAL, media_type="application/json")
        problem = self._problem(look)
        body = problem.body(self._protocol, request_id)
        return Response(body, problem.status, headers=self._own | problem.headers, media_type="application/json")

    def _problem(self, look: JobLook) -> Problem:
        """Why there is no response of the upstream."""
        about = look.stored.mimoq if look.stored is not None else None
        if about is not None and about.error is not None:
            failure = about.error
            status = failure.status if failure.status is not None and failure.status >= 400 else 502
            return Problem(status, failure.code, failure.message, headers=FINAL, job_id=self._job_id)
        if look.state.terminal:
            status = 504 if look.state is JobState.EXPIRED else 409
            return Problem(status, look.state.value, f"the job was {look.state}", headers=FINAL, job_id=self._job_id)
        place = f"its job goes on: GET /v1/jobs/{self._job_id}"
        if self._core.stopping.is_set():
            again = {"Retry-After": "1", "x-should-retry": "true"}
            return Problem(
                503, "stopping", f"this process is being stopped; {place}", headers=again, job_id=self._job_id
            )
        seconds = self._core.settings.sync_timeout_s
        detail = f"not answered within {seconds:g} s; {place}"
        return Problem(504, "timeout", detail, headers=FINAL, job_id=self._job_id)

    # -- streamed

    async def _stream(self, look: asyncio.Task[JobLook], leaving: asyncio.Task[None], send: Any) -> None:
        headers = {**self._own, "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
        headers["x-accel-buffering"] = "no"
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        while not look.done() and not leaving.done():
            await send({"type": "http.response.body", "body": replay.KEEP_ALIVE, "more_body": True})
            await asyncio.wait((look, leaving), timeout=ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
        if look.done():
            for block in _blocks(self._events(look)):
                await send({"type": "http.response.body", "body": block, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _events(self, look: asyncio.Task[JobLook]) -> Iterator[bytes]:
        chat = self._protocol == "openai"
        try:
            found = look.result()
        except (Problem, MimoqError) as error:  # the status is out already
            problem = error if isinstance(error, Problem) else problem_of(error)
        else:
            if _succeeded(found):
                assert found.stored is not None
                body = bytes(found.stored.result)
                usage = bool((self._asked.stream_options or {}).get("include_usage"))
                yield from replay.chat_events(body, usage) if chat else replay.messages_events(body)
                return
            if (passed := _upstream_error(found)) is not None:
                error_object = msgspec.json.decode(passed[1])["error"]
                yield replay.chat_error_event(error_object) if chat else replay.messages_error_event(error_object)
                return
            problem = self._problem(found)
        error_object = problem.members_of(self._protocol, "")["error"]
        yield replay.chat_error_event(error_object) if chat else replay.messages_error_event(error_object)


def _succeeded(look: JobLook) -> bool:
    return look.stored is not None and look.stored.status == "SUCCESS"


def _terminal(look: asyncio.Task[JobLook]) -> bool:
    """Whether a look has found that the job has ended."""
    return look.done() and not look.cancelled() and look.exception() is None and look.result().state.terminal


def _upstream_error(look: JobLook) -> tuple[int, bytes] | None:
    """Status and body of the upstream's last refusal, where it is an error object that SDKs can read."""
    about = look.stored.mimoq if look.stored is not None else None
    failure = about.error if about is not None else None
    if failure is None or failure.status is None or upstream_error(failure) is None:
        return None
    return failure.status, bytes(failure.body)


def _as_anthropic(body: bytes, request_id: str) -> bytes:
    """An error of the upstream as Anthropic's protocol has it: as it came, if it has that shape."""
    error = _decode_object(body)
    if "type" in error:
        return body
    return msgspec.json.encode({"type": "error", "error": error["error"], "request_id": request_id})


def _blocks(events: Iterator[bytes]) -> Iterator[bytes]:
    """Events in larger pieces: each is a write of the socket."""
    held: list[bytes] = []
    size = 0
    for event in events:
        held.append(event)
        size += len(event)
        if size >= BLOCK_BYTES:
            yield b"".join(held)
            held, size = [], 0
    yield b"".join(held)
