"""The engine: one asyncio loop in a thread of its own that holds claimed jobs and makes their calls.

The way of a job here: a ring waits for room and claims (`intake`); the job waits in its model's line, for which the
limiter is asked for a block of calls (`line`); the call is made, judged, and ended, retried in place or given back; the
flusher writes.

What goes wrong: Redis away, nothing is claimed or started, answers in memory are written when it is back. Told to stop:
no more claims, calls in flight get their time, the rest is given back at once. A task of the engine dies: the worker
ends. Leases that are lost: see `holding`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import structlog

from jobs import identity
from jobs.backends import ResultBackend
from jobs.errors import StoreUnavailable
from jobs.keys import COMPLETE
from jobs.leases import LEASE_S, End, Job
from jobs.results import StoredResult
from jobs.settings import Settings
from worker import settlements
from worker.estimate import Estimates
from worker.flusher import Flusher
from worker.holding import Holding
from worker.intake import Intake
from worker.limiter import Limiter, Reservation
from worker.line import Lines
from worker.metrics import Counts
from worker.outcome import Outcome
from worker.outside import Outside
from worker.places import Places
from worker.run import Run, calls_of
from worker.upstream import Upstream
from worker.verdict import Kind, Policy, Verdict, backoff, classify

#: A wait longer than this leaves the engine: the job is scheduled in the store and its place is free.
LONG_WAIT_S = 10.0
#: A reservation that is this late is not used: limits.lua reckons with as much.
LATE_S = 0.5
#: Seconds that the drain waits for calls it has broken off, and for the store to take what is to be written: a restart of
#: Redis should cost no answer.
BREAK_OFF_S = 5.0
WRITE_S = 30.0

log = structlog.get_logger("worker.engine")


class Engine:
    """Holds jobs and makes their calls, within one event loop; every method but `__init__` runs in it.

    `backend` is where results are, None for the store's own Redis. `on_death` is called when a task of the engine has died,
    after which nothing more is claimed or started.
    """

    def __init__(
        self,
        settings: Settings,
        client: Any,
        backend: ResultBackend | None,
        upstream: Upstream,
        worker_id: str,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.upstream = upstream
        self.worker_id = worker_id
        self.account = identity.account_of(settings)
        self.limiter = Limiter(client, settings, self.account, worker_id)
        self.lines = Lines(self.limiter, self)
        self.intake = Intake(client, settings, worker_id, self.lines, self._may_start, self._waiting, self.welcome)
        self.outside = Outside(client, backend, settings.result_ttl_s) if backend is not None else None
        self.counts = Counts(settings)
        self.places = Places(client, self.limiter, self.lines.asks, self.lines.wake)
        self.flusher = Flusher(client, self.outside, self.places, self._let_go, self._told)
        self.estimates = Estimates(settings.estimate_completion_tokens)
        self._policy = Policy.of(settings)
        self.followed: Callable[[], None] = lambda: None  # told when something follows a job's end
        self.stopping = False
        self.renewed_at = time.monotonic()
        self.holding = Holding(self._write_back)
        self.flying: dict[str, tuple[Run, asyncio.Task[None]]] = {}  # by reservation
        self._held: Counter[tuple[str, str]] = Counter()  # the same by model and lane
        self.serves_interactive = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._drain: asyncio.Timeout | None = None
        self._hurried = False
        self._on_death = on_death
        self._compress = settings.result_compression == "gzip" and (backend is None or backend.compressed)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs `work` as long as the engine; its failure ends the engine, because half of one holds jobs for nothing."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("engine_task_died", error=type(error).__name__, exc_info=error)
            self.stop()
            self._on_death()

    # -- what is held

    async def ring(self, lane: str, claimed: list[tuple[str, int]] | None = None) -> int:
        """Answers one ring: claims up to a slice as room comes, into `claimed` too; returns how many jobs were accepted."""
        self.serves_interactive |= lane == "interactive"
        return await self.intake.ring(lane, claimed)

    def look(self, lane: str) -> None:
        """Claims as one ring would have it, without waiting for it."""

        async def ring() -> None:
            await self.ring(lane)

        self.spawn(ring())

    @property
    def bounds(self) -> list[str]:
        """What holds the lines back at present."""
        return [*self.lines.bounds, "quarantine"] if self.intake.withdrawn else self.lines.bounds

    def _may_start(self) -> bool:
        """Whether calls may start: the store takes what they bring, and leases were renewed lately enough."""
        fresh = time.monotonic() - self.renewed_at < LEASE_S * 2 / 3
        return fresh and not (self.stopping or self.flusher.failing or self.flusher.full)

    def free(self, lane: str) -> int:
        """How many more calls of the lane may start now; where interactive is served too some are kept from the others."""
        if not self._may_start():
            return 0
        most = self.settings.worker_max_in_flight
        if lane != "interactive" and self.serves_interactive:
            most = max(1, most - max(1, most // 20))
        return most - len(self.flying) - self.lines.asking

    def estimate(self, run: Run) -> int:
        """Tokens to reserve for a call of the job."""
        return self.estimates.of(run)

    def held(self, model: str, lane: str) -> int:
        """Calls of this model and lane that are in flight."""
        return self._held[model, lane]

    def started(self, count: int) -> None:
        """Calls were started, so there is room for others."""
        self.intake.started(count)

    def unused(self, model: str, reservations: list[tuple[Reservation, int]]) -> None:
        """Settles reservations, each with its tokens, that nobody will use."""
        for reservation, tokens in reservations:
            self.places.settle(model, settlements.unused(reservation, tokens))

    def _waiting(self, lane: str) -> int:
        """Jobs held that are not in flight; those that rest after a failure leave room for others, within reason."""
        if self.serves_interactive:
            return sum(run.job.lane == lane and not run.flying for run in self.holding)
        return len(self.holding) - len(self.flying) - min(len(self.holding.resting), self.settings.worker_max_in_flight)

    async def welcome(self, jobs: list[Job]) -> None:
        """Takes claimed jobs in. What a dead worker had paid for and stored outside is not called again."""
        answers: dict[str, StoredResult] = {}
        if self.outside is not None:
            try:
                answers = await self.outside.answers([job for job in jobs if job.crashes])
            except StoreUnavailable as error:
                # Not given back, which would forget that they have seen a crash: their leases run out.
                log.warning("results_away", error=type(error).__name__)
                return
        for job in jobs:
            stored = answers.get(job.job_id)
            if stored is None or not self._end_stored(job, stored):
                self._accept(job)

    def _end_stored(self, job: Job, stored: StoredResult) -> bool:
        """Ends a job with the success that is stored for it, if it is one."""
        if stored.status != "SUCCESS" or stored.mimoq is None:
            return False
        run = Run.of(job, self.settings.endpoint_path or self.settings.model)
        run.over = True
        self.holding.add(run)
        # Its record has what was told before as well, and what is told here for the dead worker.
        calls = calls_of(stored.mimoq.attempts) - run.before[0]
        self.flusher.end(End(job, "s", b"", max(calls, 0), stored.mimoq.usage - run.before[1]))
        return True

    def _accept(self, job: Job) -> None:
        run = Run.of(job, self.settings.endpoint_path or self.settings.model)
        self.holding.add(run)
        if job.poison:
            log.error("job_is_poison", job=job.job_id)
            run.over = True
            outcome = Outcome(started_at=time.time(), error="poison")
            self.flusher.end(run.end(outcome, Verdict(Kind.FAILED, "poison"), self._compress))
            return
        self._queue(run, first=job.leads)

    def _queue(self, run: Run, first: bool = False) -> None:
        """Into its line, unless its end or its way back is decided."""
        self.holding.resting.discard(run)
        if self.stopping or run.lost:
            self.holding.hand_back(run)
        elif not run.over:
            run.waits_since = run.waits_since or time.monotonic()
            self.lines.add(run, first)

    def _told(self, end: End, word: str) -> None:
        """What the store said of a job's end."""
        self.counts.told(self.holding.find(end.job), end, word)
        if end.job.lane == COMPLETE:  # somebody's pipeline goes on with it
            self.followed()

    def _let_go(self, jobs: list[Job]) -> None:
        self.holding.let_go(jobs)
        self.intake.stir()

    # -- one call

    def start(self, run: Run, reservation: Reservation, due: float) -> None:
        """Makes a call, due at this monotonic time."""
        if run.over:  # given back while the limiter was asked
            self.places.settle(run.model, settlements.unused(reservation, run.estimate))
            return
        run.flying = True
        task = asyncio.get_running_loop().create_task(self._call(run, reservation, due))
        self.flying[reservation.id] = (run, task)
        self._held[run.model, run.job.lane] += 1
        task.add_done_callback(partial(self._landed, run, reservation))

    def _landed(self, run: Run, reservation: Reservation, _: asyncio.Task[None]) -> None:
        name = run.model, run.job.lane
        self._held[name] -= 1
        if not self._held[name]:  # submitters name models, as many as they like
            del self._held[name]
        if reservation.id in self.flying:  # cancelled before its first step
            del self.flying[reservation.id]
            run.flying = False
            self.places.settle(run.model, settlements.unused(reservation, run.estimate))
            self.holding.hand_back(run)

    async def _call(self, run: Run, reservation: Reservation, due: float) -> None:
        called = 0.0  # unix time
        try:
            delay_s = due - time.monotonic()
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            late = time.monotonic() - due > LATE_S
            if run.over or run.lost or late or self.lines.held(run.model) or not self._may_start():
                self.places.settle(run.model, settlements.unused(reservation, run.estimate))
                self._queue(run, first=True)
                return
            self.counts.started(run)
            called, run.waits_since = time.time(), 0.0
            request = run.job.request
            outcome = await self.upstream.call(request.endpoint, request.body)
            verdict = classify(outcome, request.endpoint, self._policy)
            self._settle(run, reservation, outcome, verdict)
            self._judge(run, outcome, verdict, reservation.probe)
        except asyncio.CancelledError:
            # Its batch was cancelled, or the drain's time is over.
            end = settlements.broken_off(reservation) if called else settlements.unused(reservation, run.estimate)
            self.places.settle(run.model, end)
            outcome = Outcome(started_at=called, latency_s=time.time() - called, error="aborted", sent=True)
            verdict = Verdict(Kind.RETRY, "aborted", maybe_billed=True)
            if called and not run.over:
                run.add(outcome, verdict, self.account, 0.0, counted=False)
            self.holding.hand_back(run)
        except Exception as error:
            # A fault of ours, which the next call of this job would meet again, paid for again.
            log.error("call_died", job=run.job.job_id, error=type(error).__name__, exc_info=error)
            self.places.settle(run.model, settlements.broken_off(reservation))
            outcome = Outcome(started_at=time.time(), error="internal_error", sent=bool(called))
            verdict = Verdict(Kind.FAILED, "internal_error", maybe_billed=bool(called))
            self._finish(run, outcome, verdict)
        finally:
            del self.flying[reservation.id]
            run.flying = False
            if called:
                self.counts.call(run, outcome, verdict)

    def _settle(self, run: Run, reservation: Reservation, outcome: Outcome, verdict: Verdict) -> None:
        """Lets limiter and estimates learn from a call."""
        settlement = settlements.of_call(reservation, run.estimate, outcome, verdict, first=run.counted == 0)
        if outcome.retry_after_asked_s is not None:
            log.warning("retry_after_capped", asked_s=outcome.retry_after_asked_s, used_s=outcome.retry_after_s)
        if outcome.retry_after_s and settlement.what != "clean":
            self.lines.hold(run.model, outcome.retry_after_s)
        if outcome.rate_limits:
            self.places.tell(run.model, settlements.told(reservation.at_ms, outcome.rate_limits))
        self.places.settle(run.model, settlement)
        if outcome.usage is not None and outcome.error is None:
            self.estimates.learn(run, outcome.usage)

    # -- after the call

    def _judge(self, run: Run, outcome: Outcome, verdict: Verdict, probe: bool = False) -> None:
        kind = verdict.kind
        if kind in (Kind.SUCCEEDED, Kind.FAILED):
            self._finish(run, outcome, verdict)
            return
        if kind is Kind.GATE:
            self.counts.again(verdict)
            run.add(outcome, verdict, self.account, 0.0)
            self._queue(run, first=True)
            return
        # What a shut gate's probe meets is the gate's business.
        counted = kind is Kind.RETRY and not (probe and settlements.failed(outcome, verdict))
        if counted and run.counted + 1 >= (run.job.max_attempts or self.settings.max_attempts):
            self._finish(run, outcome, verdict)
            return
        self.counts.again(verdict)
        attempt = run.counted + 1 if kind is Kind.RETRY else run.refusals + 1
        wait_s = backoff(attempt, random.random, outcome.retry_after_s)
        run.add(outcome, verdict, self.account, wait_s, counted=counted)
        if self.stopping or run.lost or wait_s > LONG_WAIT_S:
            self.holding.hand_back(run, wait_s)
        else:
            run.ready_at = time.monotonic() + wait_s
            self.holding.resting.add(run)
            asyncio.get_running_loop().call_later(wait_s, self._queue, run)

    def _finish(self, run: Run, outcome: Outcome, verdict: Verdict) -> None:
        if run.over:
            return
        run.add(outcome, verdict, self.account, 0.0)
        if run.lost and verdict.kind is not Kind.SUCCEEDED:
            self.holding.hand_back(run)  # only a paid answer is taken from one who lost the lease
            return
        end = run.end(outcome, verdict, self._compress)
        run.over = True
        self.flusher.end(end)

    def _write_back(self, run: Run, wait_s: float) -> None:
        self.flusher.give_back(run.back(wait_s))

    # -- leases and the end

    def lease_lost(self, tokens: set[str]) -> None:
        """Somebody else has these slices: what waits is dropped, what flies goes on."""
        self.counts.lost(self.holding.lose(tokens))
        self.lines.sift()

    def abort(self, tokens: set[str]) -> None:
        """The batches of these slices are over: calls in flight are broken off, the rest given back."""
        for run, task in list(self.flying.values()):
            if run.job.token in tokens:
                task.cancel()
        self.give_back_of(tokens)

    def give_back_of(self, tokens: set[str]) -> None:
        """Gives back the jobs of these slices that are not in flight, as when their batch is paused."""
        self._give_back(lambda run: run.job.token in tokens)

    def give_back_bystanders(self) -> None:
        """Gives back what waits beside jobs in quarantine, for which everything else makes room."""
        self._give_back(lambda run: not run.job.alone)

    def give_back_waiting(self) -> None:
        """Gives back every job that is not in flight."""
        self._give_back(lambda run: True)

    def model_shut(self, model: str, seconds: float) -> None:
        """Nobody may call this model for a while: others may have its jobs, after `seconds`."""
        self._give_back(lambda run: run.model == model, seconds)

    def _give_back(self, which: Callable[[Run], bool], least_s: float = 0.0) -> None:
        self.holding.give_back(which, least_s)
        self.lines.sift()

    def stop(self) -> None:
        """No more claims and no more starts; what waits is given back."""
        if self.stopping:
            return
        self.stopping = True
        self.intake.stop()
        self.give_back_waiting()

    async def drain(self, seconds: float) -> bool:
        """Stops, lets calls in flight end for at most `seconds`, writes everything down; whether that could be done."""
        self.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.0 if self._hurried else seconds) as self._drain:
                while self.flying:
                    await asyncio.wait([task for _, task in self.flying.values()])
        self._drain = None
        left = [task for _, task in self.flying.values()]
        for task in left:
            task.cancel()
        if left:
            log.warning("drain_ran_out", calls_broken_off=len(left))
            await asyncio.wait(left, timeout=BREAK_OFF_S)
        try:
            async with asyncio.timeout(WRITE_S):
                async with self.intake.claiming:
                    self.give_back_waiting()  # also what a claim brought that was on its way
                await self.flusher.flushed()
        except TimeoutError:
            log.error("drain_could_not_write")
            return False
        return True

    def hurry(self) -> None:
        """The time of the drain, under way or to come, is over now."""
        self._hurried = True
        if self._drain is not None and not self._drain.expired():
            self._drain.reschedule(asyncio.get_running_loop().time())

    async def close(self) -> None:
        """Ends every task of the engine."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            # Again and again: a cancellation that meets the end of a command is lost in redis-py.
            await asyncio.wait(self._tasks, timeout=0.2)
        await self.upstream.aclose()
