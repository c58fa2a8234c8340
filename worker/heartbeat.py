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
from worker.limiter import RESERVATION_S

#: Seconds between heartbeats; cancellation reaches calls in flight within this.
BEAT_S = 1.0

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
        found = await leases.beat(
            self._client,
            engine.worker_id,
            self._self(),
            engine.account,
            list(engine.holding.tokens),
            engine.limiter.flights((run.model, reservation) for reservation, (run, _) in engine.flying.items()),
            RESERVATION_S,
            interactive=engine.serves_interactive,
        )
        if found.lost:
            engine.lease_lost(found.lost)
        if found.closing:
            engine.abort(found.closing)
        if found.paused:
            engine.give_back_of(found.paused)
        engine.renewed_at = began
        if found.gate_until is None or found.gate_until <= found.now:
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
