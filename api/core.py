"""The core of one API process: the store's threads, groups, waiters and the ringer, started and ended together."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, TypeVar

import structlog
from redis.exceptions import RedisError

from api.auth import Auth, Caller, Rates
from api.deliverer import GRACE_S, Deliverer
from api.groups import Groups
from api.metrics import Counts, Scrapes
from api.openai.clerk import AT_ONCE, Clerk
from api.openai.keeper import Keeper
from api.openai.spool import Spool
from api.outbound import Outbound
from api.problems import not_found
from api.ringer import Ringer
from api.threads import PATIENCE_S, StoreThreads, say
from api.turns import Turns
from api.waiters import Waiter, Waiters
from jobs import identity
from jobs.connections import connect_async
from jobs.errors import NotFound
from jobs.looks import JobLook, Wanted, look
from jobs.room import Room
from jobs.settings import Settings
from jobs.singles import Enlisted, Single, enlist
from jobs.states import split_job_id
from jobs.store import BatchStatus, Store
from jobs.tally import Reports, Tally
from producers.connection import Connection

#: Seconds between two groups of submissions under load.
COMMIT_WINDOW_S = 0.005
#: And of looks, which wait only for those before them.
LOOK_WINDOW_S = 0.0

#: Batches that are read at once, as lines (each waits for its sender most of the time) and inline.
UPLOADS = 32
INLINE = 4
#: Bytes of a body that is read in a thread: this many take some milliseconds.
ASIDE_BYTES = 128 * 1024
#: Threads of results and progress that are followed.
STREAMS = 4
#: Steps of a cancel that are waited for, of 2,000 jobs each; the rest is the reaper's.
CANCEL_STEPS = 10
#: Seconds to tell the last counts.
LAST_S = 2.0
#: Seconds between two looks after an embedded server.
SERVER_S = 1.0
#: Seconds between two cancellations of a task that has to end.
END_S = 0.2

T = TypeVar("T")

log = structlog.get_logger("api")


class Core:
    """What routes work with."""

    def __init__(self, settings: Settings) -> None:
        """Opens the store. Raises `MimoqError` where that can't be had."""
        self.settings = settings
        self.connection = Connection(settings, say, silent_s=PATIENCE_S)
        self.threads = StoreThreads(self.connection, "api")
        self.checks = StoreThreads(self.connection, "check", 2)
        self.streams = StoreThreads(self.connection, "stream", STREAMS)
        self._auth_threads = StoreThreads(self.connection, "auth", 2)
        self.uploads = StoreThreads(self.connection, "upload", UPLOADS)
        self.inline = StoreThreads(self.connection, "inline", INLINE)
        self.disk = StoreThreads(self.connection, "disk", INLINE)
        self.turns = Turns()
        self.reading: set[asyncio.Timeout] = set()  # of bodies that are waited for
        self._commit_thread = StoreThreads(self.connection, "commit", 1)
        self._look_thread = StoreThreads(self.connection, "look", 1)
        self._commits: Groups[Single, Enlisted] = Groups(self._commit_thread, self._commit, COMMIT_WINDOW_S)
        self._looks: Groups[Wanted, JobLook | None] = Groups(self._look_thread, _look, LOOK_WINDOW_S)
        self.auth = Auth(self._auth_threads, settings.api_auth, settings.api_rpm)
        self.rates = Rates(self._auth_threads)
        self.ringer = Ringer(self.connection)
        self.label = identity.SIMULATED if settings.simulated else ""
        self.model = None if settings.endpoint_path else settings.model
        self.spool = Spool(settings.files_dir or settings.data_dir / "files")
        self._clerk_threads = StoreThreads(self.connection, "clerk", AT_ONCE + 1)
        self.clerk = Clerk(self._clerk_threads, self.spool, self.ringer, settings, self.model)
        self._keeper = Keeper(self.checks, self.spool)
        self.client = connect_async(self.connection.redis_url)
        self.waiters = Waiters(self.client)
        self.tally = Tally()
        self._reports = Reports(self.tally)
        self.counts = Counts(self.tally)
        self.scrapes = Scrapes(self.connection.client, settings, self.tally, self.ringer.depth)
        self.outbound = Outbound(settings)
        self._deliverer = Deliverer(self.client, self.outbound.post, self.counts.delivery)
        self._room: Room | None = None  # of the one thread that commits
        self.died = False  # whether this process ends because something of it has failed
        self.stopping = asyncio.Event()

    # -- its life

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs what works beside the routes, and ends it all; what was acknowledged is in the store."""
        async with AsyncExitStack() as stack:
            stack.callback(self.connection.close)
            stack.push_async_callback(self.client.aclose, close_connection_pool=True)
            for threads in (
                self.threads,
                self.checks,
                self.streams,
                self._auth_threads,
                self.uploads,
                self.inline,
                self.disk,
                self._clerk_threads,
                self._commit_thread,
                self._look_thread,
            ):
                stack.callback(threads.close)
            await stack.enter_async_context(self.outbound)
            self.ringer.start()
            stack.callback(self.ringer.close)
            stack.push_async_callback(self._report)
            self._run(stack, self._deliverer.run(), patience_s=GRACE_S + 1)
            for work in (
                self._commits.run(),
                self._looks.run(),
                self.waiters.run(),
                self.rates.run(),
                self.clerk.run(),
                self._keeper.run(),
                self._reports.run(self.client),
                self._keep_server(),
            ):
                self._run(stack, work)
            yield

    def _run(self, stack: AsyncExitStack, work: Coroutine[Any, Any, None], patience_s: float = END_S) -> None:
        """Runs `work` until the stack is left; its failure ends the process, half of which would serve nobody."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        stack.push_async_callback(_end, task, patience_s)

    async def _report(self) -> None:
        """Tells the last counts, if the store takes them at once."""
        with suppress(TimeoutError, RedisError, OSError):
            await asyncio.wait_for(self._reports.report(self.client), LAST_S)

    async def _keep_server(self) -> None:
        """Sees that an embedded Valkey has its guard."""
        server = self.connection.server
        while server is not None:
            await asyncio.sleep(SERVER_S)
            await self.checks.call(lambda _: server.ensure())

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("api_task_died", error=type(error).__name__, exc_info=error)
            self.died = True
            self.stop()
            os.kill(os.getpid(), signal.SIGTERM)

    # -- what routes ask for

    async def submit(self, single: Single) -> Enlisted:
        """Makes a job, durable once this returns, and rings for it. Raises `Conflict`, `NoRoom`, `StoreUnavailable`."""
        return await self._commits.ask(single)

    def _commit(self, store: Store, singles: Sequence[Single]) -> Sequence[Enlisted | Exception]:
        room = self._room
        if room is None:
            room = self._room = Room(store.client, store.backend)
        came = enlist(store.client, singles, store.patience, room)
        for single, item in zip(singles, came, strict=True):
            if isinstance(item, Enlisted) and item.created:
                self.ringer.ring(item.batch_id, single.new.lane, single.new.label, 1)
        return came

    async def look(self, caller: Caller, job_id: str) -> JobLook:
        """A job of the caller's. Raises a `Problem` (404)."""
        try:
            batch_id, index = split_job_id(job_id)
        except ValueError:
            raise not_found("job") from None
        found = await self._looks.ask(Wanted(caller.tenant, batch_id, index))
        if found is None:
            raise not_found("job")
        return found

    async def looks(self, wanted: Sequence[Wanted]) -> list[JobLook]:
        """Several jobs, without those that are gone."""
        found = await self.threads.call(lambda store: _look(store, wanted))
        return [item for item in found if item is not None]

    async def wait(self, caller: Caller, waiter: Waiter, job_id: str, timeout_s: float) -> JobLook:
        """The job once it has ended, or as it is after `timeout_s`, or when this process is told to stop."""
        end = asyncio.get_running_loop().time() + timeout_s
        while True:
            found = await self.look(caller, job_id)
            left_s = end - asyncio.get_running_loop().time()
            if found.state.terminal or left_s <= 0 or self.stopping.is_set():
                return found
            await waiter.wait(left_s)

    async def status(self, caller: Caller, batch_id: str) -> BatchStatus:
        """A batch of the caller's. Raises a `Problem` (404)."""
        try:
            status = await self.threads.call(lambda store: store.status(batch_id))
        except NotFound:
            raise not_found("batch") from None
        if status.tenant != caller.tenant:
            raise not_found("batch")
        return status

    async def aside(self, size: int, work: Callable[[], T]) -> T:
        """What `work` makes of so many bytes: of many in a thread, because others wait meanwhile."""
        return await self.inline.call(lambda _: work()) if size > ASIDE_BYTES else work()

    def stop(self) -> None:
        """Lets nobody wait any longer: this process has been told to end."""
        self.stopping.set()
        for patience in self.reading:
            patience.reschedule(asyncio.get_running_loop().time())
        self.turns.stop()
        self.waiters.wake()


async def _end(task: asyncio.Task[None], patience_s: float) -> None:
    """Cancels a task; again and again, because a cancellation that meets the end of a command is lost in redis-py."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=patience_s)


def _look(store: Store, wanted: Sequence[Wanted]) -> list[JobLook | None]:
    return store.patience.call(look, store.client, store.backend, wanted)
