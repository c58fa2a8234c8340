"""`/metrics`: the totals of all processes, the state of the store, and what this API process has counted itself.

What goes wrong: the store does not answer within two seconds. Then `mimoq_store_up` is 0, of the store there is nothing,
and what this process knows of itself is told all the same. A broker that does not answer is waited for one second in ten.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import structlog

from jobs import identity, keys
from jobs.connections import redis_errors
from jobs.errors import MimoqError
from jobs.exposition import families, process, render
from jobs.limits import all_limits
from jobs.metrics import (
    BATCHES,
    DELIVERIES,
    FOLLOWUPS,
    FOLLOWUPS_PENDING,
    GATE_PROBE,
    GATE_SHUT,
    HTTP_REQUESTS,
    HTTP_TIME,
    IN_FLIGHT,
    JOBS,
    LIMIT_ALLOWED,
    LIMIT_USED,
    LIMIT_UTILISATION,
    NEXT,
    OLDEST_READY,
    OPEN_BATCHES,
    OPEN_BATCHES_READ,
    PIPELINE_MESSAGES,
    READY_JOBS,
    STORE_UP,
    WEBHOOKS_DEAD,
    WEBHOOKS_PENDING,
    WORKERS,
    Metric,
)
from jobs.outbox import dead_count
from jobs.scripts import Script
from jobs.settings import Settings
from jobs.tally import Cell, Names, Tally, totals
from jobs.workers import live_workers

if TYPE_CHECKING:
    import redis

#: Seconds that a look at the store serves every scrape.
CACHED_S = 1.0
#: Seconds a scrape waits for the store.
PATIENCE_S = 2.0
#: Seconds that a look at the broker serves every scrape, and that scrapes wait for one, counted from its beginning.
BROKER_CACHED_S = 10.0
BROKER_PATIENCE_S = 1.0
#: Batches that are looked at in one step, for a script keeps everyone else waiting; and seconds for all steps: what a busy
#: store does not tell in time is left out, before a scrape takes it for being away.
STEP = 200
STEPS_S = 1.0

_census = Script("census")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

log = structlog.get_logger("api.metrics")


class Counts:
    """What an API process counts."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def request(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """A request was answered; `route` is the template of its path, None where no route fits."""
        template = route or "none"
        self._tally.add(HTTP_REQUESTS, template, method if method in _METHODS else "other", str(status))
        self._tally.observe(HTTP_TIME, seconds, template)

    def delivery(self, result: str) -> None:
        """An attempt to deliver a webhook: `delivered`, `failed` or `dead`."""
        self._tally.add(DELIVERIES, result)


class Scrapes:
    """Answers scrapes of one API process, from looks at the store that are shared.

    `client` is a sync client of the store, used in a thread; `depth(lane, upstream)` tells how many messages wait on a
    lane's queue, as `jobs.broker.Bell` does, and is used in a thread too. Without it nothing is told of the broker.
    """

    def __init__(
        self, client: redis.Redis, settings: Settings, tally: Tally, depth: Callable[[str, str], int] | None = None
    ) -> None:
        self._client = client
        self._settings = settings
        self._tally = tally
        self._pipelines = Pipelines(depth, identity.label(settings)) if depth is not None else None
        self._look: asyncio.Task[dict[Cell, float]] | None = None
        self._began = 0.0

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The text and its content type; `accept` is the request's Accept header. Never fails for the store's sake."""
        store = await self._store()
        if self._pipelines is not None and store.get((STORE_UP.name,)):
            store = store | await self._pipelines.messages()
        own = dict(self._tally.cells)
        return await asyncio.to_thread(_text, store, own, accept)

    async def _store(self) -> dict[Cell, float]:
        """What the last look has found, if it is new enough, else what the next one does; one at a time."""
        look = self._look
        if look is None or (look.done() and time.monotonic() - self._began >= CACHED_S):
            self._began = time.monotonic()
            look = self._look = asyncio.create_task(asyncio.to_thread(self._read))
        done, _ = await asyncio.wait([look], timeout=PATIENCE_S)
        return look.result() if done else {(STORE_UP.name,): 0}

    def _read(self) -> dict[Cell, float]:
        try:
            return read(self._client, self._settings)
        except MimoqError as error:
            log.warning("metrics_without_store", reason=str(error))
            return {(STORE_UP.name,): 0}


class Pipelines:
    """Looks at the queue of pipelines, one look at a time. One that hangs keeps a thread, and no scrape but the first."""

    def __init__(self, depth: Callable[[str, str], int], upstream: str) -> None:
        self._depth = depth
        self._upstream = upstream
        self._look: asyncio.Task[dict[Cell, float]] | None = None
        self._began = 0.0

    async def messages(self) -> dict[Cell, float]:
        """How many wait; empty while the broker does not answer, or not in time."""
        look, now = self._look, time.monotonic()
        if look is None or (look.done() and now - self._began >= BROKER_CACHED_S):
            self._began = now
            look = self._look = asyncio.create_task(asyncio.to_thread(self._read))
        done, _ = await asyncio.wait([look], timeout=max(0.0, self._began + BROKER_PATIENCE_S - now))
        return look.result() if done else {}

    def _read(self) -> dict[Cell, float]:
        try:
            return {(PIPELINE_MESSAGES.name, keys.COMPLETE): self._depth(keys.COMPLETE, self._upstream)}
        except MimoqError as error:
            log.warning("metrics_without_broker", reason=str(error))
            return {}


def _text(store: dict[Cell, float], own: dict[Cell, float], accept: str) -> tuple[bytes, str]:
    return render([*families("store", store), *families("api", own), *process()], accept)


def read(client: redis.Redis, settings: Settings) -> dict[Cell, float]:
    """Every metric of the store, as cells. Raises `StoreUnavailable`."""
    any_client: Any = client
    with redis_errors():
        pipe = any_client.pipeline(transaction=False)
        pipe.time()
        pipe.hgetall(keys.METRICS)
        pipe.zcard(keys.OPEN)
        pipe.zcard(keys.OUTBOX)
        pipe.zcard(keys.FOLLOWUPS)
        (seconds, micros), raw, open_batches, pending, followups = pipe.execute()
        now = seconds + micros / 1e6
        # Prometheus sees no increase where a series begins with its first count: the first one given up would alert nobody.
        cells: dict[Cell, float] = {(FOLLOWUPS.name, result): 0 for result in ("done", "failed", "given_up")}
        cells |= totals(raw)
        cells |= {
            (STORE_UP.name,): 1,
            (OPEN_BATCHES.name,): open_batches,
            (WEBHOOKS_PENDING.name,): pending,
            (FOLLOWUPS_PENDING.name,): followups,
            (WEBHOOKS_DEAD.name,): dead_count(client),
        }
        cells |= _jobs(any_client, now, open_batches)
    cells |= _limits(client, settings, now)
    serving = Counter(lane for worker in live_workers(client) for lane in worker.lanes)
    cells |= {(WORKERS.name, lane): serving[lane] for lane in keys.SERVED}
    return cells


def _jobs(client: Any, now: float, open_batches: int) -> dict[Cell, float]:
    """The figures of the oldest open batches; of lanes whose ready jobs are all in younger ones, those of the next there."""
    cells: dict[Cell, float] = {(OPEN_BATCHES_READ.name,): 0}
    for lane in keys.SERVED:
        cells |= {(JOBS.name, state, lane): 0 for state in ("queued", "running")}
        cells |= {(metric.name, lane): 0 for metric in (READY_JOBS, OLDEST_READY)}
    end = time.monotonic() + STEPS_S
    for looked_at, lanes in _steps(client, BATCHES, ""):
        cells[OPEN_BATCHES_READ.name,] += looked_at
        for lane, queued, running, _, _ in lanes:
            cells[JOBS.name, "queued", lane] += queued
            cells[JOBS.name, "running", lane] += running
        _ready(cells, lanes, now)
        if time.monotonic() >= end:
            break
    if cells[OPEN_BATCHES_READ.name,] < open_batches:
        for lane in keys.SERVED:
            if not cells[READY_JOBS.name, lane]:
                for _, lanes in _steps(client, NEXT, lane):
                    _ready(cells, lanes, now)
    return cells


def _steps(client: Any, most: int, lane: str) -> Iterator[tuple[int, list[tuple[str, int, int, int, bytes]]]]:
    """What census.lua finds, step by step, in at most so many batches: how many they were, and the rows of lanes."""
    for first in range(0, most, STEP):
        looked_at, *rows = _census(client, [keys.PREFIX], [first, min(STEP, most - first), lane])
        if not looked_at:
            break
        yield looked_at, [(name.decode(), *numbers) for name, *numbers in rows]


def _ready(cells: dict[Cell, float], lanes: list[tuple[str, int, int, int, bytes]], now: float) -> None:
    for lane, _, _, ready, oldest in lanes:
        cells[READY_JOBS.name, lane] += ready
        cells[OLDEST_READY.name, lane] = max(cells[OLDEST_READY.name, lane], now - float(oldest or now))


def _limits(client: redis.Redis, settings: Settings, now: float) -> dict[Cell, float]:
    """What several models share because their names are no labels is added up, but for the time of a probe."""
    found, gates = all_limits(client, settings)
    cells: dict[Cell, float] = {}
    names = Names(settings.model)

    def add(metric: Metric, amount: float, *labels: str) -> None:
        cell = (metric.name, *labels)
        cells[cell] = cells.get(cell, 0) + amount

    for item in found:
        who = item.account, names(item.model)
        for lane, count in item.in_flight.items():
            add(IN_FLIGHT, count, *who, lane)
        for limit, level in item.limits.items():
            add(LIMIT_USED, level.used, *who, limit)
            if level.allowed is not None:
                add(LIMIT_ALLOWED, level.allowed, *who, limit)
        if item.gate is not None:
            gates.append(item.gate)
    for gate in gates:
        model = "" if gate.model is None else names(gate.model)
        cells[GATE_SHUT.name, gate.account, model, gate.reason] = 1
        probe = (GATE_PROBE.name, gate.account, model)
        cells[probe] = max(cells.get(probe, 0.0), gate.wait_s(now))
    return cells | dict(_utilisations(cells))


def _utilisations(cells: dict[Cell, float]) -> Iterator[tuple[Cell, float]]:
    for (name, *labels), allowed in cells.items():
        if name == LIMIT_ALLOWED.name and allowed > 0:
            yield (LIMIT_UTILISATION.name, *labels), cells[LIMIT_USED.name, *labels] / allowed
