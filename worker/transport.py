"""The wire below the upstream client: a pool of connections to one origin, behind httpx's transport interface.

It is our own because of what a call costs: 0.14 ms of CPU, with httpx over aiohttp 0.41 (see decisions/performance.md).
"""

from __future__ import annotations

import asyncio

import httpx

from worker.connection import Connection
from worker.dialing import Dialer

KEEPALIVE_S = 30.0


class Transport(httpx.AsyncBaseTransport):
    """Calls one origin over as many connections as there are calls at once; no cookies, redirects or retries.

    The engine bounds the calls in flight: one that waited here for a connection would look like a slow connect.
    Requests say their `timeout` in the extensions: `pool`, seconds until there is a connection (resolver, TCP and TLS),
    and `read`, seconds in which nothing comes. Once there is one, the extension `connected` is True: from then on
    something may have been sent. Host and length of the body are added here.
    """

    def __init__(self, base_url: str) -> None:
        self._dialer = Dialer(base_url)
        self._connections: set[Connection] = set()
        self._idle: dict[Connection, float] = {}  # since when; the one that was freed last is taken first
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        timeout = request.extensions["timeout"]
        connection = self._kept() or await self._open(timeout["pool"])
        request.extensions["connected"] = True
        body = request.content
        lines = b"".join([b"%s: %s\r\n" % pair for pair in request.headers.raw])
        head = self._dialer.head(request.method, request.url.raw_path)
        return await connection.ask(b"%s%sContent-Length: %d\r\n\r\n" % (head, lines, len(body)), body, timeout["read"])

    def _kept(self) -> Connection | None:
        while self._idle:
            connection, _ = self._idle.popitem()
            if not connection.closing:  # else it is about to be told
                return connection
        return None

    async def _open(self, timeout_s: float) -> Connection:
        connection = await self._dialer.dial(lambda: Connection(self._freed, self._lost), timeout_s)
        if self._closed:
            connection.close()
            raise httpx.ConnectError("the client is closed")
        self._connections.add(connection)
        return connection

    def _freed(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        self._idle[connection] = loop.time()
        if self._sweep is None:
            self._sweep = loop.call_later(KEEPALIVE_S, self._close_idle)

    def _lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._idle.pop(connection, None)

    def _close_idle(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweep = None
        for connection, since in list(self._idle.items()):
            left_s = KEEPALIVE_S - (loop.time() - since)
            if left_s > 0:
                self._sweep = loop.call_later(left_s, self._close_idle)
                break
            connection.close()

    async def aclose(self) -> None:
        """Closes every connection, also those in use."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        self._idle.clear()
        for connection in list(self._connections):
            connection.close()
