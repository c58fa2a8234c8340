"""The limiter: cluster-wide reservations of requests, tokens and concurrency on one (account, model).

When Redis is away nobody starts a call: `reserve` raises, and the engine asks again later. A worker that dies leaves
reservations behind that end by themselves, because their holder must renew them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jobs import keys
from jobs.scripts import Script
from jobs.settings import Settings

#: Calls in flight that a new (account, model) is given; clean answers double it each round.
FIRST_WINDOW = 16
#: Seconds a reservation lives unless renewed.
RESERVATION_S = 15.0

_reserve = Script("reserve", "worker")
SETTLE = Script("settle", "worker")


@dataclass(frozen=True, slots=True)
class Grant:
    """What one `reserve` gave: a delay in seconds for each granted candidate, in order.

    `ask_again_s` and `bound` (requests, tokens, concurrency, window, gate, retry_after) speak of those not granted;
    `detail` is the reason of an account's gate.
    """

    reservations: list[tuple[str, float]]
    ask_again_s: float
    bound: str
    detail: str


@dataclass(frozen=True, slots=True)
class Settlement:
    """What came of one reservation: `what` is a word of settle.lua, `tokens` go back to the bucket."""

    reservation: str
    what: str
    tokens: int
    retry_after_s: float | None = None
    status: int | None = None


class Limiter:
    """The reservations of one account by one worker process."""

    def __init__(self, client: Any, settings: Settings, account: str, worker_id: str) -> None:
        self._client = client
        self._limits = [_given(settings.rpm), _given(settings.tpm), _given(settings.max_in_flight)]
        self.account = account
        self._worker_id = worker_id
        self._calls = 0

    def keys(self, model: str) -> list[str]:
        """The keys both scripts take."""
        return [keys.limit(self.account, model), keys.flight(self.account, model), keys.gate(self.account)]

    async def reserve(self, model: str, estimates: Sequence[int]) -> Grant:
        """Asks for one call per token estimate, all at once."""
        self._calls += 1
        prefix = f"{self._worker_id}.{self._calls}"
        delays, ask_ms, bound, detail = await _reserve(
            self._client, self.keys(model), [*self._limits, FIRST_WINDOW, RESERVATION_S, prefix, *estimates]
        )
        return Grant(
            [(f"{prefix}.{i}", delay / 1000) for i, delay in enumerate(delays, 1)],
            ask_ms / 1000,
            bound.decode(),
            detail.decode() if detail else "",
        )

    @staticmethod
    def settle_args(settlements: Iterable[Settlement]) -> list[Any]:
        """The arguments of `SETTLE` for these settlements."""
        args: list[Any] = [FIRST_WINDOW]
        for item in settlements:
            args += (
                item.reservation,
                item.what,
                item.tokens,
                "" if item.retry_after_s is None else item.retry_after_s,
                "" if item.status is None else item.status,
            )
        return args

    def renew(self, pipe: Any, model: str, reservations: Iterable[str], now: float) -> None:
        """Queues the renewal of reservations in flight on a pipeline; `now` is the Redis server's clock."""
        flight = dict.fromkeys(reservations, now + RESERVATION_S)
        if flight:
            pipe.zadd(keys.flight(self.account, model), flight, xx=True)


def _given(value: int | None) -> int | str:
    return "" if value is None else value
