"""Events in the outbox as the end of a job writes them, and a receiver of webhooks on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from jobs import keys
from jobs.connections import connect_async

URL = "https://hooks.example/a?key=private-part"


def drive(url: str, main: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    """Runs a test's coroutine with an async client of that store."""

    async def run() -> None:
        async with connect_async(url) as client:
            try:
                async with asyncio.timeout(60):
                    await main(client)
            finally:
                await client.connection_pool.disconnect()

    asyncio.run(run())


async def until(look: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """The first true value of `look`, which may be a coroutine function."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = look()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"did not come about; last seen: {value!r}"
        await asyncio.sleep(0.01)


async def put(
    client: Any,
    event_id: str,
    url: str = URL,
    tenant: str = "t",
    kind: str = "job.succeeded",
    subject: str = "b-0",
    age_s: float = 0.0,
    due_in_s: float = 0.0,
    attempts: int = 0,
    tell: bool = True,
) -> None:
    """What `post_event` of common.lua does, `age_s` ago."""
    at = await server_time(client)
    fields: Mapping[str, Any] = {
        "kind": "webhook",
        "type": kind,
        "tenant": tenant,
        "subject": subject,
        "url": url,
        "created_at": f"{at - age_s:.6f}",
        "attempts": attempts,
    }
    pipe = client.pipeline(transaction=True)
    pipe.hset(keys.event(event_id), mapping=fields)
    pipe.zadd(keys.OUTBOX, {event_id: at + due_in_s})
    pipe.zadd(keys.tenant_events(tenant), {event_id: at - age_s})
    if tell:
        pipe.publish(keys.OUTBOX, event_id)
    await pipe.execute()


async def server_time(client: Any) -> float:
    seconds, micros = await client.time()
    return float(seconds + micros / 1e6)


async def state(client: Any, event_id: str) -> str:
    """Its state as Redis holds it."""
    found = await client.hget(keys.event(event_id), "state")
    return found.decode() if found else "pending"


@dataclass
class Received:
    """One request as it came."""

    headers: dict[str, str]
    body: bytes
    path: str

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


@dataclass
class Receiver:
    """Answers with `answers` in turn, then with 200; while `gate` is cleared it answers nobody."""

    answers: list[web.Response] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    here: int = 0
    most: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?key=private-part"

    @property
    def ids(self) -> list[str]:
        return [request.id for request in self.received]

    async def handle(self, request: web.Request) -> web.Response:
        # Names in small letters, as a web framework hands them on.
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(headers, await request.read(), request.path))
        self.here += 1
        self.most = max(self.most, self.here)
        try:
            await self.gate.wait()
        finally:
            self.here -= 1
        return self.answers.pop(0) if self.answers else web.Response()


@asynccontextmanager
async def receiving(*answers: web.Response) -> AsyncIterator[Receiver]:
    """A receiver that listens on loopback."""
    receiver = Receiver(list(answers))
    receiver.gate.set()
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", receiver.handle)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.port = runner.addresses[0][1]
    try:
        yield receiver
    finally:
        await runner.cleanup()
