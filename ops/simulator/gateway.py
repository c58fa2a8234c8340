"""How a call fares.

It is judged as a gateway would: address, outage, key, body, limits. What passes is in flight for its latency and is
then answered or harmed. A client that goes away early is billed all the same.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import struct
import time
from collections.abc import Callable, Mapping

from aiohttp import web
from msgspec import Struct

from ops.simulator.answers import Answer, latency_s, make_answer
from ops.simulator.asks import Ask, BadRequest, address, read_ask
from ops.simulator.config import Config
from ops.simulator.faults import FAULTS, TOO_MANY, Dice, Fault
from ops.simulator.ledger import Call, Ledger
from ops.simulator.limits import Account, Minute
from ops.simulator.wire import error_body, error_event, events, whole

FLUSH_S = 0.02  # pieces of a stream that are due closer together leave in one write
JSON = "application/json"
RETRY_AFTER_STATUSES = (429, 503, 529)
PROXY_PAGE = b"<html><head><title>Welcome</title></head><body><h1>It works!</h1></body></html>"
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s


class Refusal(Exception):
    """Ends a call before it is in flight."""

    def __init__(self, fault: Fault, name: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(fault.message)
        self.fault = fault
        self.name = name  # in the ledger
        self.headers = headers or {}


class Admitted(Struct):
    """A call in flight."""

    ask: Ask
    account: Account
    answer: Answer
    fault: Fault | None
    latency_s: float


class Gateway:
    """The state that calls meet. Use it from one event loop."""

    def __init__(self, config: Config, ledger: Ledger, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.ledger = ledger
        self.dice = Dice(config.script)
        self.released = asyncio.Event()  # clear while answers are held
        self._accounts: dict[tuple[str, str], Account] = {}
        self._clock = clock

    def reset(self) -> None:
        """Forgets the calls of the last minute."""
        for account in self._accounts.values():
            account.minute = Minute()

    def minutes(self) -> list[Minute]:
        """The minute of every account and model."""
        return [account.minute for account in self._accounts.values()]

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        call = self.ledger.arrive(request.path)
        admitted: Admitted | None = None
        try:
            try:
                admitted = self._admit(request, await request.read(), call)
            except Refusal as refusal:
                call.fault = refusal.name
                return await self._send(request, call, _error(refusal.fault), refusal.fault.status, refusal.headers)
            return await self._answer(request, call, admitted)
        finally:
            if admitted is not None:
                admitted.account.leave()
            self.ledger.end(call)

    def _admit(self, request: web.BaseRequest, raw: bytes, call: Call) -> Admitted:
        """Takes the call in. Raises `Refusal`."""
        config = self.config
        where = address(request.path)
        if where is None:
            raise Refusal(Fault(404, "Not found", "not_found_error"))
        if request.method != "POST":
            raise Refusal(Fault(405, "Method not allowed", "invalid_request_error"), headers={"Allow": "POST"})
        if config.down is not None:
            raise Refusal(FAULTS["503"], "down")
        key = _key(request)
        if not key or (config.key is not None and not hmac.compare_digest(_bytes(key), _bytes(config.key))):
            raise Refusal(FAULTS["401"])
        try:
            ask = read_ask(*where, raw)
        except BadRequest as error:
            raise Refusal(Fault(400, str(error), "invalid_request_error")) from None
        call.digest, call.tag, call.stream = ask.digest, ask.tag, ask.stream

        before = self.ledger.asked_before(ask.digest)
        call.fault = self.dice.pick(config, raw, ask.digest, before, stream=ask.stream)
        fault = FAULTS[call.fault] if call.fault is not None else None
        answer = make_answer(config, ask, call.fault)
        account = self._accounts.setdefault((key, ask.model), Account())
        limit = account.ask(self._clock(), answer.total_tokens if fault is None or fault.paid else 0, config)
        if limit is not None:
            raise Refusal(TOO_MANY, limit, self._limit_headers(account))
        self.ledger.admit(call)
        return Admitted(ask, account, answer, fault, latency_s(config, ask.digest, before))

    async def _answer(self, request: web.BaseRequest, call: Call, admitted: Admitted) -> web.StreamResponse:
        fault, answer = admitted.fault, admitted.answer
        headers = self._limit_headers(admitted.account)
        if fault is not None and not fault.late:
            return await self._send(request, call, _error(fault), fault.status, headers)
        try:
            streamed = admitted.ask.stream and (fault is None or fault.status == 200) and call.fault != "not_json"
            await self._pause(admitted.latency_s / (2 if streamed else 1))
            if streamed:
                return await self._stream(request, call, admitted, headers)
            if fault is None or fault.paid:
                body = whole(answer)
                if call.fault == "truncated":
                    body = body[: len(body) * 2 // 3]
                return await self._send(request, call, body, 200, headers)
            if call.fault == "not_json":
                return await self._send(request, call, PROXY_PAGE, 200, headers, "text/html")
            if fault.status:
                return await self._send(request, call, _error(fault), fault.status, headers)
            if call.fault == "reset":
                _cut(request)
            # Never done: the client's going cancels it.
            silence: asyncio.Future[web.StreamResponse] = asyncio.get_running_loop().create_future()
            return await silence
        finally:
            if fault is None or fault.paid:
                call.paid = True
                call.prompt_tokens, call.completion_tokens = answer.prompt_tokens, answer.completion_tokens

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            await asyncio.sleep(seconds)
        if self.config.hold:
            await self.released.wait()

    async def _send(
        self,
        request: web.BaseRequest,
        call: Call,
        body: bytes,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        content_type: str = JSON,
    ) -> web.StreamResponse:
        call.status = status
        all_headers = {"Content-Type": content_type, **self._headers(call, status), **(headers or {})}
        response = web.Response(body=body, status=status, headers=all_headers)
        return await self._deliver(request, call, response, [], 0)

    async def _stream(
        self, request: web.BaseRequest, call: Call, admitted: Admitted, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        """Sends the events, evenly over the second half of the latency."""
        parts = events(admitted.answer, self.config.stream_events, include_usage=admitted.ask.include_usage)
        half = len(parts) // 2
        if call.fault in ("stream_cut", "truncated", "sse_error"):
            at_cut = parts[half]
            del parts[half:]
            if call.fault == "truncated":
                parts.append(at_cut[: len(at_cut) // 2])
            elif call.fault == "sse_error":
                parts.append(error_event(500, FAULTS["500"].message, FAULTS["500"].type))
        call.status = 200
        all_headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", **self._headers(call, 200)}
        response = web.StreamResponse(headers={**all_headers, **headers})
        time_left = admitted.latency_s / 2
        writes = max(1, min(len(parts), int(time_left / FLUSH_S)))
        step = -(-len(parts) // writes)
        groups = [b"".join(parts[i : i + step]) for i in range(0, len(parts), step)]
        return await self._deliver(request, call, response, groups, time_left / len(groups))

    async def _deliver(
        self, request: web.BaseRequest, call: Call, response: web.StreamResponse, groups: list[bytes], every_s: float
    ) -> web.StreamResponse:
        """Writes the response here, not after the handler, so that the ledger knows whether it went out."""
        try:
            await response.prepare(request)
            for number, group in enumerate(groups):
                if number and every_s > 0:
                    await asyncio.sleep(every_s)
                await response.write(group)
            await response.write_eof()
            call.delivered = True
        except ConnectionError:
            pass  # the client has gone; aiohttp ends the connection
        return response

    def _headers(self, call: Call, status: int) -> dict[str, str]:
        headers = {"x-request-id": f"sim-{self.config.seed}-{call.number}"}
        if self.config.retry_after is not None and status in RETRY_AFTER_STATUSES:
            headers["Retry-After"] = f"{self.config.retry_after:g}"
            call.retry_after = self.config.retry_after
        return headers

    def _limit_headers(self, account: Account) -> dict[str, str]:
        return account.headers(self._clock(), self.config) if self.config.limit_headers else {}


def _error(fault: Fault) -> bytes:
    return error_body(fault.status, fault.message, fault.type)


def _key(request: web.BaseRequest) -> str:
    """The key that was sent, or nothing."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return (key.strip() if scheme.lower() == "bearer" else "") or request.headers.get("x-api-key", "").strip()


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _cut(request: web.BaseRequest) -> None:
    """Resets the connection."""
    if request.transport is not None:
        request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        request.transport.abort()
