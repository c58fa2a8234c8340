"""The engine's thread: where the Celery process (threads, signals) and the asyncio loop meet.

What goes wrong: rings do not come, because the broker is away or has lost them; while a lane is silent the engine looks
for its ready work by itself.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import structlog
import uvloop
from redis.exceptions import RedisError

from jobs.backends import open_outside
from jobs.connections import connect_async
from jobs.errors import StoreRefused, StoreUnavailable
from jobs.metrics import Metric
from jobs.settings import Settings
from jobs.tally import Cell
from worker import metrics
from worker.engine import Engine
from worker.heartbeat import Heartbeat
from worker.outside import Outside
from worker.quarantine import Quarantine
from worker.reaper import Reaper, Rope
from worker.upstream import Upstream
from worker.watchdog import Watchdog

#: Seconds without a ring after which a lane is looked at, and between two such looks.
LOOK_S = 2.0
#: Seconds between two attempts on a store that is away.
RETRY_S = 0.5
#: Seconds to tell the last counts, and to take this worker off the list of live ones, which it also leaves by silence.
LEAVE_S = 2.0

log = structlog.get_logger("worker")


class EngineThread:
    """Runs one engine with its flusher, heartbeat, reaper and quarantine, until it has drained.

    `rope` pulls the bell of the lanes. `on_death` is called when the engine has died, from its thread: a worker without
    one would answer rings for nothing.
    """

    def __init__(self, settings: Settings, redis_url: str, rope: Rope, on_death: Callable[[], None]) -> None:
        self._rope = rope
        self._settings = settings
        self._redis_url = redis_url
        self._on_death = on_death
        self.lanes: list[str] = []  # whose rings it hears, as the heartbeat tells; none until Celery is ready
        self._served: list[str] = []  # whose ready work it looks for, with or without a broker
        self._ringing: Counter[str] = Counter()  # rings of a lane that are being answered
        self._rung_at: dict[str, float] = {}  # when the last one was, monotonic time
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._told = asyncio.Event()
        self.written = False  # everything, by the drain
        self._thread = threading.Thread(target=self._run, name="mimoq-engine", daemon=True)
        self.worker_id = f"{socket.gethostname()}-{secrets.token_hex(6)}"

    def start(self) -> None:
        """Starts the loop, unless it runs, and waits until the engine stands."""
        if self._thread.ident is None:
            self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._main())
        except BaseException as error:
            self._failure = error
            if self._engine is not None:
                log.error("engine_died", error=type(error).__name__, exc_info=error)
                self._on_death()
        finally:
            self._ready.set()

    async def _main(self) -> None:
        client = connect_async(self._redis_url)
        backend = open_outside(self._settings, self._redis_url)
        engine = Engine(self._settings, client, backend, Upstream(self._settings), self.worker_id, self._on_death)
        if engine.outside is not None:
            await self._mark(engine.outside)
            await self._check(engine, engine.outside)
        heartbeat = Heartbeat(client, engine, self.lanes)
        engine.spawn(engine.flusher.run())
        engine.spawn(heartbeat.run())
        engine.spawn(Reaper(client, self._rope, self.worker_id, engine.outside, engine.counts.tally).run())
        engine.spawn(engine.counts.reports.run(client))
        engine.spawn(Quarantine(client, engine, self._served).run())
        self._loop, self._engine = asyncio.get_running_loop(), engine
        self._ready.set()
        with Watchdog(self._loop.call_soon_threadsafe):
            try:
                await self._told.wait()
                log.info("draining", in_flight=len(engine.flying), held=len(engine.holding))
                self.written = await engine.drain(self._settings.drain_s)
            finally:
                await engine.close()
                with contextlib.suppress(TimeoutError, RedisError, OSError):
                    await asyncio.wait_for(engine.counts.reports.report(client), LEAVE_S)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(heartbeat.leave(), LEAVE_S)
                await client.aclose(close_connection_pool=True)
                if engine.outside is not None:
                    engine.outside.close()

    async def _mark(self, outside: Outside) -> None:
        while True:
            try:
                await outside.mark()
                return
            except (RedisError, OSError):
                await asyncio.sleep(RETRY_S)

    async def _check(self, engine: Engine, outside: Outside) -> None:
        """Looks whether results can be kept. While their backend is away the engine stands, and starts nothing."""
        try:
            await outside.check()
        except StoreRefused:
            raise
        except StoreUnavailable as error:
            log.warning("results_away", backend=outside.name, reason=str(error))
            outside.usable = False
            engine.spawn(self._check_again(outside))

    async def _check_again(self, outside: Outside) -> None:
        while not outside.usable:
            await asyncio.sleep(RETRY_S)
            with contextlib.suppress(StoreUnavailable):
                await outside.check()
                outside.usable = True
        log.info("results_back", backend=outside.name)

    # -- rings, and what is done without them

    def ring(self, lane: str, claimed: list[tuple[str, int]] | None = None) -> int:
        """Answers a ring from a task's thread; returns when what it claimed has been accepted, and is in `claimed`."""
        loop, engine = self._loop, self._engine
        if loop is None or engine is None:
            return 0
        work = self._answer(engine, lane, claimed)
        try:
            future = asyncio.run_coroutine_threadsafe(work, loop)
        except RuntimeError:  # the loop is closed
            work.close()
            return 0
        # A loop that ends just now might never come to it.
        while not concurrent.futures.wait([future], 1.0).done and self._thread.is_alive():
            pass
        return future.result() if future.done() and not future.cancelled() else 0

    async def _answer(self, engine: Engine, lane: str, claimed: list[tuple[str, int]] | None) -> int:
        self._ringing[lane] += 1
        try:
            return await engine.ring(lane, claimed)
        finally:
            self._ringing[lane] -= 1
            self._rung_at[lane] = time.monotonic()

    def follow(self, followed: Callable[[], None]) -> None:
        """Has `followed` called, in the loop, whenever the end of a job of a pipeline has been written."""

        def set_it(engine: Engine) -> None:
            engine.followed = followed

        self._soon(set_it)

    def count(self, metric: Metric, *labels: str) -> None:
        """Counts something beside the engine; from any thread."""
        self._soon(lambda engine: engine.counts.tally.add(metric, *labels))

    def metrics(self) -> dict[Cell, float]:
        """What the engine counts and holds, once it stands; from any thread."""
        return metrics.cells(self._engine) if self._engine is not None else {}

    def serve(self, lanes: Iterable[str]) -> None:
        """From now on looks for ready work of these lanes, at once and whenever no ring is heard."""
        self._soon(self._serve, sorted(lanes))

    def _serve(self, engine: Engine, lanes: list[str]) -> None:
        for lane in lanes:
            if lane not in self._served:
                self._served.append(lane)
                engine.spawn(self._look(engine, lane))

    async def _look(self, engine: Engine, lane: str) -> None:
        while not engine.stopping:
            while self._silent(lane) and await engine.ring(lane):
                pass  # as much as there is room for: nobody else will say that there is more
            await asyncio.sleep(LOOK_S)

    def _silent(self, lane: str) -> bool:
        heard_at = self._rung_at.get(lane)
        return not self._ringing[lane] and (heard_at is None or time.monotonic() - heard_at >= LOOK_S)

    # -- the end

    def drain(self) -> None:
        """Begins to drain: calls in flight get their time, everything is written down, and the thread ends."""
        self._soon(lambda _: self._told.set())

    def hurry(self) -> None:
        """The drain's time is over now."""
        self._soon(Engine.hurry)

    def join(self) -> None:
        """Waits until the thread has ended."""
        self._thread.join()

    def _soon(self, work: Callable[..., None], *args: Any) -> None:
        """Has `work` called with the engine in its loop, if that still runs."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(work, self._engine, *args)
