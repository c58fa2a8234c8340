"""Groups: what many requests ask of the store at about the same time is asked together, in one round trip.

The first of a quiet time goes at once; under load a group leaves `window_s` after the one before, or as soon as that
has come back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from api.threads import StoreThreads
from jobs.store import Store

#: Items in one group.
MOST = 500

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Groups(Generic[Item, Answer]):
    """Asks `work`, which answers each item of a group in order; an answer that is an exception is raised to who asked.

    `threads` has one thread of its own for it, so groups leave one after the other.
    """

    def __init__(
        self,
        threads: StoreThreads,
        work: Callable[[Store, Sequence[Item]], Sequence[Answer | Exception]],
        window_s: float,
    ) -> None:
        self._threads = threads
        self._work = work
        self._window_s = window_s
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._wake = asyncio.Event()

    async def ask(self, item: Item) -> Answer:
        """The answer to one item. Raises what `work` raised for its group, or has answered for it."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._wake.set()
        return await future

    async def run(self) -> None:
        """Sends groups until cancelled."""
        left_at = -self._window_s
        while True:
            await self._wake.wait()
            if (early_s := left_at + self._window_s - time.monotonic()) > 0:
                await asyncio.sleep(early_s)
            left_at = time.monotonic()
            group, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
            if not self._waiting:
                self._wake.clear()
            items = [item for item, _ in group]
            try:
                answers = await self._threads.call(lambda store, items=items: self._work(store, items))  # type: ignore[misc]
            except Exception as error:
                answers = [error] * len(items)
            for (_, future), answer in zip(group, answers, strict=True):
                if future.done():  # who asked has gone
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
