"""Calls to addresses that users name: what is refused, when it is submitted and on the very address that is connected to."""

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
from api.addresses import MAX_URL, check_url, is_public
from api.deliverer import PER_TENANT
from api.outbound import MAX_ANSWER, Answer, Outbound, retry_after_s
from jobs.errors import UsageError
from jobs.settings import Settings
from tests import network

CLOSED = Settings()
HTTP = Settings(webhook_allow_http=True)
OPEN = Settings(webhook_allow_http=True, webhook_allow_private=True)
BODY = b'{"id":"evt_1"}'
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

PRIVATE = [
    "0.0.0.0",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",  # Alibaba's metadata
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",  # Azure's
    "169.254.169.254",  # nearly everybody's
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",  # Oracle's
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0:8.8.8.8",
    "64:ff9b::10.0.0.1",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::8.8.8.8",
    "100::1",
    "2001::1",  # Teredo
    "2001:0:7f00:1::",
    "2001:2::1",
    "2001:10::1",
    "2001:20::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:808:808::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "",
    "localhost",
    "2130706433",
    "0x7f.1",
    "127.1",
]
PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "168.63.129.15",
    "172.15.255.255",
    "172.32.0.0",
    "192.0.1.1",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
    "2001:4860:4860::8888",
    "2606:4700::1111",
    "2a00::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_what_is_not_everybodys_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is_everybodys_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example/a/b?key=1&other=%20",
        "https://hooks.example",
        "https://HOOKS.example:8443/a",
        "https://8.8.8.8/a",
        "https://[2606:4700::1111]:444/a",
        "https://xn--bcher-kva.example/",
        "https://hooks.example./",
        "https://a_b-c.example/",
        f"https://{'a' * 63}.example/",
        f"https://{'a.' * 126}a/",
        "https://hooks.example/" + "a" * (MAX_URL - 22),
    ],
)
def test_an_ordinary_address_is_fine(url: str) -> None:
    assert check_url(url, CLOSED).host


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://hooks.example/", "must begin with https://$"),
        ("HTTP://hooks.example/", "must begin with https://"),
        ("ftp://hooks.example/", "must begin with https://"),
        ("file:///etc/passwd", "must begin with https://"),
        ("unix:///run/x.sock", "must begin with https://"),
        ("hooks.example/a", "must begin with https://"),
        ("//hooks.example/a", "must begin with https://"),
        ("", "must begin with https://"),
        ("https://", "can't be read|names no host"),
        ("https:///a", "can't be read|names no host"),
        ("https:hooks.example", "names no host"),
        ("https://:443/a", "can't be read|names no host"),
        ("https://hooks.example:0/", "port"),
        ("https://hooks.example:65536/", "can't be read"),
        ("https://hooks.example:x/", "can't be read"),
        ("https://[::1/", "can't be read"),
        ("https://user@hooks.example/", "no user"),
        ("https://user:word@hooks.example/", "no user"),
        ("https://:word@hooks.example/", "no user"),
        ("https://hooks.example/#part", "no fragment"),
        ("https://hooks.example/#", "no fragment"),
        ("https://hooks.example/a b", "percent-encoded"),
        ("https://hooks.example\\@127.0.0.1/", "percent-encoded"),
        ("https://hooks.example/\r\nX: y", "percent-encoded"),
        ("https://hooks.example/\0", "percent-encoded"),
        ("https://bücher.example/", "percent-encoded"),
        ("https://127。0。0。1/", "percent-encoded"),
        ("https://hooks.example/" + "a" * MAX_URL, "2048"),
        ("https://2130706433/", "as a number"),
        ("https://0x7f000001/", "as a number"),
        ("https://0x7f.1/", "as a number"),
        ("https://0177.0.0.1/", "as a number"),
        ("https://127.1/", "as a number"),
        ("https://127.0.0.1./", "as a number"),
        *(
            (f"https://{host}/", "a host that can't be")
            for host in (
                "a..b",
                ".",
                ".a",
                "a..",
                "%",
                "a%20b",
                "hooks%2eexample",
                "a,b",
                "a" * 64,
                f"hooks.{'a' * 64}.example",
                "a." * 127 + "a",
            )
        ),
        ("https://xn--a/", "can't be read"),
        ("https://[fe80::1%25eth0]/", "as a number|can't be read"),
        *((f"https://{host}/", "not public") for host in PRIVATE if host.count(".") == 3 and ":" not in host),
        *((f"https://[{host}]/", "not public") for host in PRIVATE if ":" in host and "%" not in host),
    ],
)
def test_an_address_that_will_never_be_called_is_refused_at_once(url: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        check_url(url, CLOSED)


def test_settings_allow_what_they_name_and_nothing_else() -> None:
    assert check_url("http://hooks.example/", HTTP)
    assert check_url("http://127.0.0.1:8080/", OPEN)
    with pytest.raises(UsageError, match="not public"):
        check_url("http://127.0.0.1/", HTTP)
    with pytest.raises(UsageError, match="https:// or http://"):
        check_url("ftp://hooks.example/", OPEN)
    for url in ("https://2130706433/", "https://user@hooks.example/", "https://hooks.example/#"):
        with pytest.raises(UsageError):
            check_url(url, OPEN)


@pytest.mark.parametrize("url", ["https://user:word@hooks.example/?secret", "http://hooks.example/?secret"])
def test_a_refusal_does_not_repeat_the_address(url: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_url(url, CLOSED)
    assert "secret" not in str(refused.value)
    assert "word@" not in str(refused.value)


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
