"""The clerk: what OpenAI batches need done beside requests. Their input is validated and becomes a batch, or errors; once it
has ended, its files are measured and it is over.

What goes wrong: a process that dies over it leaves it due, and another does it again, which changes nothing that was done. A
store that is away is waited for. An input file that lies on another machine's disk is left to who has it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import BinaryIO, cast

import msgspec
import structlog

from api.openai.lines import InputLines, InvalidInput, LineError, model_of
from api.openai.shapes import BatchErrors
from api.openai.spool import Spool
from api.output_rows import openai_block, rows, size
from api.problems import Problem
from api.ringer import Ringer
from api.threads import StoreThreads
from jobs import files, openai_batches
from jobs.errors import NoRoom, NotFound, StoreFull, StoreUnavailable, Unwanted
from jobs.files import Part
from jobs.openai_batches import LEASE_S, Due, OpenAIBatch
from jobs.settings import Settings
from jobs.states import BatchState
from jobs.store import BatchStatus, Store
from jobs.submission import NewBatch

#: Seconds between two looks at what is due.
LOOK_S = 0.25
#: Batches that are worked on at once, and of them of one tenant: others wait for no one's thousand files.
AT_ONCE = 3
OF_ONE = 2
#: Seconds between two renewals of a lease, and between two tries where something was not to be had.
RENEW_S = LEASE_S / 6
AGAIN_S = 5.0

log = structlog.get_logger("api.openai.clerk")


class Clerk:
    """One process's share of it; `threads` are its own, at least `AT_ONCE` and one to look and renew."""

    def __init__(
        self, threads: StoreThreads, spool: Spool, ringer: Ringer, settings: Settings, model: str | None
    ) -> None:
        self._threads = threads
        self._spool = spool
        self._ringer = ringer
        self._settings = settings
        self._model = model
        self._woken = asyncio.Event()
        self._working: dict[asyncio.Task[None], str] = {}  # with the tenant it is for

    def wake(self) -> None:
        """Something is due."""
        self._woken.set()

    async def run(self) -> None:
        """Works until cancelled; what is under way then is done by another process, or by the next."""
        try:
            while True:
                due = None
                if len(self._working) < AT_ONCE:
                    with suppress(StoreUnavailable):
                        busy = self._busy()
                        due = await self._threads.call(lambda store: openai_batches.take(store.client, busy=busy))  # noqa: B023
                if due is None:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_S):
                            await self._woken.wait()
                    self._woken.clear()
                    continue
                task = asyncio.create_task(self._work(due))
                self._working[task] = due.tenant
                task.add_done_callback(self._done)
        finally:
            for task in self._working:
                task.cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        del self._working[task]
        self._woken.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("clerk_failed", error=type(error).__name__, exc_info=error)

    async def _work(self, due: Due) -> None:
        unwanted = threading.Event()
        renewing = asyncio.create_task(self._renew(due, unwanted))
        try:
            await self._threads.call(lambda store: self._do(store, due, unwanted))
        finally:
            unwanted.set()  # whoever still reads for it stops
            renewing.cancel()

    async def _renew(self, due: Due, unwanted: threading.Event) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            with suppress(StoreUnavailable):
                wanted = await self._threads.call(lambda store: openai_batches.renew(store.client, due.batch_id))
                if due.step == "validate" and not wanted:
                    unwanted.set()

    def _busy(self) -> list[str]:
        """Tenants that have enough under work."""
        return [tenant for tenant, count in Counter(self._working.values()).items() if count >= OF_ONE]

    # -- in threads

    def _do(self, store: Store, due: Due, unwanted: threading.Event) -> None:
        try:
            if due.step == "validate":
                self._validate(store, due, unwanted)
            elif due.step == "finalize":
                self._finalize(store, due.tenant, due.batch_id, unwanted)
            else:
                self._settle(store, due.batch_id)
        except NotFound:
            return  # its time is over
        except Unwanted:  # by this process, which is being stopped: it is another's at once
            openai_batches.renew(store.client, due.batch_id, 0.0)
        except (StoreUnavailable, Problem, OSError) as error:  # the store is away, or the disk: it stays due
            log.warning("clerk_waits", batch=due.batch_id, error=type(error).__name__)

    def _validate(self, store: Store, due: Due, unwanted: threading.Event) -> None:
        """Makes its input a batch, or says what is wrong with it."""
        batch_id = due.batch_id
        batch = openai_batches.get(store.client, due.tenant, batch_id)
        if batch.cancelling_at is not None:
            self._end(store, batch_id, None)
            return
        lines = InputLines(
            batch.endpoint,
            model=batch.model or self._model,
            max_requests=self._settings.batch_max_requests,
            max_line_bytes=self._settings.max_line_bytes,
            lenient=batch.lenient,
        )
        try:
            with self._spool.open(batch.input_file_id) as stream:
                watched = cast("BinaryIO", _Watched(stream, unwanted))
                store.submit(lines.requests(watched), self._new(batch))
        except NotFound:
            self._missing(store, batch)
        except InvalidInput as error:
            self._end(store, batch_id, error.errors)
        except Unwanted:
            if openai_batches.renew(store.client, batch_id):
                raise
            self._end(store, batch_id, None)
        except (NoRoom, StoreFull) as error:
            told = error.plain if isinstance(error, NoRoom) else str(error)
            self._end(store, batch_id, [LineError("no_room", None, told, None)])
        else:
            self._settle(store, batch_id, lines.model)
            made = store.status(batch_id)
            if made.state is BatchState.RUNNING:
                self._ringer.ring(batch_id, made.lane, made.label, made.queued)

    def _new(self, batch: OpenAIBatch) -> NewBatch:
        return NewBatch(
            batch_id=batch.batch_id,
            lane=batch.lane,
            label=batch.label,
            slice_size=self._settings.slice_size,
            ttl_s=self._settings.result_ttl_s,
            deadline_at=batch.created_at + batch.window_s,
            identity=batch.identity,
            content=batch.content,
            metadata=batch.metadata,
            tenant=batch.tenant,
            callback=batch.callback,
            protocol="openai",
        )

    def _missing(self, store: Store, batch: OpenAIBatch) -> None:
        try:
            files.get(store.client, batch.tenant, batch.input_file_id)
        except NotFound:
            error = LineError("file_not_found", None, "the input file was deleted, or has expired", "input_file_id")
            self._end(store, batch.batch_id, [error])
            return
        seconds, _ = store.client.time()
        if seconds > batch.created_at + batch.window_s:
            told = "the input file could not be read before the completion window expired"
            self._end(store, batch.batch_id, [LineError("file_unavailable", None, told, "input_file_id")])
            return
        log.warning("input_elsewhere", batch=batch.batch_id, hint="share MIMOQ_FILES_DIR among the API's processes")
        openai_batches.renew(store.client, batch.batch_id, AGAIN_S)

    def _end(self, store: Store, batch_id: str, errors: list[LineError] | None) -> None:
        """It never becomes a batch: it has these errors, or nobody wants it any more."""
        told = b"" if errors is None else msgspec.json.encode(BatchErrors(errors))
        openai_batches.fail(
            store.client, batch_id, "cancelled" if errors is None else "failed", told, self._settings.result_ttl_s
        )

    def _settle(self, store: Store, batch_id: str, model: str = "") -> None:
        """It is a batch: nothing is due of it until it ends. `model` is '' where another process has made it one."""
        if not model:
            status = store.status(batch_id)
            first = store.requests(batch_id, [0], status.slice_size).get(0)
            if first is not None:
                model = model_of(first.body)
            else:  # no longer kept, once it has been answered
                (stored,) = store.results(batch_id, [0])
                model = stored.mimoq.model if stored is not None and stored.mimoq is not None else ""
        openai_batches.made(store.client, batch_id, model)

    def _finalize(self, store: Store, tenant: str, batch_id: str, unwanted: threading.Event) -> None:
        """Measures its files, and ends it."""
        batch = openai_batches.get(store.client, tenant, batch_id)
        if not batch.model:  # who made it a batch died before they told
            self._settle(store, batch_id)
        status = store.status(batch_id)
        if status.finished_at is None:  # opened again
            self._settle(store, batch_id)
            return

        def block(store: Store, status: BatchStatus, indexes: Sequence[int]) -> bytes:
            if unwanted.is_set():
                raise Unwanted
            return openai_block(store, status, indexes)

        def measured(part: Part) -> tuple[int, int]:
            indexes = rows(store, batch_id, part, batch.output_from if part == "output" else 0)
            return len(indexes), size(store, status, indexes, block)

        output, errors = measured("output"), measured("error")
        openai_batches.finalize(store.client, batch_id, status.finished_at, output, errors)


class _Watched:
    """A file that can be read as long as somebody wants it."""

    def __init__(self, stream: BinaryIO, unwanted: threading.Event) -> None:
        self._stream = stream
        self._unwanted = unwanted

    def read(self, size: int = -1) -> bytes:
        """The next bytes. Raises `Unwanted`."""
        if self._unwanted.is_set():
            raise Unwanted
        return self._stream.read(size)
