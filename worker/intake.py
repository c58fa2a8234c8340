"""The intake: answers rings, and claims no more than there is room for.

What goes wrong: Redis away, a ring waits for it as for room. A ring that waited in vain is dropped; the reaper rings
again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import structlog
from redis.exceptions import RedisError

from jobs import identity, leases
from jobs.leases import Job
from jobs.settings import Settings
from worker.line import ASK_AGAIN_S, Lines

#: Seconds a ring waits for room, and gathers jobs, before it is dropped.
RING_WAIT_S = 60.0
#: Jobs in one claim: one script, one reply.
CLAIM = 200
#: While every known model is shut, so many jobs are claimed so often, to see whether there are others.
OTHERS = 5
OTHERS_S = 1.0
#: Room is this many seconds of what the limiter lets through: in the last second, and no more than on average lately, since
#: long calls start in bursts.
ROOM_S = 2.0
LATELY_S = 5.0
#: Seconds after which, without room, it is seen whether there is a new batch: its first job shows what is wrong with it.
LEAD_S = 0.5

log = structlog.get_logger("worker.intake")


@dataclass(eq=False, slots=True)
class _Ring:
    """A ring that is being answered: how many jobs it may still have, and the places of those it got."""

    lane: str
    left: int
    places: list[tuple[str, int]] = field(default_factory=list)
    answered: bool = False


class Intake:
    """The claiming of one worker.

    `may_start` says whether calls may start at all, `waiting` how many jobs of a lane are held and not in flight; `welcome`
    takes claimed jobs.
    """

    def __init__(
        self,
        client: Any,
        settings: Settings,
        worker_id: str,
        lines: Lines,
        may_start: Callable[[], bool],
        waiting: Callable[[str], int],
        welcome: Callable[[list[Job]], Awaitable[None]],
    ) -> None:
        self._client = client
        self._settings = settings
        self._worker_id = worker_id
        self._labels = identity.served_labels(settings)
        self._lines = lines
        self._may_start = may_start
        self._waiting = waiting
        self._welcome = welcome
        self._starts: deque[tuple[float, int]] = deque()
        self._began_at = 0.0  # of the calls that have been started lately
        self._claimed_at = 0.0
        self._looked_at = 0.0  # for new batches
        self._started_since = 2  # calls, since the last new batch
        self._rings: list[_Ring] = []  # that are being answered
        self._failing = False  # the store, when it was asked last
        self._changed = asyncio.Event()
        self.claiming = asyncio.Lock()  # held while a claim is on its way and what it brings is taken in
        self.stopping = False
        self.withdrawn = False  # a worker in quarantine has room for nothing else

    def started(self, count: int) -> None:
        """Calls have started: what is let through, and room for others."""
        now = time.monotonic()
        if not self._starts or self._starts[-1][0] < now - LATELY_S:
            self._began_at = now
        self._starts.append((now, count))
        self._started_since += count
        self._changed.set()

    def stir(self) -> None:
        """Jobs have left: there may be room."""
        self._changed.set()

    def withdraw(self) -> None:
        """No claims until `come_back`; rings wait."""
        self.withdrawn = True

    def come_back(self) -> None:
        """There may be room again."""
        self.withdrawn = False
        self._changed.set()

    def stop(self) -> None:
        """No more claims; rings that wait are dropped."""
        self.stopping = True
        self._changed.set()

    async def ring(self, lane: str, claimed: list[tuple[str, int]] | None = None) -> int:
        """Answers one ring: claims up to a slice as room comes; returns how many jobs were accepted.

        The batch and index of each are put into `claimed`.
        """
        ring = _Ring(lane, self._settings.slice_size)
        end = time.monotonic() + RING_WAIT_S
        self._rings.append(ring)
        try:
            while not ring.answered and await self._wait_for_room(ring, end):
                async with self.claiming:  # whoever has it claims for all that wait for it
                    if not (ring.answered or self.stopping):
                        await self._claim_for([it for it in self._rings if it.lane == lane and not it.answered])
        finally:
            self._rings.remove(ring)
        if claimed is not None:
            claimed += ring.places
        return len(ring.places)

    async def _claim_for(self, rings: list[_Ring]) -> None:
        lane = rings[0].lane
        most = max(CLAIM, self._settings.slice_size)
        wanted = min(self.room(lane), sum(ring.left for ring in rings), most)
        if wanted <= 0:
            return
        self._claimed_at = time.monotonic()
        try:
            jobs = await self._claim(lane, wanted)
        except (RedisError, OSError) as error:
            if not self._failing:
                log.warning("claim_failed", error=type(error).__name__)
            self._failing = True
            await asyncio.sleep(ASK_AGAIN_S)
            return
        self._failing = False
        await self._welcome(jobs)
        places = [(job.batch_id, job.index) for job in jobs]
        for ring in (it for it in rings if it in self._rings):  # one may have gone meanwhile: its time was over
            taken, places = places[: ring.left], places[ring.left :]
            ring.places += taken
            ring.left -= len(taken)
            ring.answered = not ring.left or len(jobs) < wanted  # there are no more
        self._changed.set()

    async def _claim(self, lane: str, wanted: int, leads: bool = False) -> list[Job]:
        account = self._lines.limiter.account
        return await leases.claim(
            self._client, self._worker_id, lane, self._labels, wanted, leads=leads, account=account
        )

    async def _wait_for_room(self, ring: _Ring, end: float) -> bool:
        """Whether there is room, waited for until the monotonic time `end` or another ring's claim answers this one."""
        lane = ring.lane
        while (left := end - time.monotonic()) > 0 and not (self.stopping or ring.answered):
            target = self._target()
            # Room that comes in crumbs is let grow: each claim decompresses a block of requests.
            if self._room(lane, target) >= max(1, min(self._settings.slice_size, target // 4)):
                return True
            if target > 0 and self._may_lead(lane):
                await self._lead(lane)
            self._changed.clear()
            try:
                async with asyncio.timeout(min(left, ASK_AGAIN_S)):
                    await self._changed.wait()
            except TimeoutError:
                continue
        return False

    def _may_lead(self, lane: str) -> bool:
        """Whether a new batch may be looked for: one at a time, and no more than every second call is a lead."""
        waited = time.monotonic() - self._looked_at > LEAD_S
        return waited and self._started_since >= 2 and not self._lines.ahead(lane)

    async def _lead(self, lane: str) -> None:
        """Claims the first job of a new batch, whatever waits here already."""
        async with self.claiming:
            if self.stopping or self.withdrawn or not self._may_lead(lane):  # another ring was first
                return
            self._looked_at = time.monotonic()
            try:
                jobs = await self._claim(lane, 1, leads=True)
            except (RedisError, OSError):
                return  # whoever claims next says so
            if jobs:
                self._started_since = 0
            await self._welcome(jobs)

    def room(self, lane: str = "bulk") -> int:
        """How many more jobs of the lane may be claimed: `ROOM_S` of what is started, none while the account is shut."""
        return self._room(lane, self._target())

    def _room(self, lane: str, target: int) -> int:
        return target - self._waiting(lane) if target > 0 else 0

    def _target(self) -> int:
        """How many jobs are to wait here at present."""
        now = time.monotonic()
        shut_until = self._lines.shut_until
        if self.withdrawn or not self._may_start() or now < self._lines.gate_until:
            return 0
        if now < shut_until:
            # Every model that is known here is shut; there may be jobs of others.
            return OTHERS if now - self._claimed_at > OTHERS_S else 0
        if shut_until:
            return 1  # the probe
        while self._starts and self._starts[0][0] < now - LATELY_S:
            self._starts.popleft()
        lately_s = min(max(now - self._began_at, 1.0), LATELY_S)
        rate = min(
            sum(count for at, count in self._starts if at >= now - 1),
            sum(count for _, count in self._starts) / lately_s,
        )
        least = float(self._settings.slice_size)
        if self._settings.rpm is not None:
            least = min(least, self._settings.rpm / 60 * ROOM_S)
        return int(min(max(least, rate * ROOM_S, 1), 2 * self._settings.worker_max_in_flight))
