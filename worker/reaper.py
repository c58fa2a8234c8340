"""The reaper: gives back what dead workers held, and rings where ready work hears no bell.

Every worker can reap, one does, by a lock in Redis. After a gap in its own rounds (Redis was paused, the machine slept)
it takes no lease for one whole lease time, because live workers could not renew either.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

import structlog
from redis.exceptions import RedisError

from jobs import keys, leases
from jobs.leases import LEASE_S
from jobs.scripts import Script
from worker.outside import Outside

ROUND_S = 1.0
#: Seconds the lock lasts: a dead reaper's successor comes after this.
LOCK_S = 4.0
#: A gap between rounds after which leases get time to be renewed.
GAP_S = 5.0
#: Rings put on a silent queue in one round.
RINGS = 32
SWEEP_JOBS = 2_000
SWEEPS = 20
#: Oldest batches looked at in a round, whether their retention is over.
FORGET_BATCHES = 100

#: Seconds after its last use that a limit record is gone (reserve.lua), and its name is taken off the list.
LIMIT_KEPT_S = 86_400

_sweep = Script("sweep")

log = structlog.get_logger("worker.reaper")


class Rope(Protocol):
    """What pulls the bell: `jobs.broker.Bell`, or what makes one when it is first needed."""

    def ring(self, batch_id: str, lane: str, upstream: str, times: int) -> None:
        """Puts rings on the lane's queue."""

    def depth(self, lane: str, upstream: str) -> int:
        """Rings that wait there."""


class Reaper:
    """One worker's readiness to reap."""

    def __init__(self, client: Any, bell: Rope, worker_id: str, outside: Outside | None = None) -> None:
        self._client = client
        self._bell = bell
        self._id = worker_id
        self._outside = outside
        self.ringing: asyncio.Task[None] | None = None
        self._last = 0.0
        self._patient_until = 0.0

    async def run(self) -> None:
        """Rounds until cancelled."""
        while True:
            try:
                await self.turn()
            except (RedisError, OSError) as error:
                log.debug("round_failed", error=type(error).__name__)
            await asyncio.sleep(ROUND_S)

    async def turn(self) -> bool:
        """A round, if this worker is the one that reaps; returns whether it is."""
        chosen = await self._chosen()
        self._notice_gap()
        if chosen:
            await self.round()
        return chosen

    def _notice_gap(self) -> None:
        """Redis has just answered. Was it, or were we, away so long that live workers may have lost their leases?

        Every worker keeps watch, since any may be the first to get the lock after an outage. One that has just started
        can't know, and leaves the others time for a heartbeat.
        """
        now = time.time()  # also counts a suspended machine, which the monotonic clock does not
        if not self._last:
            self._patient_until = now + GAP_S
        elif not 0 <= now - self._last < GAP_S:
            self._patient_until = now + LEASE_S
            log.info("reaper_waits_a_lease", gap_s=round(now - self._last, 1))
        self._last = now

    async def _chosen(self) -> bool:
        """Whether this worker holds the reaper's lock, taken or renewed."""
        holder = await self._client.get(keys.REAPER)
        if holder is None:
            return bool(await self._client.set(keys.REAPER, self._id, nx=True, px=int(LOCK_S * 1000)))
        # Renewed by a command that also a Redis out of memory obeys.
        return holder == self._id.encode() and bool(await self._client.pexpire(keys.REAPER, int(LOCK_S * 1000)))

    async def round(self) -> None:
        """One round: leases, due retries, deadlines, closing batches, silent queues."""
        patient = time.time() < self._patient_until
        taken, woken = await leases.reap(self._client, leases=0 if patient else 200)
        if taken:
            log.warning("jobs_taken_back", jobs=taken)
        if woken:
            log.debug("retries_due", batches=woken)
        for raw in await self._client.smembers(keys.CLOSING):
            for _ in range(SWEEPS):
                if await _sweep(self._client, [keys.PREFIX], [raw.decode(), SWEEP_JOBS]) <= 0:
                    break
        if self._outside is not None:
            await self._outside.write_revoked()
        await self._forget_expired()
        await self._client.zremrangebyscore(keys.LIMITS, "-inf", time.time() - LIMIT_KEPT_S)
        # Beside the rounds: a broker that does not answer must not keep dead workers' jobs from being given back.
        if self.ringing is None or self.ringing.done():
            unheard = await leases.unheard(self._client, RINGS)
            if unheard:
                self.ringing = asyncio.create_task(asyncio.to_thread(self._ring, unheard))

    async def _forget_expired(self) -> None:
        """Takes batches whose retention is over off the list of all."""
        oldest = await self._client.zrange(keys.BATCHES, 0, FORGET_BATCHES - 1)
        if not oldest:
            return
        pipe = self._client.pipeline(transaction=False)
        for raw in oldest:
            pipe.exists(keys.batch(raw.decode()))
        gone = [raw for raw, kept in zip(oldest, await pipe.execute(), strict=True) if not kept]
        if gone:
            await self._client.zrem(keys.BATCHES, *gone)

    def _ring(self, unheard: list[tuple[str, str, str, int]]) -> None:
        try:
            for lane, label, batch_id, slices in unheard:
                if self._bell.depth(lane, label) == 0:
                    self._bell.ring(batch_id, lane, label, slices)
        except Exception as error:
            # Whatever a broker's client raises: the next round rings again.
            log.warning("broker_away", error=type(error).__name__)
