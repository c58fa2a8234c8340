"""The load of `ops.bench.api`, a process of its own: raw HTTP/1.1, because a client library costs more than the API.

It reads one plan as JSON on stdin and leaves what came of it as JSON in a file of its working directory.
`MIMOQ_BENCH_TOKEN` is the token it sends.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvloop

RESULT = "load.json"
#: Connections that are opened at once.
OPENING = 100


class Ask(msgspec.Struct):
    """One request."""

    method: str
    path: str
    body: str = ""
    type: str = "application/json"


class Plan(msgspec.Struct):
    """Requests in turn over `connections` of them; with `waiting`, each on a connection of its own, all at once."""

    port: int
    asks: list[Ask]
    connections: int = 1
    times: int = 1
    waiting: bool = False
    keep: bool = False


class Load(msgspec.Struct):
    """What came: seconds of all, and of each in the order of their ends; unix times of answers; their bodies, if kept."""

    took_s: float
    each_s: list[float] = []
    at: list[float] = []
    bodies: list[str] = []


def encoded(ask: Ask, token: str) -> bytes:
    """The bytes of a request."""
    body = ask.body.encode()
    head = f"{ask.method} {ask.path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {token}\r\n"
    if body:
        head += f"Content-Type: {ask.type}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


class Connection:
    """One that is kept alive."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        """To a port of this machine."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, request: bytes) -> bytes:
        """The body of the answer. Raises RuntimeError when it is no success."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        place = head.lower().index(b"content-length:") + 15
        body = await self._reader.readexactly(int(head[place : head.index(b"\r", place)]))
        if not head.startswith(b"HTTP/1.1 20"):
            raise RuntimeError(
                f"answered {head.partition(b' ')[2][:3].decode()}: {body[:200].decode(errors='replace')}"
            )
        return body

    def close(self) -> None:
        """Ends it."""
        self._writer.close()


async def flood(plan: Plan, token: str) -> Load:
    """All asks, `times` over, by so many connections that each send one after the other."""
    load = Load(0.0)
    requests = [encoded(ask, token) for ask in plan.asks]
    queue: Iterator[bytes] = (request for _ in range(plan.times) for request in requests)
    bodies: list[bytes] = []

    async def work(connection: Connection) -> None:
        for request in queue:
            began = time.perf_counter()
            body = await connection.ask(request)
            load.each_s.append(time.perf_counter() - began)
            load.at.append(time.time())
            if plan.keep:
                bodies.append(body)

    connections = [await Connection.open(plan.port) for _ in range(plan.connections)]
    began = time.perf_counter()
    await asyncio.gather(*map(work, connections))
    load.took_s = time.perf_counter() - began
    for connection in connections:
        connection.close()
    load.bodies = [body.decode() for body in bodies]
    return load


async def wait(plan: Plan, token: str) -> Load:
    """Every ask on a connection of its own; says `waiting` on stdout once all are sent. `at` is in the order of the asks."""
    load = Load(0.0, at=[0.0] * len(plan.asks))
    room = asyncio.Semaphore(OPENING)
    left = len(plan.asks)

    async def one(place: int, ask: Ask) -> None:
        nonlocal left
        async with room:
            connection = await Connection.open(plan.port)
        answer = asyncio.ensure_future(connection.ask(encoded(ask, token)))
        await asyncio.sleep(0)  # it is sent now
        left -= 1
        if not left:
            print("waiting", flush=True)
        await answer
        load.at[place] = time.time()
        connection.close()

    began = time.perf_counter()
    await asyncio.gather(*(one(place, ask) for place, ask in enumerate(plan.asks)))
    load.took_s = time.perf_counter() - began
    return load


def main() -> int:
    """Carries out the plan."""
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    work: Any = wait if plan.waiting else flood
    load = uvloop.run(work(plan, os.environ["MIMOQ_BENCH_TOKEN"]))
    Path(RESULT).write_bytes(msgspec.json.encode(load))
    return 0


if __name__ == "__main__":
    sys.exit(main())
