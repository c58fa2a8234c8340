"""The limiter: cluster-wide reservations of requests, tokens and concurrency on one (account, model).

When Redis is away nobody starts a call: `reserve` raises, and the engine asks again later. A worker that dies leaves
reservations behind that end by themselves, because their holder must renew them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jobs import keys
from jobs.keys import COMPLETE, LANES
from jobs.leases import Job
from jobs.scripts import Call, Script
from jobs.settings import Settings

#: Seconds a reservation lives unless renewed: as long as a lease, so that a dead worker's places are free when its jobs are.
RESERVATION_S = 10.0

RESERVE = Script("reserve", "worker")
SETTLE = Script("settle", "worker")


@dataclass(frozen=True, slots=True)
class Reservation:
    """One call let through, at `at_ms` by the server's clock, after `delay_s`; `probe`: it tries a gate that is shut."""

    id: str
    delay_s: float
    at_ms: int
    probe: bool


@dataclass(frozen=True, slots=True)
class Grant:
    """What one `reserve` gave, candidate by candidate in their order, but for those at the places `gone`, whose leases are,
    and `stopped`, whose batches are.

    `ask_again_s` and `bound` (requests, tokens, concurrency, window, interactive, share, or the reason of a gate) speak of
    those not granted; `shut` says whose gate it is (account, model), '' for none.
    """

    reservations: list[Reservation]
    ask_again_s: float
    bound: str
    shut: str
    gone: frozenset[int] = frozenset()
    stopped: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Settlement:
    """What came of one reservation: `what` is a word of settle.lua, `tokens` go back to the bucket."""

    reservation: Reservation
    what: str
    tokens: int
    retry_after_s: float | None = None
    status: int | None = None


def counted_as(lane: str) -> str:
    """The lane whose share of the limits a lane uses."""
    return "bulk" if lane == COMPLETE else lane


class Limiter:
    """The reservations of one account by one worker process."""

    def __init__(self, client: Any, settings: Settings, account: str, worker_id: str) -> None:
        self._client = client
        limits = (settings.rpm, settings.tpm, settings.max_in_flight)
        self._args = [*("" if limit is None else limit for limit in limits), settings.interactive_share, RESERVATION_S]
        self._rated = int(settings.rpm is not None)
        self.account = account
        self._worker_id = worker_id
        self._calls = 0

    def keys(self, model: str) -> list[str]:
        """The keys both scripts take."""
        return [
            keys.limit(self.account, model),
            keys.flight("bulk", self.account, model),
            keys.flight("interactive", self.account, model),
            keys.minute(self.account, model),
            keys.gate(self.account),
        ]

    def ids(self, lane: str) -> str:
        """The prefix of the next reservations' ids; the first letter tells the lane, `complete` being bulk here."""
        self._calls += 1
        return f"{counted_as(lane)[0]}.{self._worker_id}.{self._calls}"

    async def reserve(
        self, model: str, lane: str, prefix: str, estimates: Sequence[int], jobs: Sequence[Job] = (), held: int = 0
    ) -> Grant:
        """Asks for one call per token estimate, all at once, with a new `prefix` of `ids`.

        The leases of `jobs`, one an estimate, remember the calls that are let through. `held` are the calls of this model
        and lane that are in flight here.
        """
        call = self.reserve_call(model, lane, prefix, estimates, jobs, held)
        return self.granted(prefix, await RESERVE(self._client, call.keys, call.args))

    def reserve_call(
        self, model: str, lane: str, prefix: str, estimates: Sequence[int], jobs: Sequence[Job] = (), held: int = 0
    ) -> Call:
        """What `reserve` asks, to be asked with other calls; `granted` reads the reply."""
        who = f"{self._worker_id}:{lane}" + (":bulk" if lane == COMPLETE else "")
        candidates: Sequence[int | str] = estimates
        if jobs:
            candidates = [f"{n} {job.token} {job.index}" for n, job in zip(estimates, jobs, strict=True)]
        names = [*self.keys(model), keys.LIMITS, keys.lease(""), keys.batch(""), keys.answering(self.account)]
        return Call(RESERVE, names, [*self._args, prefix, who, held, f"{self.account}:{model}", *candidates])

    @staticmethod
    def granted(prefix: str, reply: list[Any]) -> Grant:
        """What the script's reply says."""
        delays, ask_ms, bound, shut, probe, now_ms = reply
        now = int(now_ms)
        reservations = [
            Reservation(f"{prefix}.{i}", delay / 1000, now + delay, bool(probe))
            for i, delay in enumerate(delays, 1)
            if delay >= 0
        ]
        gone, stopped = (frozenset(p for p, delay in enumerate(delays) if delay == word) for word in (-1, -2))
        return Grant(reservations, ask_ms / 1000, bound.decode(), shut.decode(), gone, stopped)

    def settle_args(self, settlements: Iterable[Settlement], told: str = "") -> list[Any]:
        """The arguments of `SETTLE` for these settlements; `told` are the newest x-ratelimit-* headers, as it wants them."""
        args: list[Any] = [self._rated, RESERVATION_S, told]
        for item in settlements:
            args += (
                item.reservation.id,
                item.what,
                item.tokens,
                item.reservation.at_ms,
                "" if item.retry_after_s is None else item.retry_after_s,
                "" if item.status is None else item.status,
            )
        return args

    def flights(self, reservations: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
        """Reservations `(model, id)` in flight by the key that holds them, to be renewed by the heartbeat."""
        found: dict[str, list[str]] = {}
        names = {lane[0]: lane for lane in LANES}
        for model, id in reservations:
            found.setdefault(keys.flight(names[id[0]], self.account, model), []).append(id)
        return found
