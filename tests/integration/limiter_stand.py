"""The limiter's scripts with a clock that the test drives, for where minutes have to pass."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from jobs import keys
from jobs.connections import connect
from jobs.scripts import Script
from jobs.settings import Settings
from worker.limiter import Grant, Limiter, Reservation, Settlement

MODEL = "m"
CLOCK = "test:clock"
CLOCK_LUA = "redis.call('TIME')"


class Driven:
    """A limiter whose scripts read their time from a key; calls are made at `now`, in seconds, by worker `who`."""

    def __init__(self, url: str, **limits: Any) -> None:
        self.client: Any = connect(url)
        self.client.flushall()
        self.limits = limits
        self.now = 1_000_000.0
        self._limiters: dict[str, Limiter] = {}
        fake = f"{{redis.call('HGET', '{CLOCK}', 's'), redis.call('HGET', '{CLOCK}', 'us')}}"
        self.reserve_script = Script("reserve", "worker")
        self.settle_script = Script("settle", "worker")
        for script in (self.reserve_script, self.settle_script):
            assert CLOCK_LUA in script.text
            script.text = script.text.replace(CLOCK_LUA, fake)
            script.sha = "0" * 40

    def __enter__(self) -> Driven:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def limiter(self, who: str = "w") -> Limiter:
        """That of one worker."""
        if who not in self._limiters:
            self._limiters[who] = Limiter(None, Settings(**self.limits), "account", who)
        return self._limiters[who]

    def _tick(self) -> None:
        us = round(self.now * 1e6)
        self.client.hset(CLOCK, mapping={"s": us // 1_000_000, "us": us % 1_000_000})

    def reserve(self, *estimates: int, lane: str = "bulk", who: str = "w", model: str = MODEL) -> Grant:
        self._tick()
        limiter = self.limiter(who)
        prefix = limiter.ids(lane)
        call = limiter.reserve_call(model, lane, prefix, estimates, held=self.held(who, lane, model))
        reply = self.reserve_script(self.client, call.keys, call.args)
        return limiter.granted(prefix, reply)

    def settle(self, *settlements: Settlement, told: str = "", model: str = MODEL) -> int:
        self._tick()
        limiter = self.limiter()
        return int(self.settle_script(self.client, limiter.keys(model), limiter.settle_args(settlements, told)))

    def settle_all(
        self, grant: Grant | list[Reservation], what: str = "clean", tokens: int = 0, after: float | None = None
    ) -> int:
        reservations = grant.reservations if isinstance(grant, Grant) else grant
        return self.settle(*(Settlement(item, what, tokens, after, 429) for item in reservations))

    def held(self, who: str, lane: str = "bulk", model: str = MODEL) -> int:
        """What one worker has in flight."""
        ids = self.client.zrange(keys.flight(lane, "account", model), 0, -1)
        return sum(id.startswith(f"{lane[0]}.{who}.".encode()) for id in ids)

    def flying(self, lane: str = "bulk") -> int:
        return int(self.client.zcard(keys.flight(lane, "account", MODEL)))

    def record(self) -> dict[str, str]:
        found = self.client.hgetall(keys.limit("account", MODEL))
        return {name.decode(): value.decode() for name, value in found.items()}

    def gate(self) -> dict[str, str]:
        found = self.client.hgetall(keys.gate("account"))
        return {name.decode(): value.decode() for name, value in found.items()}

    def window(self) -> float:
        return float(self.record()["window"])

    def answering(self) -> None:
        """A worker of the interactive lane lives."""
        self.client.set(keys.answering("account"), "i")

    def open_window(self) -> None:
        """Concurrency shall not be what bounds."""
        self.client.hset(keys.limit("account", MODEL), "window", 100_000)


def most_in_a_minute(starts: list[tuple[float, int]]) -> int:
    """The most that starts `(time, amount)` add up to in any half-open minute."""
    starts = sorted(starts)
    times = [time for time, _ in starts]
    sums = [0]
    for _, amount in starts:
        sums.append(sums[-1] + amount)
    return max((sums[bisect_right(times, time + 60 - 1e-9)] - sums[i] for i, time in enumerate(times)), default=0)
