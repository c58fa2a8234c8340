"""The lines: claimed jobs that wait for their call, one line a model, and who asks the limiter for them.

What goes wrong: Redis away, a line asks again later. While nobody may call, its jobs are given back, so that nothing
waits in a worker for a gate to open.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import structlog
from redis.exceptions import RedisError

from worker.limiter import Grant, Limiter
from worker.run import Run

#: Reservations asked for in one call.
RESERVE_BLOCK = 100
#: Seconds between looks at the limiter when something other than a rate bounds it.
ASK_AGAIN_S = 0.1
#: Jobs are given back when nobody may call for longer than this.
SHUT_S = 2.0
#: Seconds that nothing is claimed after a probe has gone out.
PROBE_S = 0.5
#: Seconds after which a line without jobs ends.
IDLE_S = 10.0
#: What bounds a line while the limiter can't be asked.
AWAY = "store_away"

log = structlog.get_logger("worker.line")


class Lines:
    """The lines of one account.

    `free` says how many calls may start now, `start` starts one by its reservation and the monotonic time it is due,
    `give_back` takes the jobs of a line that nobody may call for some seconds.
    """

    def __init__(
        self,
        limiter: Limiter,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        free: Callable[[], int],
        start: Callable[[Run, str, float], None],
        give_back: Callable[[str, float], None],
    ) -> None:
        self.limiter = limiter
        self.free = free
        self.start = start
        self.give_back = give_back
        self.on_started: Callable[[int], None] = lambda count: None
        self.gate_until = 0.0  # of the account, as whichever line looked last has seen it
        self._spawn = spawn
        self._lines: dict[str, Line] = {}

    def add(self, run: Run, first: bool = False) -> None:
        """Puts a job into its model's line."""
        line = self._lines.get(run.model)
        if line is None:
            line = self._lines[run.model] = Line(run.model, self)
            self._spawn(line.live())
        if first:
            line.waiting.appendleft(run)
        else:
            line.waiting.append(run)
        line.wake.set()

    def sift(self) -> None:
        """Takes out what is no longer to be called."""
        for line in self._lines.values():
            line.waiting = deque(run for run in line.waiting if not run.over)

    def wake(self) -> None:
        """Reservations were freed: looks at the limiter again."""
        for line in self._lines.values():
            line.wake.set()

    def drop(self, model: str) -> None:
        """A line has ended."""
        del self._lines[model]

    @property
    def asking(self) -> int:
        """Jobs whose reservation is being asked for."""
        return sum(line.asking for line in self._lines.values())

    @property
    def shut_until(self) -> float:
        """Monotonic time before which no line may call; 0 when one of them is open."""
        return max(self.gate_until, min((line.shut_until for line in self._lines.values()), default=0.0))

    @property
    def bounds(self) -> list[str]:
        """What holds the lines back at present."""
        lines = self._lines.values()
        return sorted({line.bound for line in lines if line.bound and (line.waiting or line.shut_until)})


class Line:
    """The jobs of one model that wait for their call."""

    def __init__(self, model: str, lines: Lines) -> None:
        self.model = model
        self.waiting: deque[Run] = deque()
        self.wake = asyncio.Event()
        self.asking = 0
        self.shut_until = 0.0
        self.bound = ""  # what holds it back, for people: a limit, a gate and its reason, or nothing
        self._lines = lines

    async def live(self) -> None:
        """Starts calls as the limiter lets them through, until there have been no jobs for a while."""
        while True:
            if not self.waiting:
                await self._pause(IDLE_S)
                if not self.waiting and not self.wake.is_set() and not self.shut_until:
                    self._lines.drop(self.model)
                    return
                continue
            wanted = min(self._lines.free(), len(self.waiting), RESERVE_BLOCK)
            if wanted > 0:
                await self._ask(wanted)
            else:
                await self._pause(ASK_AGAIN_S)

    async def _ask(self, wanted: int) -> None:
        candidates = [self.waiting.popleft() for _ in range(wanted)]
        asked_at = time.monotonic()
        self.asking = wanted
        try:
            grant = await self._lines.limiter.reserve(self.model, [run.estimate for run in candidates])
        except (RedisError, OSError) as error:
            self._put_back(candidates)
            if self.bound != AWAY:
                log.warning("reserve_failed", error=type(error).__name__)
            self.bound = AWAY
            await asyncio.sleep(ASK_AGAIN_S)
            return
        finally:
            self.asking = 0
        granted = len(grant.reservations)
        self._put_back(candidates[granted:])
        for run, (reservation, delay_s) in zip(candidates, grant.reservations, strict=False):
            # The delay counts from when it was asked for: how long the answer was on its way nobody knows.
            self._lines.start(run, reservation, asked_at + delay_s)
        self._see(grant)
        if granted:
            self._lines.on_started(granted)
        if grant.bound in ("window", "concurrency"):
            await self._pause(grant.ask_again_s)
        elif grant.ask_again_s > 0:
            await asyncio.sleep(min(grant.ask_again_s, 1.0))

    def _put_back(self, runs: Iterable[Run]) -> None:
        """Jobs that got no reservation, but for those that were given back while the limiter was asked."""
        self.waiting.extendleft(run for run in reversed(list(runs)) if not run.over)

    def _see(self, grant: Grant) -> None:
        """Shuts the line while nobody may call: nothing is claimed for it, and what it holds others may have."""
        self.bound = grant.bound + (f" ({grant.detail})" if grant.detail else "")
        now = time.monotonic()
        if grant.bound == "gate":
            self.shut_until = self._lines.gate_until = now + grant.ask_again_s
            if grant.ask_again_s > SHUT_S:
                # At once: nobody claims on this account, and who opens the gate by hand need not wait.
                self._lines.give_back(self.model, 0.0)
        elif grant.bound == "retry_after":
            self.shut_until, self._lines.gate_until = now + grant.ask_again_s, 0.0
            if grant.ask_again_s > SHUT_S:
                self._lines.give_back(self.model, grant.ask_again_s)
        elif grant.detail:
            self.shut_until = self._lines.gate_until = now + PROBE_S  # until the probe's answer is settled
        else:
            self.shut_until = self._lines.gate_until = 0.0

    async def _pause(self, seconds: float) -> None:
        """Waits for a freed reservation or a new job, at most `seconds`."""
        self.wake.clear()
        try:
            async with asyncio.timeout(seconds):
                await self.wake.wait()
        except TimeoutError:
            return
