"""The engine's thread: where the Celery process (threads, signals) and the asyncio loop meet."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
import uvloop

from jobs.connections import connect_async, results_url
from jobs.settings import Settings
from worker.engine import Engine
from worker.heartbeat import Heartbeat
from worker.reaper import Reaper, Rope
from worker.upstream import Upstream

log = structlog.get_logger("worker")


class EngineThread:
    """Runs one engine with its flusher, heartbeat and reaper, until `drain`; `rope` pulls the bell of the lanes."""

    def __init__(self, settings: Settings, redis_url: str, rope: Rope) -> None:
        self._rope = rope
        self._settings = settings
        self._redis_url = redis_url
        self.lanes: list[str] = []  # whose rings it hears, as the heartbeat tells; none until Celery is ready
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._over = asyncio.Event()
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
            log.error("engine_died", error=type(error).__name__, exc_info=error)
            self._die()
        finally:
            self._ready.set()

    def _die(self) -> None:
        """Ends the worker, by Celery's warm shutdown: one without an engine would answer rings for nothing."""
        from celery.worker import state

        state.should_stop = os.EX_SOFTWARE

    async def _main(self) -> None:
        client = connect_async(self._redis_url)
        elsewhere = results_url(self._settings, self._redis_url)
        results = connect_async(elsewhere) if elsewhere != self._redis_url else None
        engine = Engine(self._settings, client, results, Upstream(self._settings), self.worker_id, self._die)
        if engine.outside is not None:
            await engine.outside.mark()
        heartbeat = Heartbeat(client, engine, self.lanes)
        engine.spawn(engine.flusher.run())
        engine.spawn(heartbeat.run())
        engine.spawn(Reaper(client, self._rope, self.worker_id, engine.outside).run())
        self._loop, self._engine = asyncio.get_running_loop(), engine
        self._ready.set()
        try:
            await self._over.wait()
        finally:
            await engine.close()
            await heartbeat.leave()
            await client.aclose(close_connection_pool=True)
            if results is not None:
                await results.aclose(close_connection_pool=True)

    def _call(self, make: Callable[[Engine], Awaitable[Any]]) -> Any:
        """Runs a coroutine of the engine in its loop and waits for its result."""
        if self._loop is None or self._engine is None or not self._thread.is_alive():
            return None
        engine = self._engine

        async def work() -> Any:
            return await make(engine)

        return asyncio.run_coroutine_threadsafe(work(), self._loop).result()

    def look(self, lane: str, times: int) -> None:
        """Looks for ready work as `times` rings would have it, without waiting for one."""
        loop, engine = self._loop, self._engine
        if loop is not None and engine is not None:
            for _ in range(times):
                asyncio.run_coroutine_threadsafe(engine.ring(lane), loop)

    def ring(self, lane: str) -> int:
        """Answers a ring from a task's thread; returns when what it claimed has been accepted."""
        return self._call(lambda engine: engine.ring(lane)) or 0

    def stop_claiming(self) -> None:
        """No more claims or starts; safe in a signal handler."""
        if self._loop is not None and self._engine is not None:
            self._loop.call_soon_threadsafe(self._engine.stop)

    def drain(self) -> None:
        """Lets calls in flight end within the drain's time, writes everything down and ends the thread."""
        self._call(lambda engine: engine.drain(self._settings.drain_s))
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join(30)
