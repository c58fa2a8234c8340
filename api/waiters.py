"""Waiters: requests that wait until a job ends, or a batch changes, without asking again and again.

One connection of Redis listens for all of them. A message names the jobs that have ended, so of thousands that wait for
jobs of one batch only those wake whom it concerns.

What goes wrong: the connection breaks. It is made anew, and then everybody looks for himself, because messages were
missed. A message that was never sent costs `LOOK_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from redis.exceptions import RedisError

from jobs import keys

#: Seconds after which a waiter looks without having been told.
LOOK_S = 120.0
#: Seconds between two attempts on a store that is away.
RETRY_S = 0.25
#: Seconds that one read waits, so that a connection that has died unheard is noticed.
READ_S = 5.0

_BEFORE, _AFTER = keys.channel("|").split("|")

log = structlog.get_logger("api.waiters")


class Waiter:
    """One that waits for a job of a batch (`index`), or for anything that happens to the batch (None)."""

    def __init__(self, index: int | None) -> None:
        self.index = index
        self._told = asyncio.Event()

    def tell(self) -> None:
        """Something has happened, perhaps."""
        self._told.set()

    async def wait(self, timeout_s: float) -> None:
        """Returns when something may have happened, and after `timeout_s` (or `LOOK_S`) at the latest."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(timeout_s, LOOK_S * random.uniform(0.75, 1.0))):
                await self._told.wait()
        self._told.clear()


class Waiters:
    """All waiters of this process; `client` is an async client of the store."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._waiting: dict[str, set[Waiter]] = {}
        self._heard: dict[str, asyncio.Future[None]] = {}  # by batch, done once its channel is listened to
        self._changed = asyncio.Event()
        self._coming: set[str] = set()  # batches to be listened to
        self._going: set[str] = set()  # and no longer

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def on(self, batch_id: str, index: int | None = None) -> AsyncIterator[Waiter]:
        """A waiter that misses nothing from here on: look only after this has been entered."""
        waiter = Waiter(index)
        self._waiting.setdefault(batch_id, set()).add(waiter)
        try:
            heard = self._heard.get(batch_id)
            if heard is None:
                heard = self._heard[batch_id] = asyncio.get_running_loop().create_future()
                self._coming.add(batch_id)
                self._changed.set()
            with contextlib.suppress(TimeoutError):  # a store that is away: who looks will hear of it
                await asyncio.wait_for(asyncio.shield(heard), READ_S)
            yield waiter
        finally:
            others = self._waiting[batch_id]
            others.discard(waiter)
            if not others:
                del self._waiting[batch_id]
                if (heard := self._heard.pop(batch_id, None)) is not None:
                    heard.cancel()
                self._going.add(batch_id)
                self._changed.set()

    def wake(self) -> None:
        """Has everybody look."""
        for batch_id in self._waiting:
            self._tell(batch_id, None)

    async def run(self) -> None:
        """Listens until cancelled."""
        while True:
            try:
                await self._listen()
            except (RedisError, OSError) as error:
                log.debug("channel_lost", error=type(error).__name__)
            await asyncio.sleep(RETRY_S)

    async def _listen(self) -> None:
        async with self._client.pubsub() as pubsub:
            # One that nobody waits for, so that there is always one.
            await pubsub.subscribe(keys.channel(""))
            self._coming = set(self._waiting)
            self._going.clear()
            self._changed.set()
            asking = asyncio.create_task(self._ask(pubsub))
            try:
                while not asking.done():
                    message = await pubsub.get_message(timeout=READ_S)
                    while message is not None:
                        self._take(message)
                        message = await pubsub.get_message(timeout=0)
                await asking
            finally:
                asking.cancel()
                await asyncio.wait([asking])
                if not asking.cancelled():
                    asking.exception()

    async def _ask(self, pubsub: Any) -> None:
        """Keeps what is listened to in step with what is waited for."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            coming, self._coming = self._coming, set()
            going, self._going = self._going, set()
            if new := [keys.channel(batch_id) for batch_id in coming if batch_id in self._waiting]:
                await pubsub.subscribe(*new)
            if old := [keys.channel(batch_id) for batch_id in going if batch_id not in self._waiting]:
                await pubsub.unsubscribe(*old)
            await asyncio.sleep(0)  # those that come together are asked for together

    def _take(self, message: dict[str, Any]) -> None:
        batch_id = message["channel"].decode().removeprefix(_BEFORE).removesuffix(_AFTER)
        if message["type"] == "subscribe":
            heard = self._heard.get(batch_id)
            if heard is not None and not heard.done():
                heard.set_result(None)
            else:  # again, after messages may have been missed
                self._tell(batch_id, None)
        elif message["type"] == "message":
            ended = {int(index) for index in message["data"].split(b",")} if message["data"] else None
            self._tell(batch_id, ended)

    def _tell(self, batch_id: str, ended: set[int] | None) -> None:
        for waiter in self._waiting.get(batch_id, ()):
            if waiter.index is None or ended is None or waiter.index in ended:
                waiter.tell()
