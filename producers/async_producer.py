"""The Python client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from jobs.states import BatchState
from jobs.store import BatchStatus
from producers.follow import Follower
from producers.producer import ENDED, JobResult, Producer, RequestLike, batch_of, result_of

#: Seconds between two looks.
LOOK_S = 0.05

T = TypeVar("T")


class AsyncProducer:
    """`Producer` for asyncio: the same calls, run in a thread of its own. Open it with `async with`."""

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="mimoq-producer")
        self._producer: Producer | None = None

    async def _call(self, work: Callable[[Producer], T]) -> T:
        def run() -> T:
            if self._producer is None:
                self._producer = Producer(**self._settings)
            return work(self._producer)

        return await asyncio.get_running_loop().run_in_executor(self._threads, run)

    async def submit(self, request: RequestLike, **options: Any) -> str:
        """See `Producer.submit`."""
        return await self._call(lambda producer: producer.submit(request, **options))

    async def submit_many(self, requests: Iterable[RequestLike], **options: Any) -> str:
        """See `Producer.submit_many`."""
        return await self._call(lambda producer: producer.submit_many(requests, **options))

    async def status(self, batch_id: str) -> BatchStatus:
        """See `Producer.status`."""
        return await self._call(lambda producer: producer.status(batch_id))

    async def job(self, job_id: str) -> JobResult:
        """See `Producer.job`."""
        return await self._call(lambda producer: producer.job(job_id))

    async def results(self, batch_id: str, *, follow: bool = True) -> AsyncIterator[JobResult]:
        """See `Producer.results`."""
        follower = await self._call(lambda producer: Follower(producer._connection.store, batch_of(batch_id)))
        while True:
            status = await self.status(batch_id)
            while (rows := await self._call(lambda _: follower.ready())) is not None:
                for ended in rows:
                    yield result_of(ended)
            if not follow or status.state is BatchState.FINISHED:
                return
            await asyncio.sleep(LOOK_S)

    async def wait(self, id: str, timeout_s: float | None = None) -> BatchStatus | JobResult:
        """See `Producer.wait`; other calls go on meanwhile."""
        look = self.status if id == batch_of(id) else self.job
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    found = await look(id)
                    if found.state in ENDED:
                        return found
                    # Here, not in the one thread, where others wait too.
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise TimeoutError(f"{id} has not ended within {timeout_s} s") from None

    async def cancel(self, id: str) -> BatchStatus:
        """See `Producer.cancel`."""
        return await self._call(lambda producer: producer.cancel(id))

    async def close(self) -> None:
        """Closes the connections and the thread."""
        if self._producer is not None:
            await self._call(lambda producer: producer.close())
        self._threads.shutdown()

    async def __aenter__(self) -> AsyncProducer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
