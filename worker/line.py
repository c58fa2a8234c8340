"""The lines: claimed jobs that wait for their call, one line a model and lane, and who asks the limiter for them.

What goes wrong: Redis away, a line asks again later. While nobody may call for long, its jobs are given back, so that
nothing waits in a worker for a gate to open; the line looks for one when it is time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
from redis.exceptions import RedisError

from jobs.leases import Job
from jobs.scripts import Call
from worker.holding import BEHIND_S
from worker.limiter import Grant, Limiter, Reservation
from worker.run import Run

#: Reservations asked for in one call.
RESERVE_BLOCK = 100
#: Seconds between looks at the limiter when something other than a rate bounds it.
ASK_AGAIN_S = 0.1
#: Seconds between looks at a gate that an answer may open at any time, and at anything else.
GATE_LOOK_S = 0.25
LOOK_S = 1.0
#: Jobs are given back when their account is shut, or their model, for longer than this.
ACCOUNT_SHUT_S = 1.5
MODEL_SHUT_S = 10.0
#: Seconds after a gate when jobs have come back that had been called before it shut, and those that had not.
LOOKS_S = (BEHIND_S - 0.05, BEHIND_S + 0.1)
#: Seconds that nothing is claimed after a probe has gone out.
PROBE_S = 0.5
#: Seconds after which a line without jobs ends.
IDLE_S = 10.0
#: What bounds a line while the limiter can't be asked.
AWAY = "store_away"
#: What bounds one that waits for a place in flight.
PLACES = ("window", "concurrency")
#: What a line is granted that has not asked.
NOTHING = Grant([], 0.0, "", "")

log = structlog.get_logger("worker.line")


class Caller(Protocol):
    """Who makes the calls: the engine, as the lines see it."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> object:
        """Runs `work` as long as the engine."""

    def free(self, lane: str) -> int:
        """How many more calls of the lane may start now."""

    def estimate(self, run: Run) -> int:
        """Tokens to reserve for a call of the job."""

    def start(self, run: Run, reservation: Reservation, due: float) -> None:
        """Makes a call, due at this monotonic time."""

    def held(self, model: str, lane: str) -> int:
        """Calls of this model and lane that are in flight."""

    def started(self, count: int) -> None:
        """So many calls have been started."""

    def unused(self, model: str, reservations: list[tuple[Reservation, int]]) -> None:
        """Settles reservations, each with its tokens, that nobody will use."""

    def lease_lost(self, tokens: set[str]) -> None:
        """Somebody else has these slices: what waits of them is dropped."""

    def give_back_of(self, tokens: set[str]) -> None:
        """Gives back what waits of these slices: their batch is stopped."""

    def model_shut(self, model: str, seconds: float) -> None:
        """Nobody may call this model for so long: gives its jobs back, to be called after `seconds`."""

    def look(self, lane: str) -> None:
        """Claims for a lane without waiting for a ring."""


class Lines:
    """The lines of one account."""

    def __init__(self, limiter: Limiter, caller: Caller) -> None:
        self.limiter = limiter
        self.caller = caller
        self.gate_until = 0.0  # of the account, as whichever line looked last has seen it
        self._lines: dict[tuple[str, str], Line] = {}
        self._asked: set[Line] = set()  # with what is being settled
        self._not_before: dict[str, float] = {}  # by model: what an upstream has just asked for here

    def add(self, run: Run, first: bool = False) -> None:
        """Puts a job into the line of its model and lane."""
        name = run.model, run.job.lane
        line = self._lines.get(name)
        if line is None:
            line = self._lines[name] = Line(*name, self)
            self.caller.spawn(line.live())
        (line.ahead if first else line.waiting).append(run)
        if not line.wants_place or line.jobs == 1:  # else it waits for what another job does not bring
            line.wake.set()

    def ahead(self, lane: str) -> int:
        """How many jobs of the lane come first, whatever else waits."""
        return sum(len(line.ahead) for line in self._lines.values() if line.lane == lane)

    def sift(self) -> None:
        """Takes out what is no longer to be called."""
        for line in self._lines.values():
            line.ahead = deque(run for run in line.ahead if not run.over)
            line.waiting = deque(run for run in line.waiting if not run.over)

    def asks(self, freed: Mapping[str, int]) -> list[Ask]:
        """What the lines that wait for a place ask for when so many of each model are freed; interactive ones first.

        For twice as many, since what frees them may also widen the window.
        """
        found = []
        for line in sorted(self._lines.values(), key=lambda line: line.lane != "interactive"):
            if line.wants_place and (count := 2 * freed.get(line.model, 0)):
                wanted = min(self.caller.free(line.lane), line.jobs, count, RESERVE_BLOCK)
                if wanted > 0:
                    found.append(line.ask(wanted))
        self._asked = {ask.line for ask in found}
        return found

    def wake(self) -> None:
        """Reservations were freed: who has not asked with that looks at the limiter again."""
        for line in self._lines.values():
            if line not in self._asked:
                line.wake.set()
        self._asked = set()

    def drop(self, model: str, lane: str) -> None:
        """A line has ended."""
        del self._lines[model, lane]

    def hold(self, model: str, seconds: float) -> None:
        """The upstream asked for a pause: calls that have their reservation and have not gone yet do not go."""
        self._not_before[model] = max(self._not_before.get(model, 0.0), time.monotonic() + seconds)

    def held(self, model: str) -> bool:
        """Whether the upstream asked for a pause that is not over."""
        until = self._not_before.get(model)
        if until is not None and time.monotonic() >= until:
            del self._not_before[model]
            return False
        return until is not None

    def account_open(self) -> None:
        """Somebody has opened the account's gate, or wants it probed: nobody waits for the time seen last."""
        if self.gate_until > time.monotonic():
            self.gate_until = time.monotonic()
            for line in self._lines.values():
                line.shut_until = min(line.shut_until, self.gate_until)
                line.wake.set()

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
        return sorted({line.bound for line in lines if line.bound and (line.jobs or line.shut_until)})


@dataclass(frozen=True, slots=True)
class Ask:
    """What a line asks of the limiter, at this monotonic time, for the jobs it took out."""

    line: Line
    limiter: Limiter
    candidates: list[Run]
    prefix: str
    at: float

    @property
    def what(self) -> tuple[str, str, str, list[int], list[Job], int]:
        """What `Limiter.reserve` is asked."""
        estimates, jobs = [run.estimate for run in self.candidates], [run.job for run in self.candidates]
        return self.line.model, self.line.lane, self.prefix, estimates, jobs, self.line.held

    @property
    def call(self) -> Call:
        """The same, to be asked with other calls."""
        return self.limiter.reserve_call(*self.what)

    def answered(self, reply: list[Any]) -> None:
        """The script's reply."""
        self.line.answered(self, self.limiter.granted(self.prefix, reply))
        if not self.line.wants_place:
            self.line.wake.set()

    def lost(self, error: BaseException) -> None:
        """Nobody knows whether it has arrived."""
        self.line.lost(self, error)
        self.line.wake.set()


class Line:
    """The jobs of one model and lane that wait for their call."""

    def __init__(self, model: str, lane: str, lines: Lines) -> None:
        self.model = model
        self.lane = lane
        self.ahead: deque[Run] = deque()  # those that come first, whatever else waits
        self.waiting: deque[Run] = deque()
        self.wake = asyncio.Event()
        self.asking = 0
        self._grant = NOTHING  # the last
        self._full = False  # this worker, by what was asked for last
        self.shut_until = 0.0
        self._looks: list[float] = []  # when to look, after a gate, for what is given back; nobody rings for it
        self.bound = ""  # what holds it back, for people: a limit, the reason of a gate, or nothing
        self._lines = lines
        self._caller = lines.caller

    @property
    def jobs(self) -> int:
        """Jobs that wait."""
        return len(self.ahead) + len(self.waiting)

    @property
    def held(self) -> int:
        """Its calls in flight."""
        return self._caller.held(self.model, self.lane)

    @property
    def wants_place(self) -> bool:
        """Whether it waits for a place in flight, and asks as soon as some are settled here."""
        grant = self._grant
        return not grant.shut and (grant.bound in PLACES or (not grant.bound and self._full))

    async def live(self) -> None:
        """Starts calls as the limiter lets them through, until there have been no jobs for a while."""
        while True:
            if not self.jobs and self.shut_until:
                await self._pause(max(self.shut_until - time.monotonic(), 0.01))
                now = time.monotonic()
                if not self.jobs and now >= self.shut_until:
                    # The gate may be open, or want a probe. Should nothing be left to claim, the line ends as any other.
                    self.shut_until = 0.0
                    if now >= self._lines.gate_until:
                        self._lines.gate_until = 0.0
                    self._caller.look(self.lane)
                    self._looks = [now + seconds for seconds in LOOKS_S]
                continue
            if not self.jobs and self._looks:
                await self._pause(max(self._looks[0] - time.monotonic(), 0.01))
                if not self.jobs and self._looks and time.monotonic() >= self._looks[0]:
                    self._looks.pop(0)
                    self._caller.look(self.lane)
                continue
            if not self.jobs:
                # What is asked for may come back without a place, and wait as any other.
                if not await self._pause(ASK_AGAIN_S if self.asking else IDLE_S) and not self.jobs and not self.asking:
                    self._lines.drop(self.model, self.lane)
                    return
                continue
            wanted = min(self._caller.free(self.lane), self.jobs, RESERVE_BLOCK)
            if wanted > 0:
                await self._ask(wanted)
            else:
                await self._pause(ASK_AGAIN_S)

    async def _ask(self, wanted: int) -> None:
        ask = self.ask(wanted)
        try:
            grant = await ask.limiter.reserve(*ask.what)
        except (RedisError, OSError) as error:
            self.lost(ask, error)
            await asyncio.sleep(ASK_AGAIN_S)
            return
        self.answered(ask, grant)
        while self.wants_place:
            grant = self._grant
            if await self._pause(ASK_AGAIN_S) or self._grant is grant or not self.jobs:
                return
        grant = self._grant
        if grant.shut:
            await asyncio.sleep(min(grant.ask_again_s, GATE_LOOK_S if grant.bound != "retry_after" else LOOK_S))
        elif grant.ask_again_s > 0:
            await asyncio.sleep(min(grant.ask_again_s, LOOK_S))

    def ask(self, wanted: int) -> Ask:
        """Takes out so many jobs to ask for their calls; `answered` or `lost` is to follow."""
        self._full = wanted >= self._caller.free(self.lane)
        candidates = [(self.ahead or self.waiting).popleft() for _ in range(wanted)]
        for run in candidates:
            run.estimate = self._caller.estimate(run)
        self.asking += wanted
        limiter = self._lines.limiter
        return Ask(self, limiter, candidates, limiter.ids(self.lane), time.monotonic())

    def lost(self, ask: Ask, error: BaseException) -> None:
        """It may have arrived, and what it granted would stand there as in flight."""
        self.asking -= len(ask.candidates)
        granted = [Reservation(f"{ask.prefix}.{i}", 0.0, 0, False) for i in range(1, len(ask.candidates) + 1)]
        unused = [(item, run.estimate) for item, run in zip(granted, ask.candidates, strict=True)]
        self._caller.unused(self.model, unused)
        self._put_back(ask.candidates)
        self._grant, self._full = NOTHING, False
        if self.bound != AWAY:
            log.warning("reserve_failed", error=type(error).__name__)
        self.bound = AWAY

    def answered(self, ask: Ask, grant: Grant) -> None:
        """Starts the calls that were let through."""
        self.asking -= len(ask.candidates)
        candidates = ask.candidates
        self._grant = grant
        granted = len(grant.reservations)
        passed_over = grant.gone | grant.stopped
        self._put_back(candidates[granted + len(passed_over) :])
        if passed_over:
            self._caller.lease_lost({candidates[place].job.token for place in grant.gone})
            self._caller.give_back_of({candidates[place].job.token for place in grant.stopped})
            candidates = [run for place, run in enumerate(candidates) if place not in passed_over]
        for run, reservation in zip(candidates, grant.reservations, strict=False):
            # The delay counts from when it was asked for: how long the answer was on its way nobody knows.
            self._caller.start(run, reservation, ask.at + reservation.delay_s)
        self._see(grant)
        if granted:
            self._caller.started(granted)

    def _put_back(self, runs: Iterable[Run]) -> None:
        """Jobs that got no reservation, but for those that were given back while the limiter was asked."""
        for run in reversed(list(runs)):
            if not run.over:
                (self.ahead if run.job.leads else self.waiting).appendleft(run)

    def _see(self, grant: Grant) -> None:
        """Shuts the line while nobody may call: nothing is claimed for it, and what it holds others may have."""
        self.bound = grant.bound
        if not grant.shut:
            if self.shut_until:
                self._caller.look(self.lane)
            self.shut_until = self._lines.gate_until = 0.0
            return
        # With a probe out, until its answer is settled.
        self.shut_until = time.monotonic() + (PROBE_S if grant.reservations else grant.ask_again_s)
        if grant.shut == "account":
            self._lines.gate_until = self.shut_until
            if grant.ask_again_s > ACCOUNT_SHUT_S:
                # At once: nobody claims on this account, and who opens the gate by hand need not wait.
                self._caller.model_shut(self.model, 0.0)
        else:
            self._lines.gate_until = 0.0
            if grant.ask_again_s > MODEL_SHUT_S:
                self._caller.model_shut(self.model, grant.ask_again_s)

    async def _pause(self, seconds: float) -> bool:
        """Waits for a freed reservation or a new job, at most `seconds`; whether there was one, also before."""
        try:
            async with asyncio.timeout(seconds):
                await self.wake.wait()
        except TimeoutError:
            return False
        self.wake.clear()
        return True
