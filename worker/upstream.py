"""The upstream: one call of the MiMo API in, one outcome out.

When it goes wrong, nothing is raised: refused connections, timeouts (in all, connecting, idle), cut bodies and
nonsense all come back as an `Outcome` that names what happened and whether the request may have been charged. It
never retries, follows no redirect (the key would go elsewhere) and keeps no cookie; connections are kept alive.

Below is httpx's transport interface, without its client: of that one nothing but overhead would be used.
"""

from __future__ import annotations

import asyncio
import base64
import time
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

import aiohttp
import httpx
import msgspec
from httpx_aiohttp import AiohttpTransport

from jobs.settings import Settings, is_loopback
from worker.answers import MESSAGES, NOT_JSON, read_answer
from worker.outcome import Outcome, ResponseHead
from worker.sse import MAX_ANSWER_BYTES, ChatJoiner, Joiner, MessagesJoiner

CHAT = "/v1/chat/completions"
MAX_ERROR_BYTES = 64 * 1024
AUTO_STREAM_TOKENS = 4096

# How long to wait for the end of a stream that has said all, so that its connection can be used again.
_LINGER_S = 0.5
_KEEPALIVE_S = 30.0

# Set once the call of this context has a connection: from then on something may have been sent.
_connected: ContextVar[list[bool]] = ContextVar("connected")


class BodyFields(msgspec.Struct):
    """The fields of a request body that decide how it is called."""

    stream: Any = None
    max_completion_tokens: Any = None
    max_tokens: Any = None


class Call(NamedTuple):
    """How one job is asked of the upstream."""

    endpoint: str
    body: bytes
    stream: bool


_fields = msgspec.json.Decoder(BodyFields)
_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TRUE, _FALSE = msgspec.Raw(b"true"), msgspec.Raw(b"false")


def wants_stream(fields: BodyFields, streaming: Literal["auto", "always", "never"]) -> bool:
    """Whether to stream: `auto` does if the body says so, or allows over 4,096 tokens."""
    if streaming != "auto":
        return streaming == "always"
    limits = (fields.max_completion_tokens, fields.max_tokens)
    return fields.stream is True or any(isinstance(n, int | float) and n > AUTO_STREAM_TOKENS for n in limits)


def prepare(endpoint: str, body: bytes, streaming: Literal["auto", "always", "never"]) -> Call:
    """The body as it is sent: as it came, but for `stream` and, for chat, the usage that must be asked for."""
    try:
        fields = _fields.decode(body)
        stream = wants_stream(fields, streaming)
        if not stream and not fields.stream:
            return Call(endpoint, body, False)
        raw = _raw_fields.decode(body)  # values as they came, numbers to the last digit
        raw["stream"] = _TRUE if stream else _FALSE
        if not stream:
            raw.pop("stream_options", None)
        elif endpoint == CHAT:
            options = raw.get("stream_options")
            given = _raw_fields.decode(options) if options is not None and bytes(options) != b"null" else {}
            raw["stream_options"] = msgspec.Raw(msgspec.json.encode({**given, "include_usage": _TRUE}))
        return Call(endpoint, msgspec.json.encode(raw), stream)
    except NOT_JSON:
        return Call(endpoint, body, False)  # no body of ours; the upstream will say what it thinks of it


class _Post(httpx.Request):
    """A request made of ready parts; what `httpx.Request` does to parse and copy them is a quarter of a call's cost."""

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
        self._call_timeout_s = settings.call_timeout_s
        self._own = transport is None
        self._transport = transport or _transport(settings)
        self._clock = clock
        self._urls = {endpoint: httpx.URL(address(settings, endpoint)) for endpoint in (CHAT, MESSAGES)}
        self._headers = {endpoint: _headers(settings, endpoint) for endpoint in (CHAT, MESSAGES)}
        self._extensions = {
            # To the aiohttp transport "pool" is all it takes to get a connection: the resolver, TCP and TLS.
            "timeout": {"pool": settings.connect_timeout_s, "read": settings.idle_timeout_s}
        }

    async def call(self, endpoint: str, body: bytes) -> Outcome:
        """Call once; raises nothing but `CancelledError` (and `KeyError` for an endpoint that is none)."""
        call = prepare(endpoint, body, self._streaming)
        request = _Post(self._urls[endpoint], self._headers[endpoint], call.body, self._extensions)
        outcome = Outcome(started_at=self._clock())
        connected: list[bool] = []
        _connected.set(connected)
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
                    await _read_body(response.aiter_bytes() if head.encoded else aiter(response.stream), sink, deadline)
                finally:
                    await response.aclose()
        except Exception as error:  # a transport's errors are not all mapped, and none may cost a job
            origin = error.__cause__ or error
            outcome.sent = outcome.sent or bool(connected) or not (self._own or isinstance(origin, _NEVER_SENT))
            failure = "timeout" if deadline.expired() else _name(origin, outcome.sent)
            # Of what came before there was a connection the message is of help, and holds nothing of the job.
            outcome.detail = type(origin).__name__ if outcome.sent else f"{type(origin).__name__}: {origin}"[:300]
        outcome.latency_s = time.perf_counter() - begun
        _conclude(outcome, call, sink, failure)
        return outcome

    def _read_head(self, response: httpx.Response, outcome: Outcome) -> ResponseHead:
        head = ResponseHead.read(response.headers.raw, self._clock())
        outcome.status = response.status_code
        outcome.request_id = head.request_id
        outcome.retry_after_s = head.retry_after_s
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


async def _read_body(chunks: AsyncIterator[bytes], sink: _Sink, deadline: asyncio.Timeout) -> None:
    lingering = False
    try:
        async for chunk in chunks:
            sink.feed(chunk)
            if sink.done and not lingering:
                lingering = True
                deadline.reschedule(asyncio.get_running_loop().time() + _LINGER_S)
            elif sink.stopped and not lingering:
                break
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
    if sink.error is not None:
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
    outcome.usage = answer.usage
    outcome.request_id = outcome.request_id or answer.id


# The aiohttp transport gives a refused connection and a lost one the same httpx error: look at what it was before.
_NEVER_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.UnsupportedProtocol,
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
)


def _name(origin: BaseException, sent: bool) -> str:
    timed_out = isinstance(origin, TimeoutError | httpx.TimeoutException)
    if sent:
        return "idle_timeout" if timed_out else "connection_lost"
    return "connect_timeout" if timed_out else "connect_error"


class _Connector(aiohttp.TCPConnector):
    """Notes for each call that it has a connection: what fails before is never charged."""

    async def connect(self, *args: Any, **kwargs: Any) -> aiohttp.connector.Connection:
        connection = await super().connect(*args, **kwargs)
        _connected.get().append(True)
        return connection


def _transport(settings: Settings) -> httpx.AsyncBaseTransport:
    context = httpx.create_ssl_context()

    def session() -> aiohttp.ClientSession:
        # No limit here: the engine bounds the calls in flight, and a call that waited would look like a slow connect.
        connector = _Connector(limit=0, keepalive_timeout=_KEEPALIVE_S, ssl=context)
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

    return AiohttpTransport(verify=context, client=session, proxy=_proxy(settings.base_url))


def _proxy(base_url: str) -> httpx.Proxy | None:
    """The proxy that the environment names for this address, looked up once."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    given = proxies.get(parts.scheme) or proxies.get("all")
    if not given:
        return None
    proxy = urlsplit(given if "://" in given else f"http://{given}")
    headers = {}
    if proxy.username:
        pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    return httpx.Proxy(urlunsplit((proxy.scheme, proxy.netloc.rpartition("@")[2], "", "", "")), headers=headers)


def address(settings: Settings, endpoint: str) -> str:
    """Where the calls of an endpoint go: the unified address, or with an endpoint path that of its model."""
    base, path = settings.base_url, settings.endpoint_path
    if path is None:
        return base + endpoint
    return f"{base}/{path}{MESSAGES}" if endpoint == MESSAGES else f"{base}/v1/ai/{path}/chat/completions"


def _headers(settings: Settings, endpoint: str) -> httpx.Headers:
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
        # Answers are small, and what is compressed on its way through a gateway arrives late when streamed.
        "Accept-Encoding": "identity",
        "User-Agent": f"mimoq/{version('mimoq')}",
    }
    if settings.api_key is not None:
        headers["Authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
    if endpoint == MESSAGES:
        headers["anthropic-version"] = "2023-06-01"
    return httpx.Headers(headers)
