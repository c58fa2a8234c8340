"""The upstream: one call of the MiMo API in, one outcome out.

When it goes wrong, nothing is raised: refused connections, timeouts (in all, connecting, idle), cut bodies and
nonsense all come back as an `Outcome` that names what happened and whether the request may have been charged. It
never retries, follows no redirect (the key would go elsewhere) and keeps no cookie; connections are kept alive.

Below is httpx's transport interface, without its client: of that one nothing but overhead would be used.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx

from jobs.settings import Settings
from worker.answers import MESSAGES, read_answer
from worker.outcome import Outcome, ResponseHead, Usage
from worker.request import CHAT, Call, address, headers, prepare
from worker.sse import MAX_ANSWER_BYTES, ChatJoiner, Joiner, MessagesJoiner
from worker.transport import Transport

MAX_ERROR_BYTES = 64 * 1024

#: Stands where an upstream quotes the key.
HIDDEN = "[the API key]"

# How long to wait for the end of a stream that has said all, so that its connection can be used again.
_LINGER_S = 0.5

# Taking the pieces of a stream together saves more than half of its CPU; it may take this share longer for it.
_GATHER = 0.02
_GATHER_MAX_S = 0.1


class _Post(httpx.Request):
    """A request made of ready parts: to parse and copy them takes `httpx.Request` 18 µs."""

    def __init__(self, url: httpx.URL, headers: httpx.Headers, body: bytes, extensions: dict[str, Any]) -> None:
        self.method = "POST"
        self.url = url
        self.headers = headers
        self.extensions = extensions
        self.stream = httpx.ByteStream(body)
        self._body = body

    @property
    def content(self) -> bytes:
        return self._body


class Upstream:
    """Calls one account of the upstream; use it in one event loop, and `aclose` it there."""

    def __init__(
        self,
        settings: Settings,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._streaming = settings.streaming
        self._key = settings.api_key
        self._call_timeout_s = settings.call_timeout_s
        self._own = transport is None
        self._transport = transport or Transport(settings.base_url)
        self._clock = clock
        self._urls = {endpoint: httpx.URL(address(settings, endpoint)) for endpoint in (CHAT, MESSAGES)}
        self._headers = {endpoint: headers(settings, endpoint) for endpoint in (CHAT, MESSAGES)}
        self._timeout = {"pool": settings.connect_timeout_s, "read": settings.idle_timeout_s}

    async def call(self, endpoint: str, body: bytes) -> Outcome:
        """Call once; raises nothing but `CancelledError` (and `KeyError` for an endpoint that is none)."""
        call = prepare(endpoint, body, self._streaming)
        extensions = {"timeout": self._timeout}
        request = _Post(self._urls[endpoint], self._headers[endpoint], call.body, extensions)
        outcome = Outcome(started_at=self._clock())
        sink: _Sink | None = None
        failure: str | None = None
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(self._call_timeout_s) as deadline:
                response = await self._transport.handle_async_request(request)
                outcome.sent = True
                try:
                    head = self._read_head(response, outcome)
                    sink = _sink(call, response.status_code, head)
                    await _read_body(response, head.encoded, sink, deadline)
                finally:
                    await response.aclose()
        except Exception as error:  # a transport's errors are not all mapped, and none may cost a job
            origin = error.__cause__ or error
            never = "connected" not in extensions if self._own else isinstance(error, _NEVER_SENT)
            outcome.sent = outcome.sent or not never
            failure = "timeout" if deadline.expired() else _name(origin, outcome.sent)
            # Of what came before there was a connection the message is of help, and holds nothing of the job.
            outcome.detail = type(origin).__name__ if outcome.sent else f"{type(origin).__name__}: {origin}"[:300]
        outcome.latency_s = time.perf_counter() - begun
        _conclude(outcome, call, sink, failure)
        self._hide_key(outcome)
        return outcome

    def _hide_key(self, outcome: Outcome) -> None:
        """An upstream may quote the key that it refuses; what it says is stored and shown."""
        if self._key is None:
            return
        key = self._key.get_secret_value()
        if outcome.body is not None and key.encode() in outcome.body:
            outcome.body = outcome.body.replace(key.encode(), HIDDEN.encode())
        if outcome.request_id is not None:
            outcome.request_id = outcome.request_id.replace(key, HIDDEN)

    def _read_head(self, response: httpx.Response, outcome: Outcome) -> ResponseHead:
        head = ResponseHead.read(response.headers.raw, self._clock())
        outcome.status = response.status_code
        outcome.request_id = head.request_id
        outcome.retry_after_s, outcome.retry_after_asked_s = head.retry_after_s, head.retry_after_asked_s
        outcome.rate_limits = head.rate_limits
        return head

    async def aclose(self) -> None:
        """Close every connection."""
        await self._transport.aclose()


class _PlainBody:
    """A body in one piece, with the same hand as a joiner; `limit` bytes of it, and whether there were more."""

    complete = done = invalid = False
    error: bytes | None = None

    def __init__(self, limit: int) -> None:
        self.too_large = False
        self._limit = limit
        self._room = limit
        self._parts: list[bytes] = []

    @property
    def stopped(self) -> bool:
        return self.too_large

    def feed(self, chunk: bytes) -> None:
        self._parts.append(chunk)
        self._room -= len(chunk)
        self.too_large = self._room < 0

    def finish(self) -> bytes:
        return b"".join(self._parts)[: self._limit]


_Sink = Joiner | _PlainBody


def _sink(call: Call, status: int, head: ResponseHead) -> _Sink:
    if not 200 <= status < 300:
        return _PlainBody(MAX_ERROR_BYTES)
    if head.content_type != "text/event-stream":
        return _PlainBody(MAX_ANSWER_BYTES)
    return MessagesJoiner() if call.endpoint == MESSAGES else ChatJoiner()


async def _read_body(response: httpx.Response, encoded: bool, sink: _Sink, deadline: asyncio.Timeout) -> None:
    assert isinstance(response.stream, httpx.AsyncByteStream)
    chunks = response.aiter_bytes() if encoded else aiter(response.stream)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    lingering = False
    try:
        async for chunk in chunks:
            sink.feed(chunk)
            if sink.done:
                if not lingering:
                    lingering = True
                    deadline.reschedule(loop.time() + _LINGER_S)
            elif sink.stopped:
                break
            elif isinstance(sink, Joiner) and not sink.complete:
                await asyncio.sleep(min((loop.time() - begun) * _GATHER, _GATHER_MAX_S))
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()


def _conclude(outcome: Outcome, call: Call, sink: _Sink | None, failure: str | None) -> None:
    """What was read, and what that says about how the call ended."""
    if sink is None or outcome.status is None:
        outcome.error = failure
        return
    outcome.body = sink.finish()
    outcome.streamed = isinstance(sink, Joiner)
    if not 200 <= outcome.status < 300:
        outcome.detail = None  # the status says it all, even where its body was cut
        return
    told: Usage | None = None
    if sink.error is not None:
        told = read_answer(call.endpoint, outcome.body).usage  # what the stream said before its error is on the bill
        outcome.body = sink.error
    elif sink.too_large:
        outcome.error, outcome.body = "too_large", None
        return
    elif sink.invalid:
        outcome.error = "invalid_response"
    elif outcome.streamed and not sink.complete:
        outcome.error = "stream_cut" if failure in (None, "connection_lost") else failure
    elif not outcome.streamed:
        outcome.error = failure
    if outcome.error is None:
        outcome.detail = None
    outcome.answer = answer = read_answer(call.endpoint, outcome.body)
    outcome.usage = answer.usage or told
    outcome.request_id = outcome.request_id or answer.id


# What another transport raises before there is a connection; ours says so itself.
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)


def _name(origin: BaseException, sent: bool) -> str:
    timed_out = isinstance(origin, TimeoutError | httpx.TimeoutException)
    if sent:
        return "idle_timeout" if timed_out else "connection_lost"
    return "connect_timeout" if timed_out else "connect_error"
