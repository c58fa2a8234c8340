"""The wire of the upstream client, on both event loops: TLS, proxies, what servers make of HTTP, what is kept open."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
import uvloop

import worker.dialing
import worker.transport
from tests.tls import authority
from tests.unit.test_upstream import ANSWER, BODY, CHAT, KEY, Asked, Handler, Server, answer, close, forever, settings
from worker.connection import MAX_HEAD_BYTES, Connection
from worker.transport import Transport
from worker.upstream import Upstream

LARGE = b'{"messages":"' + b"x" * 8_000_000 + b'"}'
NO_LENGTH = b"HTTP/1.1 200 OK\r\n\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x;a=b\r\n%s\r\n0\r\n" % (len(ANSWER), ANSWER)


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Any:
    """Runs a test on asyncio's loop and on uvloop, with and without `tls` if it takes that; nothing may be left."""

    @functools.wraps(test)
    def run(loop: Callable[[], asyncio.AbstractEventLoop], **given: Any) -> None:
        complaints: list[dict[str, Any]] = []
        gc.freeze()  # what was there before: only what the test leaves is looked through
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.get_loop().set_exception_handler(lambda _, told: complaints.append(told))
            runner.run(asyncio.wait_for(test(**given), 20))
            gc.collect()
            left = [each for each in gc.get_objects() if isinstance(each, Connection)]
        # What a server of a test says of a client that went away is no complaint.
        assert ([told for told in complaints if "incoming" not in told["message"]], left) == ([], [])

    names = [*inspect.signature(test).parameters, "loop"]
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    loops = [asyncio.new_event_loop, uvloop.new_event_loop]
    marked = pytest.mark.parametrize("loop", loops, ids=["asyncio", "uvloop"])(run)
    return pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])(marked) if "tls" in names else marked


@pytest.fixture(autouse=True)
def _trust(monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.create_default_context(cafile=authority()[0])
    monkeypatch.setattr(worker.dialing, "_tls", lambda: context)


def serving_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority()[1])
    return context


@asynccontextmanager
async def listening(serve: Callable[..., Coroutine[Any, Any, None]], tls: bool = False) -> AsyncIterator[str]:
    """The address of a server, all of whose connections end with it."""
    tasks: list[asyncio.Task[None]] = []

    async def take(*streams: Any) -> None:
        tasks.append(asyncio.create_task(serve(*streams)))
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await tasks[-1]
        streams[1].close()

    server = await asyncio.start_server(take, "127.0.0.1", 0, ssl=serving_tls() if tls else None)
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def calling(base_url: str, **given: Any) -> AsyncIterator[Upstream]:
    """A client that holds no connection once it is closed."""
    client = Upstream(settings(base_url, allow_insecure_http=True, **given))
    try:
        yield client
    finally:
        await client.aclose()
        await rounds()
    assert connections(client) == set()


@asynccontextmanager
async def serving(*handlers: Handler, tls: bool = False, **given: Any) -> AsyncIterator[tuple[Server, Upstream]]:
    server = Server(*handlers)
    async with listening(server.serve, tls) as server.url, calling(server.url, **given) as client:
        yield server, client


def connections(client: Upstream) -> set[Connection]:
    assert isinstance(client._transport, Transport)
    return client._transport._connections


async def respond(client: Upstream) -> httpx.Response:
    """The response to a call, whose body nobody takes yet."""
    extensions = {"timeout": {"pool": 9.0, "read": 9.0}}
    request = httpx.Request("POST", "http://host/", headers={"X": "y"}, content=BODY, extensions=extensions)
    return await client._transport.handle_async_request(request)


async def rounds(number: int = 20) -> None:
    """Rounds of the loop, in which what was begun ends."""
    for _ in range(number):
        await asyncio.sleep(0)


def says(*pieces: bytes, then: Handler | None = None) -> Handler:
    async def handler(asked: Asked) -> None:
        for piece in pieces:
            asked.writer.write(piece)
            await rounds(2)
        if then is not None:
            await then(asked)

    return handler


def until_closed(closed: asyncio.Event) -> Handler:
    async def handler(asked: Asked) -> None:
        with suppress(OSError):
            await asked.reader.read()
        await rounds()
        closed.set()

    return handler


@asynccontextmanager
async def ending_tls(*said: bytes) -> AsyncIterator[tuple[str, Callable[[], Awaitable[None]]]]:
    """The address of a server that says something, and the rest of it when it is to go on. Then it ends its connection
    without the end of TLS: a server of a loop would wait for the client's.
    """

    def serve() -> None:
        with serving_tls().wrap_socket(listener.accept()[0], server_side=True) as connection:
            connection.recv(65_536)
            for each in said:
                connection.sendall(each)
                going_on.wait(9)

    async def go_on() -> None:
        going_on.set()
        await server
        await rounds()

    going_on = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = asyncio.create_task(asyncio.to_thread(serve))
        yield f"https://127.0.0.1:{listener.getsockname()[1]}", go_on


@asynccontextmanager
async def proxying(patch: pytest.MonkeyPatch, *said: bytes, tls: bool = False) -> AsyncIterator[list[bytes]]:
    """What a proxy hears. It joins who asks for a way to that port of loopback, or says something else and closes."""
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.writelines(said or [NO_LENGTH])
        if not said:
            there, to_there = await asyncio.open_connection("127.0.0.1", int(heard[-1].split()[1].split(b":")[1]))
            await asyncio.gather(pass_on(reader, to_there), pass_on(there, writer))
        elif b"100" in said[0] or b"407" in said[0]:
            heard.append(await reader.read(65_536))

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.CancelledError):
            while read := await reader.read(65_536):
                writer.write(read)
        writer.close()

    patch.setattr(worker.dialing, "is_loopback", lambda host: False)
    async with listening(serve, tls) as url:
        patch.setenv("https_proxy", url.replace("//", "//me:pass@"))
        yield heard


class Resolver:
    """Stands for the loop's own: answers once it is let, with loopback if it knows the name."""

    def __init__(self, patch: pytest.MonkeyPatch, knows: bool) -> None:
        self.asked, self.knows = 0, knows
        self.free = asyncio.Event()
        patch.setattr(type(asyncio.get_running_loop()), "getaddrinfo", self._look_up)

    async def _look_up(self, host: str, port: int, **options: Any) -> list[Any]:
        if host != "127.0.0.1":  # as uvloop asks for each connection
            self.asked += 1
            await self.free.wait()
            if not self.knows:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))]


# How a connection is made.


@on_both_loops
async def test_a_certificate_that_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.dialing, "_tls", ssl.create_default_context)
    async with serving(answer, tls=True) as (server, client):
        outcome = await client.call(CHAT, BODY)
        assert (outcome.error, outcome.sent, server.asked) == ("connect_error", False, [])
        assert "CERTIFICATE_VERIFY_FAILED" in str(outcome.detail)
        assert KEY not in str(outcome.detail)


@on_both_loops
async def test_a_tunnel_through_a_proxy(monkeypatch: pytest.MonkeyPatch, tls: bool) -> None:
    async with proxying(monkeypatch, tls=tls) as heard, serving(answer, tls=True) as (server, client):
        for _ in range(2):
            assert (await client.call(CHAT, BODY)).body == ANSWER
        there = server.url.removeprefix("https://")
        for asked in server.asked:
            assert (asked.target, asked.headers["host"]) == (CHAT, there)
            assert "proxy-authorization" not in asked.headers
        lines = (f"CONNECT {there} HTTP/1.1", f"Host: {there}", "Proxy-Authorization: Basic bWU6cGFzcw==", "", "")
        assert heard == ["\r\n".join(lines).encode()], "one way for both"


@on_both_loops
async def test_a_proxy_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "socks5://me:pass@gate:1080")
    async with calling("https://host") as client:
        outcome = await client.call(CHAT, BODY)
        assert (outcome.error, outcome.sent) == ("connect_error", False)
        assert outcome.detail == "ProxyError: a proxy must be http:// or https://, not socks5://"


@on_both_loops
async def test_a_name_is_looked_up_for_all_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(monkeypatch, knows=False)
    async with listening(Server(answer).serve) as url, calling(url.replace("127.0.0.1", "host")) as client:
        first = asyncio.create_task(client.call(CHAT, BODY))
        await rounds()
        first.cancel()
        await rounds()
        resolver.free.set()  # nobody waits for it any more
        await rounds()
        outcome = await client.call(CHAT, BODY)
        assert (outcome.error, outcome.sent) == ("connect_error", False)
        assert "Name or service not known" in str(outcome.detail)
        resolver.free, resolver.knows = asyncio.Event(), True
        first, *others = [asyncio.create_task(client.call(CHAT, BODY)) for _ in range(3)]
        await rounds()
        first.cancel()
        await asyncio.wait([first])
        resolver.free.set()
        assert [(await other).error for other in others] == [None, None]
        assert (first.cancelled(), resolver.asked) == (True, 3)


def test_the_host_that_is_named() -> None:
    for url, host in (("https://[::1]:8443", b"[::1]:8443"), ("https://[::1]", b"[::1]"), ("http://a.b:80", b"a.b")):
        assert Transport(url)._dialer.head("POST", b"/x") == b"POST /x HTTP/1.1\r\nHost: %s\r\n" % host
    with pytest.raises(httpx.InvalidURL):
        Transport("http://a.b\r\nX-Y: z")


# What servers make of HTTP.

RESPONSES = {
    CHUNKED + b"\r\n": True,
    CHUNKED + b"x-request-id: trailer\r\nX-Other: trailer\r\n\r\n": True,
    b"HTTP/1.1 103 Early Hints\r\nx-request-id: early\r\n\r\n" + WHOLE: True,
    b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + WHOLE: True,
    WHOLE.replace(b"OK", b"OK\r\nConnection: upgrade\r\nUpgrade: h2,h2c"): True,
    WHOLE.replace(b"\r", b""): True,
    WHOLE.replace(b"OK", b"OK\r\nConnection: close"): False,
    WHOLE.replace(b"/1.1", b"/1.0"): False,
    WHOLE.replace(b"/1.1 200 OK", b"/1.0 200 OK\r\nConnection: keep-alive"): True,
    WHOLE + WHOLE: False,
    WHOLE + b"H": False,
    NO_LENGTH + ANSWER: False,
    b"HTTP/1.1 204 No Content\r\n\r\n": True,
}


@pytest.mark.parametrize(("said", "kept"), RESPONSES.items())
@on_both_loops
async def test_a_response_and_whether_its_connection_is_kept(said: bytes, kept: bool, tls: bool) -> None:
    async with serving(says(said, then=close if NO_LENGTH in said else None), answer, tls=tls) as (server, client):
        first, second = await client.call(CHAT, BODY), await client.call(CHAT, BODY)
        assert (first.error, first.status, first.body) in ((None, 200, ANSWER), (None, 204, b""))
        assert first.request_id in ("c1", None), "neither of a trailer nor of an early hint"
        assert (second.error, second.body, second.request_id) == (None, ANSWER, "r1")
        assert (server.asked[0].peer == server.asked[1].peer) is kept


ENDLESS = (b"200 OK\r\nX: " + b"x" * MAX_HEAD_BYTES, b"200 OK\r\n" + b"X: y\r\n" * MAX_HEAD_BYTES)


@pytest.mark.parametrize("more", [WHOLE[9:], CHUNKED[9:] + b"x: y\r\n\r\n", *ENDLESS], ids=range(4))
@on_both_loops
async def test_a_response_that_comes_byte_by_byte_and_a_header_that_does_not_end(more: bytes) -> None:
    bytewise = (more[at : at + 1] for at in range(min(len(more), 1000)))
    async with serving(says(b"HTTP/1.1 ", *bytewise, more[1000:] * 2)) as (_, client):
        outcome = await client.call(CHAT, BODY)
        assert (outcome.body, outcome.detail) in ((ANSWER, None), (None, "RemoteProtocolError"))


@on_both_loops
async def test_a_large_body_and_a_reader_that_does_not_take_it() -> None:
    large = b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n" + b"x" * 5_000_000
    async with serving(says(large)) as (_, client):
        response = await respond(client)
        (connection,) = connections(client)
        await rounds(500)
        assert sum(map(len, connection._pieces)) < 2_000_000
        assert len(await response.aread()) == 5_000_000
        assert connections(client) == {connection}


# What is kept open.


@on_both_loops
async def test_calls_at_once_use_the_same_connections_again(tls: bool) -> None:
    here = asyncio.Barrier(50)

    async def handler(asked: Asked) -> None:
        await here.wait()
        await answer(asked)

    async with serving(handler, tls=tls) as (server, client):
        for body in (BODY, LARGE[-300_000:]):
            outcomes = await asyncio.gather(*(client.call(CHAT, body) for _ in range(50)))
            assert [(outcome.error, outcome.body) for outcome in outcomes] == [(None, ANSWER)] * 50
            assert [asked.body for asked in server.asked[-50:]] == [body] * 50
        assert len({asked.peer for asked in server.asked}) == 50


@pytest.mark.parametrize("word", [None, b"", b"HTTP/1.1 408 Too late\r\nContent-Length: 0\r\n\r\n", b"\r\n"])
@on_both_loops
async def test_an_idle_connection_that_ages_or_that_the_server_closes_or_talks_on(
    monkeypatch: pytest.MonkeyPatch, word: bytes | None, tls: bool
) -> None:
    monkeypatch.setattr(worker.transport, "KEEPALIVE_S", 0.01 if word is None else 9.0)
    idle, closed = asyncio.Event(), asyncio.Event()

    async def handler(asked: Asked) -> None:
        await answer(asked)
        await idle.wait()
        await says(word or b"", then=close if word == b"" else None)(asked)
        await until_closed(closed)(asked)

    async with serving(handler, answer, tls=tls) as (_, client):
        assert (await client.call(CHAT, BODY)).error is None
        idle.set()
        await closed.wait()
        assert connections(client) == set()
        assert (await client.call(CHAT, BODY)).error is None


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 2", WHOLE[:-9]])
@on_both_loops
async def test_closing_the_client_ends_its_calls(said: bytes, tls: bool) -> None:
    closed = asyncio.Event()
    async with serving(says(said, then=until_closed(closed)), tls=tls) as (server, client):
        call = asyncio.create_task(client.call(CHAT, BODY))
        while not server.asked:
            await rounds()
        await client.aclose()
        assert ((await call).error, (await call).sent) == ("connection_lost", True)
        await closed.wait()


@on_both_loops
async def test_what_came_before_the_end_while_nobody_took_it() -> None:
    async with ending_tls(NO_LENGTH + b"begin", b"end") as (url, go_on), calling(url) as client:
        response = await respond(client)
        await go_on()
        assert await response.aread() == b"beginend"


@on_both_loops
async def test_a_body_without_length_is_not_whole_when_the_client_ends_it(tls: bool) -> None:
    handler = says(NO_LENGTH + ANSWER, then=forever)
    async with serving(handler, tls=tls, idle_timeout_s=0.05) as (_, client):
        assert (await client.call(CHAT, BODY)).error == "idle_timeout"
        response = await respond(client)
        await client.aclose()
        with pytest.raises(httpx.ReadError):
            await response.aread()
        await response.aclose()


@on_both_loops
async def test_a_connection_on_which_a_request_is_left_is_not_kept(tls: bool) -> None:
    refuse = says(b"HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n", then=forever)
    async with serving(refuse, answer, tls=tls, idle_timeout_s=0.5) as (_, client):
        assert (await client.call(CHAT, LARGE)).status == 413
        assert (await client.call(CHAT, BODY)).error is None


@on_both_loops
async def test_a_response_that_ends_before_its_request_was_read() -> None:
    async def end(asked: Asked) -> None:
        asked.writer.write_eof()
        await forever(asked)

    async with serving(says(NO_LENGTH + ANSWER, then=end), idle_timeout_s=1) as (_, client):
        outcome = await client.call(CHAT, LARGE)
        assert (outcome.body, outcome.latency_s < 1) == (ANSWER, True)


@on_both_loops
async def test_a_connection_is_not_used_in_the_round_in_which_it_is_closed(tls: bool) -> None:
    async with serving(answer, tls=tls) as (_, client):
        assert (await client.call(CHAT, BODY)).error is None
        next(iter(connections(client))).data_received(b"x")  # as the loop does, with the next call about to begin
        assert (await client.call(CHAT, BODY)).error is None


@on_both_loops
async def test_a_call_that_is_cancelled_as_its_connection_is_made(monkeypatch: pytest.MonkeyPatch, tls: bool) -> None:
    made = Connection.connection_made
    calls: list[asyncio.Task[Any]] = []

    def cancelling(connection: Connection, transport: asyncio.BaseTransport) -> None:
        monkeypatch.setattr(Connection, "connection_made", made)
        made(connection, transport)
        calls.pop().cancel()

    async with serving(answer, tls=tls) as (_, client):
        monkeypatch.setattr(Connection, "connection_made", cancelling)
        call = asyncio.create_task(client.call(CHAT, BODY))
        calls.append(call)
        await asyncio.wait([call])
        assert call.cancelled()
        assert (await client.call(CHAT, BODY)).error is None


# What went wrong once.


PROXIES = {
    b"HTTP/1.1 407 No\r\nContent-Length: 2\r\n\r\nno": "the proxy refused the way to the upstream with status 407",
    b"HTTP/1.1 407 No\r\nConnection: close\r\n\r\nno": "the proxy refused the way to the upstream with status 407",
    b"HTTP/1.1 100 Continue\r\n\r\n": "Timeout",
    b"": "ReadError: the connection was lost",
    b"SSH-2.0\r\n\r\n": "RemoteProtocolError: no HTTP response",
    NO_LENGTH: "Error",
    NO_LENGTH + b"SSH": "Error",
    WHOLE: "Error",
}


@pytest.mark.parametrize("said", PROXIES)
@on_both_loops
async def test_a_proxy_that_gives_no_way(monkeypatch: pytest.MonkeyPatch, said: bytes, tls: bool) -> None:
    given = {"connect_timeout_s": 0.05 if PROXIES[said] == "Timeout" else 9.0}
    async with proxying(monkeypatch, said, tls=tls) as heard, calling("https://host", **given) as client:
        for _ in range(2):
            outcome = await client.call(CHAT, BODY)
            assert (outcome.error, outcome.sent) in (("connect_error", False), ("connect_timeout", False))
            assert PROXIES[said] in str(outcome.detail)
        await rounds()
        assert [head[:26] for head in heard if head] == [b"CONNECT host:443 HTTP/1.1\r"] * 2


@on_both_loops
async def test_closing_the_client_while_it_looks_up_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(monkeypatch, knows=True)
    async with listening(Server(answer).serve) as url, calling(url.replace("127.0.0.1", "host")) as client:
        call = asyncio.create_task(client.call(CHAT, BODY))
        await rounds()
        await client.aclose()
        resolver.free.set()
        await asyncio.wait([call])
        assert not call.cancelled()
        assert ((await call).error, (await call).sent) == ("connect_error", False)


@on_both_loops
async def test_a_proxy_that_ends_during_the_handshake_with_the_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop):
        return  # its TLS in TLS trips over itself here, up to Python 3.11
    async with ending_tls(NO_LENGTH) as (url, go_on):
        monkeypatch.setenv("https_proxy", url)
        async with calling("https://host", idle_timeout_s=0.5) as client:
            outcome, _ = await asyncio.gather(client.call(CHAT, BODY), go_on())
            assert (outcome.error, outcome.sent) == ("connect_error", False)


@on_both_loops
async def test_a_large_answer_that_ends_with_its_connection() -> None:
    async with ending_tls(NO_LENGTH, LARGE) as (url, go_on), calling(url) as client:
        outcome, _ = await asyncio.gather(client.call(CHAT, BODY), go_on())
        assert (outcome.error, outcome.body == LARGE) == (None, True)
