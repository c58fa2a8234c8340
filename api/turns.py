"""Turns: of what there is only so much, a tenant has a few at once, so that nobody takes what is there for all.

Who may wait is let in as others leave, in the order of their coming; who came with a large body is not read meanwhile, so
waiting costs nothing but a connection.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from api.problems import Problem

Key = tuple[str, str]


class Turns:
    """Those of one process; of one event loop."""

    def __init__(self) -> None:
        self._taken: Counter[Key] = Counter()
        self._waiting: defaultdict[Key, deque[asyncio.Future[None]]] = defaultdict(deque)

    def __len__(self) -> int:
        return self._taken.total()

    @contextmanager
    def now(self, tenant: str, what: str, most: int) -> Iterator[None]:
        """One of `most` that the tenant may have. Raises a `Problem` (429) where it has them all."""
        key = tenant, what
        if self._taken[key] >= most:
            raise _too_many(what, most)
        self._taken[key] += 1
        try:
            yield
        finally:
            self._leave(key)

    @asynccontextmanager
    async def soon(self, tenant: str, what: str, most: int, patience_s: float) -> AsyncIterator[None]:
        """The same, waited for up to `patience_s`. Raises a `Problem`: 429 after that, 503 once this process is to end."""
        key = tenant, what
        if self._taken[key] < most:
            self._taken[key] += 1
        else:
            await self._wait(key, most, patience_s)
        try:
            yield
        finally:
            self._leave(key)

    async def _wait(self, key: Key, most: int, patience_s: float) -> None:
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[key].append(mine)
        try:
            async with asyncio.timeout(patience_s):
                await mine
        except BaseException as error:
            if mine.done() and not mine.cancelled() and mine.exception() is None:
                self._leave(key)  # it had come, too late
            if isinstance(error, TimeoutError):
                raise _too_many(key[1], most) from None
            raise

    def _leave(self, key: Key) -> None:
        waiting = self._waiting[key]
        while waiting:
            first = waiting.popleft()
            if not first.done():
                first.set_result(None)  # the turn goes over to it
                return
        del self._waiting[key]
        self._taken[key] -= 1
        if not self._taken[key]:
            del self._taken[key]

    def stop(self) -> None:
        """Lets nobody wait any longer."""
        for waiting in self._waiting.values():
            for each in waiting:
                if not each.done():
                    again = {"Retry-After": "1"}
                    detail = "this process is being stopped; nothing was done"
                    each.set_exception(Problem(503, "stopping", detail, headers=again))


def _too_many(what: str, most: int) -> Problem:
    told = f"{most} {what} of yours are open; wait for one to end"
    return Problem(429, "too_many_at_once", told, headers={"Retry-After": "5"})
