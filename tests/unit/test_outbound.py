"""Calls to addresses that users name: what is refused on the very address that is connected to, and what is cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

import api.outbound
from api.deliverer import PER_TENANT
from api.outbound import MAX_ANSWER, Answer, Outbound, retry_after_s
from jobs.settings import Settings
from tests import network

CLOSED = Settings()
HTTP = Settings(webhook_allow_http=True)
OPEN = Settings(webhook_allow_http=True, webhook_allow_private=True)
BODY = b'{"id":"evt_1"}'
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Names(AbstractResolver):
    """A name server that answers each time with the next of its answers, then with the last."""

    def __init__(self, *answers: list[str]) -> None:
        self._answers = list(answers)
        self.asked = 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        self.asked += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in answer
        ]

    async def close(self) -> None: ...


class Server:
    """Raw sockets on loopback: keeps what it is sent, and lets `answer` write what it likes."""

    def __init__(self, answer: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> None:
        self._answer = answer
        self.heads: list[bytes] = []
        self.written = 0
        self.connections = 0
        self.port = 0

    def url(self, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/hook?key=private-part"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            self.heads.append(await reader.readuntil(b"\r\n\r\n"))
            await self._answer(writer)
        writer.close()


@asynccontextmanager
async def serving(answer: bytes | Callable[[asyncio.StreamWriter], Awaitable[None]] = OK) -> AsyncIterator[Server]:
    async def write(writer: asyncio.StreamWriter) -> None:
        assert isinstance(answer, bytes)
        writer.write(answer)
        await writer.drain()

    server = Server(write if isinstance(answer, bytes) else answer)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        await server.serve(reader, writer)

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def drive(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


async def post(url: str, settings: Settings = OPEN, **options: Any) -> Answer:
    async with Outbound(settings, **options) as outbound:
        return await outbound.post(url, BODY, {"webhook-id": "evt_1"})


async def expect(url: str, error: str) -> None:
    assert await post(url) == Answer(error=error)


def test_a_call_brings_its_status_and_sends_what_it_should() -> None:
    async def main() -> None:
        async with serving(b"HTTP/1.1 201 Made\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n") as server:
            async with Outbound(OPEN) as outbound:
                for _ in range(2):
                    assert await outbound.post(server.url(), BODY, {"webhook-id": "evt_1"}) == Answer(201)
            assert server.connections == 2, "connections are not shared"
            head = server.heads[1].decode().lower()
            assert head.startswith("post /hook?key=private-part http/1.1\r\n")
            assert "\r\nwebhook-id: evt_1\r\n" in head
            assert "\r\nuser-agent: mimoq/" in head
            assert "\r\naccept-encoding: identity\r\n" in head
            assert "cookie" not in head

    drive(main())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("answer", [["127.0.0.1"], ["::ffff:127.0.0.1"], ["::1", "127.0.0.1"], ["169.254.169.254"]])
def test_a_name_that_leads_to_a_private_address_is_refused(
    answer: list[str], loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def main() -> None:
        async with serving() as server:
            assert await post(server.url("hooks.example"), HTTP, resolver=Names(answer)) == Answer(
                error="refused_address"
            )
            assert server.connections == 0

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


def test_the_same_name_is_called_where_private_addresses_are_allowed() -> None:
    async def main() -> None:
        async with serving() as server:
            assert await post(server.url("hooks.example"), OPEN, resolver=Names(["127.0.0.1"])) == Answer(200)

    drive(main())


def test_a_name_that_is_rebound_between_two_answers_is_refused() -> None:
    """The first answer is public, and the suite's wall stops that call as it connects; the second is this machine."""

    async def main() -> None:
        names = Names(["8.8.8.8"], ["127.0.0.1"])
        async with serving() as server, Outbound(HTTP, names) as outbound:
            first = await outbound.post(server.url("hooks.example"), BODY, {})
            assert set(network.refused) == {"'8.8.8.8'"}, "the public address was about to be connected to"
            network.refused.clear()
            assert first == Answer(error="connect_error")
            assert await outbound.post(server.url("hooks.example"), BODY, {}) == Answer(error="refused_address")
            assert names.asked == 2, "an answer is good for one call"
            assert server.connections == 0

    drive(main())


def test_of_several_addresses_only_public_ones_are_tried() -> None:
    async def main() -> None:
        async with serving() as server:
            await post(server.url("hooks.example"), HTTP, resolver=Names(["127.0.0.1", "8.8.8.8", "10.0.0.1"]))
            assert set(network.refused) == {"'8.8.8.8'"}
            network.refused.clear()
            assert server.connections == 0

    drive(main())


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f000001", "0177.0.0.1"])
def test_an_address_that_slipped_through_is_refused_as_it_is_connected_to(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.outbound, "check_url", lambda url, settings: URL(url))
    monkeypatch.setattr(network, "is_local", lambda host: True)  # the resolver may read these spellings

    async def main() -> None:
        async with serving() as server:
            answer = await post(server.url(host), HTTP)
            assert answer.status is None
            assert server.connections == 0

    drive(main())


def test_localhost_is_refused_by_the_systems_own_resolver() -> None:
    async def main() -> None:
        async with serving() as server:
            assert await post(server.url("localhost"), HTTP) == Answer(error="refused_address")
            assert await post(server.url("localhost"), OPEN) == Answer(200)
            assert server.connections == 1

    drive(main())


def test_an_address_that_settings_allowed_once_is_refused_now() -> None:
    async def main() -> None:
        async with serving() as server:
            assert await post(server.url(), CLOSED) == Answer(error="refused_address")
            assert server.connections == 0

    drive(main())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    async def main() -> None:
        async with serving() as inner:
            head = f"HTTP/1.1 {status} Moved\r\nLocation: {inner.url()}\r\nContent-Length: 0\r\n\r\n"
            async with serving(head.encode()) as server:
                assert await post(server.url()) == Answer(status, f"status_{status}")
            assert inner.connections == 0

    drive(main())


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with serving() as proxy, serving() as server:
            for name in ("http_proxy", "https_proxy", "all_proxy"):
                monkeypatch.setitem(os.environ, name, f"http://127.0.0.1:{proxy.port}")
            assert await post(server.url()) == Answer(200)
            assert (proxy.connections, server.connections) == (0, 1)

    drive(main())


async def say_nothing(writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


def test_a_receiver_that_says_nothing_is_cut() -> None:
    async def main() -> None:
        async with serving(say_nothing) as server:
            assert await post(server.url(), total_s=0.2) == Answer(error="timeout")

    drive(main())


def test_a_name_server_that_says_nothing_is_cut() -> None:
    class Silent(Names):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[ResolveResult]:
            await asyncio.Event().wait()
            raise AssertionError

    async def main() -> None:
        assert await post("http://hooks.example/", resolver=Silent([]), total_s=0.2) == Answer(error="timeout")

    drive(main())


def test_lookups_that_outlast_their_calls_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up, answered = api.outbound._look_up, threading.Event()

    def silent(host: str, *rest: Any) -> list[Any]:
        if host.startswith("silent"):
            answered.wait(60)
        return look_up("localhost", *rest)

    monkeypatch.setattr(api.outbound, "_look_up", silent)

    async def main() -> None:
        async with serving() as server, Outbound(OPEN, total_s=0.5) as outbound:
            for _ in range(3):
                calls = [outbound.post(f"http://silent{number}.example/", BODY, {}) for number in range(PER_TENANT)]
                assert set(await asyncio.gather(*calls)) == {Answer(error="timeout")}
            assert await outbound.post(server.url("hooks.example"), BODY, {}) == Answer(200)

    try:
        drive(main())
    finally:
        answered.set()


def test_a_body_that_drips_is_cut_and_its_status_counts() -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    async def main() -> None:
        async with serving(drip) as server:
            assert await post(server.url(), total_s=0.3) == Answer(200)

    drive(main())


def test_an_endless_body_is_cut() -> None:
    written = 0
    ended = asyncio.Event()

    async def pour(writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 500 No\r\nContent-Type: text/plain\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * MAX_ANSWER)
                await writer.drain()
                written += MAX_ANSWER
        finally:
            ended.set()

    async def main() -> None:
        async with serving(pour) as server:
            assert await post(server.url()) == Answer(500, "status_500")
            await asyncio.wait_for(ended.wait(), 5)
        assert written < 400 * MAX_ANSWER, "what the sockets hold, and no more"

    drive(main())


def test_a_body_that_would_unpack_to_much_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(*args: Any, **options: Any) -> None:
        raise AssertionError("it was unpacked")

    monkeypatch.setattr("zlib.decompressobj", unpack)

    async def main() -> None:
        packed = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd"
        async with serving(packed) as server:
            assert await post(server.url()) == Answer(200)

    drive(main())


def test_endless_headers_are_cut() -> None:
    async def pour(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X: " + b"y" * 4000 + b"\r\n")
            await writer.drain()

    async def main() -> None:
        async with serving(pour) as server:
            assert await post(server.url(), total_s=5.0) == Answer(error="invalid_response")

    drive(main())


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 9000 + b"\r\n\r\n", "invalid_response"),
        (b"hello\r\n\r\n", "invalid_response"),
        (b"", "connection_lost"),
        (b"HTTP/1.1 200", "connection_lost"),
        (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "status_404"),
        (b"HTTP/1.1 500 private words\r\nContent-Length: 9\r\n\r\nprivate", "status_500"),
    ],
)
def test_what_went_wrong_is_one_word(said: bytes, error: str) -> None:
    async def main() -> None:
        async with serving(said) as server:
            assert (await post(server.url())).error == error

    drive(main())


def test_nobody_there_and_nobody_known() -> None:
    class Unknown(Names):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[ResolveResult]:
            raise socket.gaierror(socket.EAI_NONAME, "not known")

    async def main() -> None:
        async with serving() as server:
            url = server.url()
        assert await post(url) == Answer(error="connect_error")
        assert await post("http://hooks.example/", resolver=Unknown([])) == Answer(error="unknown_host")

    drive(main())


@pytest.mark.parametrize("host", ["a..b", ".", "a" * 64])
def test_a_host_that_can_be_no_name_is_unknown_if_it_slipped_through(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.outbound, "check_url", lambda url, settings: URL(url))
    monkeypatch.setattr(network, "is_local", lambda host: True)
    drive(expect(f"http://{host}/", "unknown_host"))


def test_a_receiver_without_tls_is_not_called_over_https() -> None:
    def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        writer.close()

    async def main() -> None:
        plain = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = plain.sockets[0].getsockname()[1]
        assert await post(f"https://127.0.0.1:{port}/") == Answer(error="tls_error")
        plain.close()

    drive(main())


def test_an_answer_says_how_long_to_wait() -> None:
    async def main() -> None:
        async with serving(b"HTTP/1.1 429 No\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n") as server:
            assert await post(server.url()) == Answer(429, "status_429", 7.0)

    drive(main())


DATE = "Thu, 26 Nov 2026 01:00:00 GMT"


@pytest.mark.parametrize(
    ("value", "date", "seconds"),
    [
        (None, DATE, None),
        ("120", None, 120.0),
        (" 0 ", None, 0.0),
        ("Thu, 26 Nov 2026 01:02:00 GMT", DATE, 120.0),
        ("Thu, 26 Nov 2026 00:00:00 GMT", DATE, 0.0),
        ("Thu, 26 Nov 2026 01:02:00 GMT", None, None),
        ("Thu, 26 Nov 2026 01:02:00 -0000", DATE, None),
        ("-5", DATE, None),
        ("1.5", DATE, None),
        ("٣", DATE, None),
        ("9" * 400, DATE, None),
        ("soon", DATE, None),
        ("", DATE, None),
    ],
)
def test_a_retry_after_is_read_in_both_forms(value: str | None, date: str | None, seconds: float | None) -> None:
    assert retry_after_s(value, date) == seconds
