"""The wire: uvicorn's HTTP/1.1 protocol with the bounds that it lacks, and with refusals in our shapes.

What goes wrong: a request line, headers or trailers without end, which the parser would keep as they come; a head that never
is whole; requests sent one behind the other faster than they are answered; bytes that are no HTTP. Each is told why, where
nobody could take that for the answer to something else, and its connection is closed.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from api.problems import Problem, media_type, protocol_of

#: Bytes of a head that is not whole yet. Of one that is, the door counts them.
HEAD_BYTES = 65_536
#: Seconds in which a head must be whole.
HEAD_S = 60.0
#: Requests of one connection that wait for the one before them.
PIPELINED = 100
#: Bytes and seconds for which a refused sender is heard out: closed at once, it would miss what it is told.
LINGER_BYTES = 1_000_000
LINGER_S = 2.0


class Wire(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_head = False  # whether a head has begun and is not whole
        self._moved = False  # whether these bytes were of some use: a whole head, or body
        self._stuck = 0  # bytes that were of none, in a row
        self._heard_out: int | None = None  # bytes that came after a refusal
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Begins to wait for a head."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEAD_S, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no longer."""
        self._unset_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feeds the parser, and looks whether that gets anywhere."""
        if self._heard_out is not None:
            self._heard_out += len(data)
            if self._heard_out > LINGER_BYTES:
                self.transport.close()
            return
        self._moved = False
        super().data_received(data)
        if self._heard_out is not None:
            return
        if self._moved:
            self._stuck = 0
        else:
            self._stuck += len(data)
            if self._stuck > HEAD_BYTES:
                self._refuse(Problem(431, "headers_too_large", f"the headers have over {HEAD_BYTES:,} bytes in all"))
                return
        if (self._in_head or not self._moved) and self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(HEAD_S, self._too_slow)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A whole head. Raises (which the parser tells as bad HTTP) when too many others wait already."""
        self._moved = True
        self._unset_timer()
        if len(self.pipeline) >= PIPELINED:
            raise ValueError("too many requests in a row")
        super().on_headers_complete()
        self._in_head = False

    def on_body(self, body: bytes) -> None:
        """Some of a body."""
        self._moved = True
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """What the parser can't read."""
        if len(self.pipeline) >= PIPELINED:
            detail = f"over {PIPELINED} requests came before their answers: wait for some of them"
        else:
            detail = "this is no HTTP/1.1 request, or its address can't be read"
        self._refuse(Problem(400, "bad_request", detail))

    def _unsupported_upgrade_warning(self) -> None:
        """No warning: who asks for HTTP/2 or a WebSocket is answered in HTTP/1.1, as the protocol provides."""

    def _too_slow(self) -> None:
        self._timer = None
        if self._in_head:
            self._refuse(Problem(408, "too_slow", f"the headers did not come within {HEAD_S:g} s"))
        elif self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _refuse(self, problem: Problem) -> None:
        """Answers and closes; where an answer to another request is still due, only closes."""
        self._unset_timer()
        self._unset_keepalive_if_required()
        self._heard_out = 0
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            due = self._in_head or cycle.response_started or bool(self.pipeline)
            cycle.disconnected = True
            cycle.message_event.set()
            if due:
                self.transport.close()
                return
        protocol = protocol_of(getattr(self, "url", b"").partition(b"?")[0].decode("latin-1"))
        request_id = f"req_{secrets.token_hex(12)}"
        body = problem.body(protocol, request_id)
        headers = {
            b"content-type": media_type(protocol).encode(),
            b"content-length": str(len(body)).encode(),
            b"request-id" if protocol == "anthropic" else b"x-request-id": request_id.encode(),
            b"connection": b"close",
        }
        head = b"".join(b"%s: %s\r\n" % pair for pair in [*self.server_state.default_headers, *headers.items()])
        self.transport.write(STATUS_LINE[problem.status] + head + b"\r\n" + body)
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _unset_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
