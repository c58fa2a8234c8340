"""How a connection to the upstream is made: resolver, TCP, TLS, and the way through a proxy."""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
import urllib.request
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx
from aiohappyeyeballs import AddrInfoType, start_connection

from jobs.settings import is_loopback
from worker.connection import Connection

#: Seconds for which the addresses of a host are taken as known: many connections are made at once.
RESOLVED_S = 10.0
#: Seconds until an address that does not answer gets company by the next (RFC 8305).
NEXT_ADDRESS_S = 0.25

_PORTS = {"http": 80, "https": 443}


class Dialer:
    """Makes connections to one origin, straight or through the proxy that the environment names for it."""

    def __init__(self, base_url: str) -> None:
        self._url = httpx.URL(base_url)
        self._proxy: httpx.Proxy | None = None
        self._wrong = ""  # with the proxy that is named: each call says so
        try:
            self._proxy = find_proxy(base_url)
        except httpx.ProxyError as error:
            self._wrong = str(error)
        self._dialled = 0
        self._resolving: asyncio.Task[Sequence[AddrInfoType]] | None = None
        self._resolved_at = 0.0
        host = b"Host: %s\r\n" % self._url.netloc
        if self._proxy is None or self._url.scheme == "https":
            self._prefix, self._host = b"", host
        else:
            self._prefix, self._host = b"http://" + self._url.netloc, host + _lines(self._proxy.headers)

    def head(self, method: str, target: bytes) -> bytes:
        """The first lines of a request: method and target, host, and what a proxy without a tunnel must be shown."""
        return b"%s %s%s HTTP/1.1\r\n%s" % (method.encode(), self._prefix, target, self._host)

    async def dial(self, connection: Callable[[], Connection], timeout_s: float) -> Connection:
        """A new connection. Raises `httpx.ConnectError`, `httpx.ConnectTimeout` or `httpx.ProxyError`; nothing was sent."""
        try:
            async with asyncio.timeout(timeout_s):
                if self._wrong:
                    raise httpx.ProxyError(self._wrong)
                if self._proxy is None:
                    return await self._connect(self._url, connection)
                if self._url.scheme == "http":
                    return await self._connect(self._proxy.url, connection)
                return await self._tunnel(self._proxy, connection, timeout_s)
        except TimeoutError:
            raise httpx.ConnectTimeout(f"no connection within {timeout_s:g} s") from None
        except OSError as error:  # those of TLS are some
            raise httpx.ConnectError(str(error)) from error

    async def _connect(self, url: httpx.URL, connection: Callable[[], Connection]) -> Connection:
        loop = asyncio.get_running_loop()
        addresses = await self._addresses(url)
        self._dialled += 1  # each begins with the next address, so that all of them get some
        turn = self._dialled % len(addresses)
        sock = await start_connection(
            [*addresses[turn:], *addresses[:turn]], happy_eyeballs_delay=NEXT_ADDRESS_S, loop=loop
        )
        made = connection()
        try:
            _keep_alive(sock)
            if url.scheme == "http":
                await loop.create_connection(lambda: made, sock=sock)
                return made
            wire, _ = await loop.create_connection(asyncio.Protocol, sock=sock)
        except BaseException:
            made.close()
            sock.close()
            raise
        await _secure(made, wire, wire, url.raw_host.decode())
        return made

    async def _addresses(self, url: httpx.URL) -> Sequence[AddrInfoType]:
        loop = asyncio.get_running_loop()
        resolving = self._resolving
        if resolving is None or (resolving.done() and loop.time() - self._resolved_at > RESOLVED_S):
            resolving = self._resolving = loop.create_task(self._resolve(url))
            resolving.add_done_callback(_heard)
        # One for all who wait: who is cancelled must not take it from the others.
        return await asyncio.shield(resolving)

    async def _resolve(self, url: httpx.URL) -> Sequence[AddrInfoType]:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(
                url.raw_host.decode(), url.port or _PORTS[url.scheme], type=socket.SOCK_STREAM
            )
        except BaseException:
            self._resolving = None  # the next call asks again
            raise
        self._resolved_at = loop.time()
        return found

    async def _tunnel(self, proxy: httpx.Proxy, connection: Callable[[], Connection], timeout_s: float) -> Connection:
        """TLS to the upstream inside a connection that its proxy passes on."""
        host = self._url.raw_host.decode()
        there = f"{f'[{host}]' if ':' in host else host}:{self._url.port or _PORTS['https']}".encode()
        head = b"CONNECT %s HTTP/1.1\r\nHost: %s\r\n%s\r\n" % (there, there, _lines(proxy.headers))
        # In no pool: whatever the proxy says, nobody else may ask on it.
        outer = await self._connect(proxy.url, lambda: Connection(Connection.close, lambda _: None))
        inner = connection()
        try:
            response = await outer.ask(head, b"", timeout_s)
            if not response.is_success:
                raise httpx.ProxyError(f"the proxy refused the way to the upstream with status {response.status_code}")
            await _secure(inner, *outer.leave(), host)
        except BaseException:
            outer.close()
            raise
        return inner


def _keep_alive(sock: socket.socket) -> None:
    """Answers take minutes in which nothing is said, and gateways forget who is silent."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _secure(made: Connection, below: asyncio.Transport, wire: asyncio.Transport, host: str) -> None:
    """TLS over a transport that is TCP or stands on it."""
    try:
        transport = await asyncio.get_running_loop().start_tls(below, made, _tls(), server_hostname=host)
        if transport is None or transport.is_closing():  # uvloop says nothing of an end during the handshake
            raise ConnectionResetError("the connection was closed")
    except BaseException:
        wire.abort()
        raise
    made.secured(transport, wire)


def _heard(task: asyncio.Task[Any]) -> None:
    """Its error is known, also where nobody waits for it any more."""
    if not task.cancelled():
        task.exception()


def _lines(headers: httpx.Headers) -> bytes:
    return b"".join(b"%s: %s\r\n" % pair for pair in headers.raw)


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def find_proxy(base_url: str) -> httpx.Proxy | None:
    """The proxy that the environment names for this address. Raises `httpx.ProxyError` for one of another kind."""
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
    if proxy.scheme not in _PORTS:
        raise httpx.ProxyError(f"a proxy must be http:// or https://, not {proxy.scheme}://")
    return httpx.Proxy(urlunsplit((proxy.scheme, proxy.netloc.rpartition("@")[2], "", "", "")), headers=headers)
