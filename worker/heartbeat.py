"""The heartbeat: renews what this worker holds and says that it lives.

An event loop that stalls does not renew, and the engine starts no call once the last renewal is over 2/3 of a lease old.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import msgspec
import structlog
from redis.exceptions import RedisError

from jobs import identity, keys, leases
from worker.engine import Engine

#: Seconds between heartbeats; cancellation reaches calls in flight within this.
BEAT_S = 1.0
#: Seconds after which a worker that says nothing is no longer listed.
LISTED_S = 15

log = structlog.get_logger("worker.heartbeat")


class Heartbeat:
    """The heartbeat of one engine."""

    def __init__(self, client: Any, engine: Engine, lanes: list[str]) -> None:
        self._client = client
        self._engine = engine
        self._lanes = lanes
        self._started = time.time()

    async def run(self) -> None:
        """Beats until cancelled."""
        while True:
            began = time.monotonic()
            try:
                await self._beat(began)
            except (RedisError, OSError) as error:
                log.debug("beat_failed", error=type(error).__name__)
            await asyncio.sleep(max(0.0, BEAT_S - (time.monotonic() - began)))

    async def _beat(self, began: float) -> None:
        engine = self._engine
        tokens = list(engine.holding.tokens)
        if tokens:
            found = await leases.renew(self._client, tokens)
            if found.lost:
                engine.lease_lost(found.lost)
            if found.closing:
                engine.abort(found.closing)
            if found.paused:
                engine.give_back_of(found.paused)
        seconds, microseconds = await self._client.time()
        pipe = self._client.pipeline(transaction=False)
        by_model: dict[str, list[str]] = {}
        for reservation, (run, _) in engine.flying.items():
            by_model.setdefault(run.model, []).append(reservation)
        for model, reservations in by_model.items():
            engine.limiter.renew(pipe, model, reservations, seconds + microseconds / 1e6)
        pipe.zadd(keys.WORKERS, {engine.worker_id: seconds})
        pipe.set(keys.worker(engine.worker_id), self._self(), ex=LISTED_S)
        pipe.zremrangebyscore(keys.WORKERS, "-inf", seconds - 3600)
        pipe.hget(keys.gate(engine.account), "until")
        *_, until = await pipe.execute()
        engine.renewed_at = began
        if until is None or float(until) <= seconds:
            engine.lines.account_open()

    def _self(self) -> bytes:
        engine = self._engine
        return msgspec.json.encode(
            {
                "id": engine.worker_id,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "lanes": self._lanes,
                "label": identity.label(engine.settings),
                "upstream": urlsplit(engine.settings.base_url).netloc,
                "account": engine.account,
                "in_flight": len(engine.flying),
                "held": len(engine.holding),
                "bounds": engine.bounds,
                "stopping": engine.stopping,
                "started_at": self._started,
            }
        )

    async def leave(self) -> None:
        """Takes this worker off the list."""
        try:
            await self._client.delete(keys.worker(self._engine.worker_id))
            await self._client.zrem(keys.WORKERS, self._engine.worker_id)
        except (RedisError, OSError) as error:
            log.debug("leave_failed", error=type(error).__name__)
