"""The upstream client against a server of raw sockets: every way a call can go, and go wrong."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

import worker.upstream
from jobs.settings import Settings
from worker.dialing import find_proxy
from worker.outcome import Outcome, Usage
from worker.request import BodyFields, address, prepare, wants_stream
from worker.sse import ChatJoiner
from worker.upstream import Upstream
from worker.verdict import Kind, classify

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
KEY = "sk-very-secret"
BODY = b'{"messages":[{"role":"user","content":"a private prompt"}],"temperature":0.10}'
STREAMED = BODY[:-1] + b',"stream":true}'
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
ANSWER = json.dumps({"id": "c1", "choices": [{"message": {"content": "hi"}}], "usage": USAGE}, indent=1).encode()


class Asked:
    """One request as the server saw it, and the connection to answer on."""

    def __init__(self, head: bytes, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = head.decode().split("\r\n")
        self.method, self.target, _ = first.split(" ")
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
        self.body = body
        self.peer = writer.get_extra_info("peername")
        self.reader = reader
        self.writer = writer

    def send(self, status: int, body: bytes, *lines: str, kind: str = "application/json", size: int = -1) -> None:
        head = [f"HTTP/1.1 {status} Reason", f"Content-Type: {kind}", *lines]
        head.append(f"Content-Length: {len(body) if size < 0 else size}")
        self.writer.write("\r\n".join([*head, "", ""]).encode() + body)

    def begin_stream(self) -> None:
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.writer.write(head.encode())

    async def piece(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await self.writer.drain()

    def end_stream(self) -> None:
        self.writer.write(b"0\r\n\r\n")

    def reset(self) -> None:
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Handler = Callable[[Asked], Awaitable[None]]


class Server:
    """Answers each request by the next handler, the last one again and again; hangs where one returns nothing."""

    def __init__(self, *handlers: Handler) -> None:
        self.handlers = list(handlers)
        self.asked: list[Asked] = []
        self.url = ""
        self.tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = next(
                    int(s.split(b":")[1]) for s in head.split(b"\r\n") if s.lower().startswith(b"content-length")
                )
                asked = Asked(head[:-4], b"" if size > 1_000_000 else await reader.readexactly(size), reader, writer)
                self.asked.append(asked)
                await self.handlers[min(len(self.asked), len(self.handlers)) - 1](asked)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()


@asynccontextmanager
async def serving(*handlers: Handler) -> AsyncIterator[Server]:
    server = Server(*handlers)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()
        for task in server.tasks:
            task.cancel()
        await asyncio.gather(*server.tasks, return_exceptions=True)


def settings(base_url: str, **given: Any) -> Settings:
    given = {"api_key": KEY, "call_timeout_s": 20.0, **given}
    return Settings(_env_file=None, base_url=base_url, **given)


@asynccontextmanager
async def upstream(base_url: str, **given: Any) -> AsyncIterator[Upstream]:
    client = Upstream(settings(base_url, **given))
    try:
        yield client
    finally:
        await client.aclose()


def run(main: Coroutine[Any, Any, Outcome]) -> Outcome:
    outcome = asyncio.run(main)
    assert KEY not in repr(outcome) + str(outcome.detail) + str(outcome.error)
    assert outcome.latency_s > 0
    return outcome


async def ask(handler: Handler, body: bytes = BODY, endpoint: str = CHAT, **given: Any) -> Outcome:
    async with serving(handler) as server, upstream(server.url, **given) as client:
        return await client.call(endpoint, body)


async def forever(asked: Asked) -> None:
    await asyncio.Event().wait()


async def answer(asked: Asked) -> None:
    asked.send(200, ANSWER, "x-request-id: r1", "set-cookie: a=b")


def events(*values: object, done: bool = True) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(v).encode() for v in values) + (b"data: [DONE]\n\n" if done else b"")


def delta(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"id": "c2", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


# What is asked.


def test_a_plain_call_on_the_wire() -> None:
    async def main() -> Outcome:
        async with serving(answer) as server, upstream(server.url) as client:
            for _ in range(2):
                outcome = await client.call(CHAT, BODY)
            first, second = server.asked
            assert (first.method, first.target, first.body) == ("POST", CHAT, BODY)
            assert first.headers["authorization"] == f"Bearer {KEY}"
            assert first.headers["content-type"] == "application/json"
            assert first.headers["user-agent"].startswith("mimoq/")
            assert first.headers["host"] == server.url.removeprefix("http://")
            assert "anthropic-version" not in first.headers
            assert second.peer == first.peer, "the connection is kept"
            assert "cookie" not in second.headers
            return outcome

    outcome = run(main())
    assert outcome.status == 200
    assert outcome.error is None
    assert outcome.detail is None
    assert outcome.body == ANSWER
    assert outcome.request_id == "r1"
    assert outcome.usage == Usage(3, 4, 0, 0, 7)
    assert outcome.sent
    assert not outcome.streamed
    assert classify(outcome, CHAT).kind is Kind.SUCCEEDED


def test_messages_on_the_wire() -> None:
    async def main() -> Outcome:
        async with serving(answer) as server, upstream(server.url, api_key=None) as client:
            outcome = await client.call(MESSAGES, BODY)
            assert server.asked[0].target == MESSAGES
            assert server.asked[0].headers["anthropic-version"] == "2023-06-01"
            assert "authorization" not in server.asked[0].headers
            return outcome

    run(main())


def test_addresses() -> None:
    unified = settings("https://host/")
    assert address(unified, CHAT) == "https://host/v1/chat/completions"
    assert address(unified, MESSAGES) == "https://host/v1/messages"
    per_model = settings("https://host/v1", endpoint_path="my/path")
    assert address(per_model, CHAT) == "https://host/v1/ai/my/path/chat/completions"
    assert address(per_model, MESSAGES) == "https://host/my/path/v1/messages"


@pytest.mark.parametrize(
    ("fields", "auto"),
    [
        (BodyFields(), False),
        (BodyFields(stream=True), True),
        (BodyFields(stream=False, max_completion_tokens=4096), False),
        (BodyFields(max_completion_tokens=4097), True),
        (BodyFields(max_tokens=131072), True),
        (BodyFields(stream="yes", max_tokens="many"), False),
    ],
)
def test_when_to_stream(fields: BodyFields, auto: bool) -> None:
    assert wants_stream(fields, "auto") is auto
    assert wants_stream(fields, "always") is True
    assert wants_stream(fields, "never") is False


def test_the_body_that_is_sent() -> None:
    for plain in (BODY, b'{"stream":false}', b'{"stream":null}', b"[]", b"nonsense"):
        assert prepare(CHAT, plain, "auto") == (CHAT, plain, False)
    odd = b'{"stream":false,"seed":123456789012345678901234567890,"x":1.10,"stream_options":null}'
    assert prepare(CHAT, odd, "always").body == (
        b'{"stream":true,"seed":123456789012345678901234567890,"x":1.10,"stream_options":{"include_usage":true}}'
    )
    given = b'{"stream":true,"stream_options":{"x":1.0,"include_usage":false}}'
    assert prepare(CHAT, given, "auto").body == (b'{"stream":true,"stream_options":{"x":1.0,"include_usage":true}}')
    assert prepare(CHAT, given, "never") == (CHAT, b'{"stream":false}', False)
    assert prepare(MESSAGES, b'{"max_tokens":5000}', "auto") == (MESSAGES, b'{"max_tokens":5000,"stream":true}', True)
    assert prepare(CHAT, b'{"stream":true,"stream_options":5}', "auto").body == b'{"stream":true,"stream_options":5}'


# What comes back.


def test_a_streamed_answer_is_joined_and_its_connection_kept() -> None:
    stream = events(delta("Grü"), delta("ße 🎉", "stop"), {"id": "c2", "choices": [], "usage": USAGE})

    async def handler(asked: Asked) -> None:
        asked.begin_stream()
        for at in range(0, len(stream), 11):
            await asked.piece(stream[at : at + 11])
        asked.end_stream()

    async def main() -> Outcome:
        async with serving(handler) as server, upstream(server.url) as client:
            for _ in range(2):
                outcome = await client.call(CHAT, STREAMED)
            first, second = server.asked
            assert json.loads(first.body)["stream_options"] == {"include_usage": True}
            assert second.peer == first.peer
            return outcome

    outcome = run(main())
    assert outcome.error is None
    assert outcome.streamed
    assert outcome.body is not None
    assert json.loads(outcome.body)["choices"][0]["message"]["content"] == "Grüße 🎉"
    assert outcome.usage == Usage(3, 4, 0, 0, 7)
    assert outcome.request_id == "c2"
    assert classify(outcome, CHAT).kind is Kind.SUCCEEDED


def test_streamed_messages() -> None:
    stream = events(
        {"type": "message_start", "message": {"id": "m1", "content": [], "usage": {"input_tokens": 3}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
        {"type": "message_stop"},
        done=False,
    )

    async def handler(asked: Asked) -> None:
        asked.send(200, stream, kind="text/event-stream")

    outcome = run(ask(handler, STREAMED, MESSAGES))
    assert outcome.usage == Usage(3, 2, 0, 0, 5)
    assert classify(outcome, MESSAGES).kind is Kind.SUCCEEDED


def test_a_stream_that_stays_open_after_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.upstream, "_LINGER_S", 0.01)

    async def handler(asked: Asked) -> None:
        asked.begin_stream()
        await asked.piece(events(delta("hi", "stop")))
        await forever(asked)

    outcome = run(ask(handler, STREAMED))
    assert (outcome.error, outcome.detail) == (None, None)
    assert classify(outcome, CHAT).kind is Kind.SUCCEEDED


def test_a_complete_answer_survives_the_loss_of_its_connection() -> None:
    async def handler(asked: Asked) -> None:
        asked.begin_stream()
        await asked.piece(events(delta("hi", "stop"), done=False))
        await forever(asked)

    outcome = run(ask(handler, STREAMED, idle_timeout_s=0.05))
    assert outcome.error is None
    assert classify(outcome, CHAT).kind is Kind.SUCCEEDED


def test_a_plain_answer_to_a_streamed_request() -> None:
    outcome = run(ask(answer, STREAMED))
    assert (outcome.body, outcome.streamed) == (ANSWER, False)


def test_a_stream_to_a_plain_request() -> None:
    async def handler(asked: Asked) -> None:
        asked.send(200, events(delta("hi", "stop")), kind="text/event-stream")

    outcome = run(ask(handler))
    assert outcome.streamed
    assert classify(outcome, CHAT).kind is Kind.SUCCEEDED


def test_a_compressed_answer() -> None:
    async def handler(asked: Asked) -> None:
        asked.send(200, gzip.compress(ANSWER), "content-encoding: gzip")

    assert run(ask(handler)).body == ANSWER


def test_an_answer_that_is_compressed_wrongly() -> None:
    async def handler(asked: Asked) -> None:
        asked.send(200, ANSWER, "content-encoding: gzip")

    outcome = run(ask(handler))
    assert classify(outcome, CHAT).kind is Kind.RETRY
    assert classify(outcome, CHAT).maybe_billed


@pytest.mark.parametrize("body", [BODY, STREAMED])
def test_an_error_status(body: bytes) -> None:
    async def handler(asked: Asked) -> None:
        lines = ("Retry-After-Ms: 1500", "Retry-After: 9", "x-ratelimit-limit-requests: 100", "request-id: r2")
        asked.send(429, b'{"error":{"code":"429"}}', *lines)

    outcome = run(ask(handler, body))
    assert (outcome.status, outcome.error, outcome.body) == (429, None, b'{"error":{"code":"429"}}')
    assert outcome.retry_after_s == 1.5
    assert outcome.rate_limits == {"limit_requests": 100.0}
    assert outcome.request_id == "r2"
    assert not outcome.streamed
    assert classify(outcome, CHAT).kind is Kind.REFUSED


def test_an_error_body_is_kept_to_64_kb() -> None:
    async def handler(asked: Asked) -> None:
        asked.send(500, b"x" * 200_000, kind="text/html")

    outcome = run(ask(handler))
    assert (outcome.status, outcome.error, outcome.body) == (500, None, b"x" * 65_536)


def test_an_error_whose_body_is_cut_is_still_that_error() -> None:
    async def handler(asked: Asked) -> None:
        asked.send(402, b'{"error":', size=100)
        asked.writer.close()

    outcome = run(ask(handler))
    assert (outcome.status, outcome.error, outcome.body) == (402, None, b'{"error":')
    assert classify(outcome, CHAT).code == "payment_required"


def test_an_error_inside_a_stream() -> None:
    async def handler(asked: Asked) -> None:
        asked.begin_stream()
        await asked.piece(events(delta("half"), {"error": {"code": "429", "message": "m"}}, done=False))
        await forever(asked)

    outcome = run(ask(handler, STREAMED))
    assert outcome.body == b'{"error":{"code":"429","message":"m"}}'
    assert classify(outcome, CHAT).kind is Kind.REFUSED


def test_nonsense_inside_a_stream() -> None:
    async def handler(asked: Asked) -> None:
        asked.send(200, b"data: <html>\n\n", kind="text/event-stream")

    outcome = run(ask(handler, STREAMED))
    assert classify(outcome, CHAT).code == "invalid_response"
    assert classify(outcome, CHAT).maybe_billed


def test_redirects_are_not_followed() -> None:
    async def handler(asked: Asked) -> None:
        asked.send(307, b"", "location: /elsewhere")

    async def main() -> Outcome:
        async with serving(handler) as server, upstream(server.url) as client:
            outcome = await client.call(CHAT, BODY)
            assert len(server.asked) == 1
            return outcome

    assert classify(run(main()), CHAT).code == "http_307"


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_over_the_limit(monkeypatch: pytest.MonkeyPatch, streamed: bool) -> None:
    monkeypatch.setattr(worker.upstream, "MAX_ANSWER_BYTES", 1000)
    monkeypatch.setattr(ChatJoiner.__init__, "__defaults__", (1000,))

    async def handler(asked: Asked) -> None:
        if not streamed:
            return asked.send(200, b"x" * 500_000)
        asked.begin_stream()
        while True:
            await asked.piece(events(delta("x" * 500), done=False))

    outcome = run(ask(handler, STREAMED if streamed else BODY))
    assert (outcome.error, outcome.body) == ("too_large", None)
    assert classify(outcome, CHAT).kind is Kind.FAILED


# What goes wrong.


def test_a_refused_connection_was_never_sent() -> None:
    async def main() -> Outcome:
        async with serving(answer) as server:
            url = server.url
        async with upstream(url) as client:
            return await client.call(CHAT, BODY)

    outcome = run(main())
    assert (outcome.status, outcome.error, outcome.sent) == (None, "connect_error", False)
    assert outcome.detail is not None
    assert "Connect call failed" in outcome.detail


@pytest.mark.parametrize(
    ("given", "error"),
    [({"connect_timeout_s": 0.05}, "connect_timeout"), ({"call_timeout_s": 0.05}, "timeout")],
)
def test_a_connection_that_takes_too_long_was_never_sent(given: dict[str, Any], error: str) -> None:
    async def main() -> Outcome:
        silent = await asyncio.start_server(hold, "127.0.0.1", 0)
        async with silent, upstream(f"https://127.0.0.1:{silent.sockets[0].getsockname()[1]}", **given) as client:
            return await client.call(CHAT, BODY)

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError, ConnectionError):
            await reader.read()  # a TLS hello that gets no answer, then the end
        writer.close()

    outcome = run(main())
    assert (outcome.status, outcome.error, outcome.sent) == (None, error, False)
    assert not classify(outcome, CHAT).maybe_billed


@pytest.mark.parametrize(
    ("given", "error"), [({"call_timeout_s": 0.05}, "timeout"), ({"idle_timeout_s": 0.05}, "idle_timeout")]
)
def test_no_answer_in_time(given: dict[str, Any], error: str) -> None:
    outcome = run(ask(forever, **given))
    assert (outcome.status, outcome.error, outcome.sent, outcome.body) == (None, error, True, None)
    assert classify(outcome, CHAT).maybe_billed


@pytest.mark.parametrize(
    ("given", "error"), [({"call_timeout_s": 0.1}, "timeout"), ({"idle_timeout_s": 0.05}, "idle_timeout")]
)
def test_a_stream_that_stalls(given: dict[str, Any], error: str) -> None:
    async def handler(asked: Asked) -> None:
        asked.begin_stream()
        await asked.piece(events({**delta("half"), "usage": USAGE}, done=False))
        await forever(asked)

    outcome = run(ask(handler, STREAMED, **given))
    assert (outcome.status, outcome.error) == (200, error)
    assert outcome.usage == Usage(3, 4, 0, 0, 7), "what is known of the bill is kept"
    assert outcome.body is not None
    assert classify(outcome, CHAT).kind is Kind.RETRY


def test_a_body_that_stalls() -> None:
    async def handler(asked: Asked) -> None:
        asked.send(200, ANSWER[:20], size=len(ANSWER))
        await forever(asked)

    outcome = run(ask(handler, idle_timeout_s=0.05))
    assert (outcome.status, outcome.error) == (200, "idle_timeout")


async def close(asked: Asked) -> None:
    asked.writer.close()


async def reset(asked: Asked) -> None:
    asked.reset()


async def nonsense(asked: Asked) -> None:
    asked.writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
    asked.writer.close()


async def cut_body(asked: Asked) -> None:
    asked.send(200, ANSWER[:20], size=len(ANSWER))
    asked.writer.close()


@pytest.mark.parametrize("handler", [close, reset, nonsense, cut_body])
def test_a_lost_connection_may_be_billed(handler: Handler) -> None:
    outcome = run(ask(handler))
    assert (outcome.error, outcome.sent) == ("connection_lost", True)
    assert outcome.detail is not None
    assert "prompt" not in outcome.detail
    verdict = classify(outcome, CHAT)
    assert (verdict.kind, verdict.maybe_billed) == (Kind.RETRY, True)


@pytest.mark.parametrize("how", ["clean", "close", "reset"])
def test_a_cut_stream(how: str) -> None:
    async def handler(asked: Asked) -> None:
        asked.begin_stream()
        await asked.piece(events(delta("half"), done=False))
        if how == "clean":
            asked.end_stream()
        elif how == "close":
            asked.writer.close()
        else:
            asked.reset()

    outcome = run(ask(handler, STREAMED))
    assert outcome.error in ("stream_cut", "connection_lost")
    assert classify(outcome, CHAT).kind is Kind.RETRY
    assert classify(outcome, CHAT).maybe_billed


def test_a_kept_connection_that_turns_out_dead_is_not_tried_twice() -> None:
    async def main() -> Outcome:
        async with serving(answer, close) as server, upstream(server.url) as client:
            assert (await client.call(CHAT, BODY)).error is None
            outcome = await client.call(CHAT, BODY)
            assert len(server.asked) == 2
            return outcome

    assert run(main()).error == "connection_lost"


def test_an_early_refusal_of_a_large_request() -> None:
    large = b'{"messages":"' + b"x" * 8_000_000 + b'"}'

    async def handler(asked: Asked) -> None:
        asked.send(413, b"{}")
        await forever(asked)

    assert run(ask(handler, large)).status == 413


def test_a_large_request_that_nobody_reads() -> None:
    large = b'{"messages":"' + b"x" * 8_000_000 + b'"}'
    assert run(ask(forever, large, call_timeout_s=0.1)).error == "timeout"


def test_cancelling_a_call_closes_its_connection() -> None:
    async def main() -> None:
        closed = asyncio.Event()
        came = asyncio.Event()

        async def handler(asked: Asked) -> None:
            came.set()
            await asked.reader.read()
            closed.set()

        async with serving(handler) as server, upstream(server.url) as client:
            call = asyncio.create_task(client.call(CHAT, BODY))
            await came.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await closed.wait()

    asyncio.run(main())


# Through another transport.


@pytest.mark.parametrize(
    ("error", "name", "sent"),
    [
        (httpx.ConnectError("x"), "connect_error", False),
        (httpx.ConnectTimeout("x"), "connect_timeout", False),
        (httpx.ReadTimeout("x"), "idle_timeout", True),
        (httpx.ReadError("x"), "connection_lost", True),
        (RuntimeError("x"), "connection_lost", True),
    ],
)
def test_errors_of_a_transport(error: Exception, name: str, sent: bool) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise error

    client = Upstream(settings("http://127.0.0.1:1"), transport=httpx.MockTransport(handler))
    outcome = run(client.call(CHAT, BODY))
    assert (outcome.error, outcome.sent) == (name, sent)


def test_a_transport_of_ones_own() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == f"Bearer {KEY}"
        return httpx.Response(200, content=request.content, headers={"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT"})

    async def main() -> Outcome:
        client = Upstream(settings("https://host"), transport=httpx.MockTransport(handler), clock=lambda: 1_700_000_000)
        outcome = await client.call(CHAT, BODY)
        await client.aclose()
        return outcome

    outcome = run(main())
    assert (outcome.body, outcome.started_at, outcome.retry_after_s) == (BODY, 1_700_000_000, 30.0)


def test_the_key_is_not_shown() -> None:
    client = Upstream(settings("https://host"), transport=httpx.MockTransport(lambda _: httpx.Response(200)))
    assert KEY not in repr(client) + repr(vars(client))


def test_a_key_that_the_upstream_quotes_is_hidden() -> None:
    async def quote(asked: Asked) -> None:
        text = b'{"error":{"message":"bad key %s"}}' % KEY.encode()
        head = b"HTTP/1.1 400 Bad\r\nContent-Type: application/json\r\nx-request-id: r-%s\r\nContent-Length: %d\r\n\r\n"
        asked.writer.write(head % (KEY.encode(), len(text)) + text)

    outcome = run(ask(quote))
    assert outcome.body == b'{"error":{"message":"bad key [the API key]"}}'
    assert outcome.request_id == "r-[the API key]"


def test_proxies_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert find_proxy("https://host") is None
    monkeypatch.setenv("HTTPS_PROXY", "me:p%40ss@gate:3128/")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    proxy = find_proxy("https://host")
    assert proxy is not None
    assert (str(proxy.url), proxy.auth) == ("http://gate:3128", None)
    assert proxy.headers["proxy-authorization"] == "Basic bWU6cEBzcw=="
    assert find_proxy("http://host") is None
    assert find_proxy("https://inside.example") is None
    assert find_proxy("https://127.0.0.1") is None


def test_a_call_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> Outcome:
        async with serving(answer) as proxy:
            monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//me:pass@"))
            async with upstream("http://upstream.invalid", allow_insecure_http=True) as client:
                for _ in range(2):
                    outcome = await client.call(CHAT, BODY)
            for asked in proxy.asked:
                assert asked.target == "http://upstream.invalid/v1/chat/completions"
                assert asked.headers["proxy-authorization"] == "Basic bWU6cGFzcw=="
            return outcome

    assert run(main()).body == ANSWER
