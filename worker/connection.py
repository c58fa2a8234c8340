"""One HTTP/1.1 connection: a request out, its response in, and the next when that has been read.

Parsing is llhttp's (httptools). Nothing is read from the socket unless somebody waits for more, so that a body that
nobody takes stays with the kernel, and the pieces of a stream come together. Where there is TLS it is the TCP below that
pauses: uvloop's TLS forgets what it holds for a paused reader when the connection ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import httptools
import httpx

#: More than this before the end of a header is no HTTP.
MAX_HEAD_BYTES = 256 * 1024
#: A request of more bytes may be answered before all of it has gone out.
LARGE_BYTES = 64 * 1024

# What aiohttp and browsers forgive as well: servers say it, and it is never two things at once.
_FORGIVEN = {
    "lenient_headers": True,
    "lenient_optional_cr_before_lf": True,
    "lenient_spaces_after_chunk_size": True,
    "lenient_data_after_close": True,
}


class Connection(asyncio.Protocol):
    """A connection of a pool, which is told with `freed` that it can take the next request, with `lost` that it can't."""

    def __init__(self, freed: Callable[[Connection], None], lost: Callable[[Connection], None]) -> None:
        self._freed, self._lost = freed, lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._idle_s, self._waiting_since = 0.0, 0.0
        self._asked = self._large = self._paused = False
        self._wire: asyncio.Transport | None = None  # the transport, or the TCP below its TLS
        self._begin()

    def _begin(self) -> None:
        self._status = 0  # until the header is complete
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._pieces: list[bytes] = []
        self._complete = self._keep = False
        self._failure: Exception | None = None

    # -- asking

    async def ask(self, head: bytes, body: bytes, idle_s: float) -> httpx.Response:
        """Sends a request; returns its response once the header is there, its body to be read.

        Close the response in any case. Raises `httpx.ReadTimeout` when nothing has come for `idle_s` seconds,
        `httpx.RemoteProtocolError` or `httpx.ReadError` when no response comes; the body raises the same.
        """
        assert self._transport is not None
        self._begin()
        self._asked, self._idle_s, self._large = True, idle_s, len(body) > LARGE_BYTES
        self._timer = self._loop.call_later(idle_s, self._look)
        try:
            if self._large:
                self._transport.writelines((head, body))
            else:
                self._transport.write(head + body)
            while not self._status:
                await self._more()
        except BaseException:
            self.release()
            raise
        return httpx.Response(self._status, headers=self._headers, stream=_Body(self))

    async def take(self) -> bytes | None:
        """What has come of the body; waits for more where nothing has. None at its end."""
        while not self._pieces:
            if self._complete:
                return None
            await self._more()
        piece = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        return piece

    async def _more(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._read_on()
        self._waiting_since = self._loop.time()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _read_on(self) -> None:
        if self._paused and self._wire is not None:
            self._paused = False
            self._wire.resume_reading()

    def _look(self) -> None:
        """Has nothing come for too long? Looks again when that could be so: a timer a call is all it costs."""
        waits = self._waiter is not None and not self._waiter.done()
        waited = self._loop.time() - self._waiting_since if waits else 0.0
        if waited >= self._idle_s:
            self._timer = None
            self._fail(httpx.ReadTimeout(f"nothing came for {self._idle_s:g} s"))
        else:
            self._timer = self._loop.call_later(self._idle_s - waited, self._look)

    def _stop_looking(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def release(self) -> None:
        """The response is done with: the connection takes the next request, or is closed where this one is not over."""
        if not self._asked:
            return
        self._asked = False
        self._stop_looking()
        if self.closing or self._wire is None:
            return
        unread = self._wire.get_write_buffer_size() or (self._large and self._status >= 300)
        if self._complete and self._keep and not unread:
            self._read_on()  # else it would not hear of its end
            self._freed(self)
        else:
            self.close()

    @property
    def closing(self) -> bool:
        """Whether it is of no use any more."""
        return self._wire is None or self._wire.is_closing() or self._transport is None or self._transport.is_closing()

    def leave(self) -> tuple[asyncio.Transport, asyncio.Transport]:
        """Gives its transport and its TCP away: who asked the proxy for a way speaks TLS over it from now on."""
        transport, wire = self._transport, self._wire
        if transport is None or wire is None:
            raise ConnectionResetError("the proxy closed the connection")
        self._transport = self._wire = self._parser = None
        self.release()
        if self._paused:
            wire.resume_reading()
        return transport, wire

    def close(self) -> None:
        """Closes the connection, whatever it does; it is lost at once."""
        if self._asked and not self._complete:
            self._failure = self._failure or httpx.ReadError("the connection was closed")
        if self._transport is not None:
            self._transport.abort()
        self._lost(self)

    def _fail(self, failure: Exception) -> None:
        self._failure = self._failure or failure
        self.close()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- what the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = self._wire = cast("asyncio.Transport", transport)  # uvloop's are none of asyncio's
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(**_FORGIVEN)

    def secured(self, transport: asyncio.Transport, wire: asyncio.Transport) -> None:
        """The same, for TLS over a TCP connection."""
        self.connection_made(transport)
        self._wire = wire

    def data_received(self, data: bytes) -> None:
        if not self._asked or self._parser is None or self._transport is None:
            self.close()  # what a server says unasked is that it will close
            return
        if not self._status:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._keep = False
            if not self._complete:
                # Without the parser's words: they may quote what came.
                self._fail(httpx.RemoteProtocolError("no HTTP response"))
        if not self._status and self._head_bytes > MAX_HEAD_BYTES:
            self._fail(httpx.RemoteProtocolError(f"over {MAX_HEAD_BYTES} bytes of header"))
        if not self._complete and self._wire is not None:
            self._paused = True
            self._wire.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self._end(None)
        self.close()  # at once, also where something is left of a request

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc)
        self._stop_looking()
        self._transport = self._wire = self._parser = None  # which holds this connection
        self._lost(self)

    def _end(self, error: Exception | None) -> None:
        """Nothing more will come."""
        if self._asked and not self._complete and self._failure is None:
            if error is None and self._status and not self._bounded():
                self._complete = True
            else:
                self._failure = httpx.ReadError("the connection was lost")
                self._failure.__cause__ = error
        self._wake()

    def _bounded(self) -> bool:
        """Whether the header says where the body ends; otherwise its end is that of the connection."""
        return any(
            name.lower() == b"content-length" or (name.lower() == b"transfer-encoding" and b"chunked" in value.lower())
            for name, value in self._headers
        )

    # -- what the parser calls

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("a second response to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._status:  # else it is a trailer
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        parser = cast("httptools.HttpResponseParser", self._parser)
        status = parser.get_status_code()
        if status >= 200:
            self._status = status
            self._keep = parser.should_keep_alive()

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        if self._status:
            self._complete = True
        else:
            self._headers.clear()  # of an interim response (100, 103)


class _Body(httpx.AsyncByteStream):
    """The body of a response, in the pieces it comes in."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        piece = await self._connection.take()
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        self._connection.release()
