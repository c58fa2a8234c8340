"""The engine: one asyncio loop in a thread of its own that holds claimed jobs and makes their calls.

The way of a job here: a ring waits for room and claims (`ring`); the job waits in its model's line; a dispatcher reserves
a block of calls at the limiter; the call is made, judged, and ended, retried in place or given back; the flusher writes.

What goes wrong: Redis away, nothing is claimed or started, answers in memory are written when it is back. A lease is
lost: its jobs that wait are dropped, those in flight go on, because a paid answer is taken from anyone. Told to stop: no
more claims, calls in flight get their time, the rest is given back at once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from redis.exceptions import RedisError

from jobs import identity, leases
from jobs.leases import LEASE_S, Job
from jobs.settings import Settings
from worker.estimate import Estimates
from worker.flusher import Flusher
from worker.limiter import Grant, Limiter, Settlement
from worker.outcome import Outcome
from worker.run import Run
from worker.upstream import Upstream
from worker.verdict import Kind, Verdict, backoff, classify

#: Seconds a ring waits for room before it is dropped; the reaper rings again.
RING_WAIT_S = 60.0
#: Room is this many seconds of what the limiter lets through.
ROOM_S = 2.0
#: A wait longer than this leaves the engine: the job is scheduled in the store and its place is free.
LONG_WAIT_S = 10.0
#: Reservations asked for in one call.
RESERVE_BLOCK = 100
#: A reservation that is this late is not used.
LATE_S = 1.0
#: Seconds that nothing is claimed after a probe has gone out.
PROBE_S = 0.5
#: Seconds between looks at the limiter when something other than a rate bounds it.
ASK_AGAIN_S = 0.1

WHAT = {
    Kind.SUCCEEDED: "clean",
    Kind.REFUSED: "refused",
    Kind.FAILED: "clean",
}
GATES = {401: "key", 403: "forbidden", 402: "funds"}

log = structlog.get_logger("worker.engine")


class Line:
    """The jobs of one model that wait for their call."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.waiting: deque[Run] = deque()
        self.wake = asyncio.Event()
        self.shut_until = 0.0
        self.bound = ""  # what holds it back, for people: a limit, a gate and its reason, or nothing


class Engine:
    """Holds jobs and makes their calls, within one event loop; every method but `__init__` runs in it."""

    def __init__(
        self, settings: Settings, client: Any, results: Any | None, upstream: Upstream, worker_id: str
    ) -> None:
        self.settings = settings
        self.client = client
        self.upstream = upstream
        self.worker_id = worker_id
        self.account = identity.account_of(settings)
        self.limiter = Limiter(client, settings, self.account, worker_id)
        self.flusher = Flusher(client, results, self.limiter, self._on_settled, self._let_go)
        self.estimates = Estimates()
        self.stopping = False
        self.renewed_at = time.monotonic()
        self.held: dict[str, set[Run]] = {}  # by fencing token, all that are neither ended nor given back
        self._runs: dict[str, Run] = {}
        self.flying: dict[str, tuple[Run, asyncio.Task[None]]] = {}  # by reservation
        self._lines: dict[str, Line] = {}
        self._starts: deque[tuple[float, int]] = deque()
        self._room = asyncio.Event()
        self._claiming = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._labels = identity.served_labels(settings)
        self._compress = settings.result_compression == "gzip"

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs `work` as long as the engine; its failure is logged, because nothing else would see it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("engine_task_died", error=type(error).__name__, exc_info=error)

    # -- claiming

    async def ring(self, lane: str) -> int:
        """Answers one ring: claims up to a slice as room comes; returns how many jobs were accepted."""
        accepted = 0
        while accepted < self.settings.slice_size and not self.stopping:
            if not await self._wait_for_room():
                break
            async with self._claiming:
                wanted = min(self.room(), self.settings.slice_size - accepted)
                if wanted <= 0 or self.stopping:
                    continue
                try:
                    jobs = await leases.claim(self.client, self.worker_id, lane, self._labels, wanted)
                except (RedisError, OSError) as error:
                    log.warning("claim_failed", error=type(error).__name__)
                    break
                for job in jobs:
                    self._accept(job)
            if not jobs:
                break
            accepted += len(jobs)
        return accepted

    async def _wait_for_room(self) -> bool:
        """Whether there is room, waited for at most `RING_WAIT_S`."""
        end = time.monotonic() + RING_WAIT_S
        while (left := end - time.monotonic()) > 0 and not self.stopping:
            if self.room() > 0:
                return True
            self._room.clear()
            try:
                await asyncio.wait_for(self._room.wait(), min(left, ASK_AGAIN_S))
            except TimeoutError:
                continue
        return False

    def room(self) -> int:
        """How many more jobs may be claimed: about `ROOM_S` of what is started, none while the account is shut."""
        now = time.monotonic()
        shut_until = min((line.shut_until for line in self._lines.values()), default=0.0)
        if self.flusher.failing or now < shut_until or not self._fresh(now):
            return 0
        while self._starts and self._starts[0][0] < now - 1:
            self._starts.popleft()
        rate = float(sum(count for _, count in self._starts))
        least = float(self.settings.slice_size)
        if self.settings.rpm is not None:
            least = min(least, self.settings.rpm / 60 * ROOM_S)
        if shut_until:
            least = 1.0  # the probe
        target = max(least, rate * ROOM_S, 1)
        waiting = len(self._runs) - len(self.flying)
        return int(min(target, 2 * self.settings.worker_max_in_flight)) - waiting

    def _fresh(self, now: float) -> bool:
        """Whether the leases were renewed lately enough to start calls under them."""
        return now - self.renewed_at < LEASE_S * 2 / 3

    def _accept(self, job: Job) -> None:
        run = Run.of(job, self.settings.endpoint_path or self.settings.model)
        run.estimate = self.estimates.of(run)
        self._runs[job.job_id] = run
        self.held.setdefault(job.token, set()).add(run)
        self._enqueue(run)

    def _enqueue(self, run: Run) -> None:
        if run.over:
            return
        line = self._lines.get(run.model)
        if line is None:
            line = self._lines[run.model] = Line(run.model)
            self.spawn(self._dispatch(line))
        line.waiting.append(run)
        line.wake.set()

    @property
    def bounds(self) -> list[str]:
        """What holds the lines back at present."""
        return sorted({line.bound for line in self._lines.values() if (line.bound and line.waiting) or line.shut_until})

    # -- starting calls

    async def _dispatch(self, line: Line) -> None:
        """Starts the calls of one model as the limiter lets them through."""
        while True:
            if not line.waiting or self.stopping:
                line.wake.clear()
                await line.wake.wait()
                continue
            free = self.settings.worker_max_in_flight - len(self.flying)
            if free <= 0 or self.flusher.failing or not self._fresh(time.monotonic()):
                await self._pause(line, ASK_AGAIN_S)
                continue
            wanted = min(free, len(line.waiting), RESERVE_BLOCK)
            candidates = [line.waiting.popleft() for _ in range(wanted)]
            try:
                grant = await self.limiter.reserve(line.model, [run.estimate for run in candidates])
            except (RedisError, OSError):
                line.waiting.extendleft(reversed(candidates))
                await asyncio.sleep(ASK_AGAIN_S)
                continue
            granted = len(grant.reservations)
            line.waiting.extendleft(reversed(candidates[granted:]))
            for run, (reservation, delay_s) in zip(candidates, grant.reservations, strict=False):
                self._start(run, reservation, delay_s)
            line.bound = grant.bound + (f" ({grant.detail})" if grant.detail else "")
            self._see_gates(line, grant)
            if granted:
                self._starts.append((time.monotonic(), granted))
                self._room.set()
            if grant.bound in ("window", "concurrency"):
                await self._pause(line, grant.ask_again_s)
            elif grant.ask_again_s > 0:
                await asyncio.sleep(min(grant.ask_again_s, 1.0))

    async def _pause(self, line: Line, seconds: float) -> None:
        """Waits for a freed reservation or a new job, at most `seconds`."""
        line.wake.clear()
        try:
            await asyncio.wait_for(line.wake.wait(), seconds)
        except TimeoutError:
            return

    def _see_gates(self, line: Line, grant: Grant) -> None:
        """Shuts this line while nobody may call: nothing is claimed for it, and what it holds others may have."""
        if grant.bound in ("gate", "retry_after"):
            line.shut_until = time.monotonic() + grant.ask_again_s
            if grant.ask_again_s > ROOM_S:
                self._give_back(lambda run: run.model == line.model)
        elif grant.detail:
            line.shut_until = time.monotonic() + PROBE_S  # until the probe's answer is settled
        else:
            line.shut_until = 0.0

    def _start(self, run: Run, reservation: str, delay_s: float) -> None:
        if run.over:  # given back while the limiter was asked
            self._settle(run, reservation, "unused", None)
            return
        task = asyncio.get_running_loop().create_task(self._call(run, reservation, delay_s))
        self.flying[reservation] = (run, task)
        task.add_done_callback(self._ended)

    async def _call(self, run: Run, reservation: str, delay_s: float) -> None:
        due = time.monotonic() + delay_s
        called = False
        try:
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            now = time.monotonic()
            if now - due > LATE_S or self.stopping or not self._fresh(now) or run.over:
                self._settle(run, reservation, "unused", None)
                self._back_in_line(run)
                return
            called = True
            request = run.job.request
            outcome = await self.upstream.call(request.endpoint, bytes(request.body))
            verdict = classify(outcome, request.endpoint)
            what = WHAT.get(verdict.kind, "other")
            if verdict.kind is Kind.GATE:
                what = GATES.get(outcome.status or 0, "funds")
            tokens = outcome.usage.total_tokens if outcome.usage is not None else 0
            self._settle(run, reservation, what, tokens, outcome.retry_after_s, outcome.status)
            if outcome.usage is not None:
                self.estimates.learn(run, outcome.usage)
            self._judge(run, outcome, verdict)
        except asyncio.CancelledError:
            # Its batch was cancelled, or the drain's time is over.
            self._settle(run, reservation, "other" if called else "unused", None)
            self._hand_back(run, 0.0)
        finally:
            self.flying.pop(reservation, None)
            self._room.set()

    def _settle(
        self,
        run: Run,
        reservation: str,
        what: str,
        tokens: int | None,
        retry_after_s: float | None = None,
        status: int | None = None,
    ) -> None:
        back = 0
        if tokens:
            back = run.estimate - tokens
        elif what in ("unused", "refused"):
            back = run.estimate
        self.flusher.settle(run.model, Settlement(reservation, what, back, retry_after_s, status))

    # -- after the call

    def _judge(self, run: Run, outcome: Outcome, verdict: Verdict) -> None:
        kind = verdict.kind
        if kind in (Kind.SUCCEEDED, Kind.FAILED):
            self._finish(run, outcome, verdict)
            return
        if kind is Kind.GATE:
            run.add(outcome, verdict, self.account, 0.0)
            self._back_in_line(run)
            return
        if kind is Kind.REFUSED:
            run.refusals += 1
            wait_s = backoff(run.refusals, random.random, outcome.retry_after_s)
        else:
            most = run.job.max_attempts or self.settings.max_attempts
            if run.counted + 1 >= most:
                self._finish(run, outcome, verdict)
                return
            wait_s = backoff(run.counted + 1, random.random, outcome.retry_after_s)
        run.add(outcome, verdict, self.account, wait_s)
        if self.stopping or wait_s > LONG_WAIT_S:
            self._hand_back(run, wait_s)
        else:
            run.ready_at = time.monotonic() + wait_s
            asyncio.get_running_loop().call_later(wait_s, self._enqueue, run)

    def _finish(self, run: Run, outcome: Outcome, verdict: Verdict) -> None:
        run.over = True
        run.add(outcome, verdict, self.account, 0.0)
        self.flusher.end(run.end(outcome, verdict, self._compress))

    def _hand_back(self, run: Run, wait_s: float) -> None:
        """To the store, once; from here on nothing in this process starts the job."""
        if not run.over:
            run.over = True
            self.flusher.give_back(run.job, wait_s, run.attempts_json())

    def _back_in_line(self, run: Run) -> None:
        if run.over:
            return
        if self.stopping:
            self._hand_back(run, 0.0)
            return
        line = self._lines[run.model]
        line.waiting.appendleft(run)
        line.wake.set()

    def _on_settled(self) -> None:
        for line in self._lines.values():
            line.wake.set()

    def _let_go(self, jobs: list[Job]) -> None:
        """These jobs are no longer held here."""
        for job in jobs:
            run = self._runs.pop(job.job_id, None)
            if run is not None and (held := self.held.get(job.token)) is not None:
                held.discard(run)
                if not held:
                    del self.held[job.token]
        self._room.set()

    # -- leases and the end

    def lease_lost(self, tokens: set[str]) -> None:
        """Somebody else has these slices: what waits is dropped, what flies goes on."""
        flying = {id(run) for run, _ in self.flying.values()}
        for token in tokens:
            for run in self.held.pop(token, set()):
                self._runs.pop(run.job.job_id, None)
                run.over = run.over or id(run) not in flying
        for line in self._lines.values():
            line.waiting = deque(run for run in line.waiting if not run.over)
        if tokens:
            log.warning("leases_lost", slices=len(tokens))

    def abort(self, tokens: set[str]) -> None:
        """The batches of these slices are over: calls in flight are broken off, the rest given back."""
        for run, task in list(self.flying.values()):
            if run.job.token in tokens:
                task.cancel()
        self._give_back(lambda run: run.job.token in tokens)

    def give_back_waiting(self) -> None:
        """Gives back every job that is not in flight."""
        self._give_back(lambda run: True)

    def _give_back(self, which: Callable[[Run], bool]) -> None:
        flying = {id(run) for run, _ in self.flying.values()}
        now = time.monotonic()
        for run in list(self._runs.values()):
            if not run.over and id(run) not in flying and which(run):
                self._hand_back(run, max(0.0, run.ready_at - now))
        for line in self._lines.values():
            line.waiting = deque(run for run in line.waiting if not run.over)

    def stop(self) -> None:
        """No more claims and no more starts; what waits is given back."""
        if self.stopping:
            return
        self.stopping = True
        self._room.set()
        self.give_back_waiting()

    async def drain(self, seconds: float) -> None:
        """Stops, lets calls in flight end for at most `seconds`, writes everything down."""
        self.stop()
        tasks = [task for _, task in self.flying.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        left = [task for _, task in self.flying.values()]
        for task in left:
            task.cancel()
        if left:
            log.warning("drain_ran_out", calls_broken_off=len(left))
            await asyncio.wait(left, timeout=5)
        self.give_back_waiting()
        try:
            await asyncio.wait_for(self.flusher.flushed(), 10)
        except TimeoutError:
            log.error("drain_could_not_write")

    async def close(self) -> None:
        """Ends every task of the engine."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.upstream.aclose()
