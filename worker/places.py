"""The places in flight: settles those that calls have left, and has them taken again in the same round trip.

A place that waits to be settled, or to be reserved, is one unused: with calls of half a second, each millisecond of it is
0.2% of the upstream. So settlements do not wait for results to be written, and the lines that wait for a place ask right
behind them. What goes wrong: Redis away, settlements stay here, in order, and are made again when it is back; they are
idempotent.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import structlog
from redis.exceptions import RedisError

from jobs.scripts import Call, call_all
from worker.limiter import SETTLE, Limiter, Settlement

#: Seconds that settlements are collected: each round trip costs CPU. So it is as long as the last one took, within bounds.
COLLECT_LEAST_S = 0.002
COLLECT_MOST_S = 0.01
RETRY_S = 0.25

log = structlog.get_logger("worker.places")


class Ask(Protocol):
    """What a line asks of the limiter: `call`, and who is told what came of it."""

    @property
    def call(self) -> Call:
        """The script with its arguments."""

    def answered(self, reply: list[Any]) -> None:
        """The script's reply."""

    def lost(self, error: BaseException) -> None:
        """Nobody knows whether it has arrived."""


class Places:
    """Settles the reservations of one worker.

    `asks` is told how many of each model are being settled, and says what to ask right after; `on_settled` is called when
    reservations were freed.
    """

    def __init__(
        self,
        client: Any,
        limiter: Limiter,
        asks: Callable[[Mapping[str, int]], Sequence[Ask]],
        on_settled: Callable[[], None],
    ) -> None:
        self._client = client
        self._limiter = limiter
        self._asks = asks
        self._on_settled = on_settled
        self._settlements: dict[str, list[Settlement]] = defaultdict(list)
        self._told: dict[str, str] = {}
        self._urgent: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.away = False  # Redis

    def settle(self, model: str, settlement: Settlement) -> None:
        """A reservation is over. What asks for a pause is written at once: other workers must hear of it."""
        if settlement.retry_after_s and not self.away:
            task = asyncio.get_running_loop().create_task(self._settle_now(model, settlement))
            self._urgent.add(task)
            task.add_done_callback(self._urgent.discard)
        else:
            self._keep(model, settlement)

    def _keep(self, model: str, settlement: Settlement) -> None:
        self._settlements[model].append(settlement)
        self._idle.clear()
        self._wake.set()

    async def _settle_now(self, model: str, settlement: Settlement) -> None:
        try:
            await call_all(self._client, [self._settle_call(model, [settlement])])
            self._on_settled()
        except (RedisError, OSError, asyncio.CancelledError):
            self._keep(model, settlement)

    def tell(self, model: str, told: str) -> None:
        """The newest x-ratelimit-* headers, which go with the next settlements."""
        self._told[model] = told

    async def settled(self) -> None:
        """Waits until everything handed over so far has been settled."""
        while self._urgent or not self._idle.is_set():
            await asyncio.gather(*self._urgent, self._idle.wait())

    async def run(self) -> None:
        """Settles until cancelled."""
        took_s = 0.0
        while True:
            await self._wake.wait()
            await asyncio.sleep(min(max(took_s, COLLECT_LEAST_S), COLLECT_MOST_S))
            self._wake.clear()
            settlements, self._settlements = self._settlements, defaultdict(list)
            began = time.monotonic()
            asks = self._asks({model: len(items) for model, items in settlements.items()})
            while not await self._write(settlements, asks):
                # It may be what was asked that Redis refuses: out of memory it still settles.
                if not asks and not self.away:
                    log.warning("settlements_wait", settlements=sum(map(len, settlements.values())))
                self.away = not asks
                if self.away:
                    await asyncio.sleep(RETRY_S)
                asks = ()
            self.away = False
            took_s = time.monotonic() - began
            if not self._wake.is_set():
                self._idle.set()

    async def _write(self, settlements: dict[str, list[Settlement]], asks: Sequence[Ask]) -> bool:
        """Whether these are settled, and what was asked behind them answered."""
        calls = [self._settle_call(model, items) for model, items in settlements.items()]
        try:
            replies = await call_all(self._client, [*calls, *(ask.call for ask in asks)])
        except (RedisError, OSError, TimeoutError) as error:
            for ask in asks:
                ask.lost(error)
            return False
        for ask, reply in zip(asks, replies[len(calls) :], strict=True):
            ask.answered(reply)
        self._on_settled()
        return True

    def _settle_call(self, model: str, items: list[Settlement]) -> Call:
        return Call(SETTLE, self._limiter.keys(model), self._limiter.settle_args(items, self._told.pop(model, "")))
