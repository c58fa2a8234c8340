"""What is known of live workers and shut gates: the read side that status displays show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from jobs import keys
from jobs.store import redis_errors

if TYPE_CHECKING:
    import redis


class WorkerInfo(msgspec.Struct, frozen=True):
    """What a worker last said of itself; at most 15 s old."""

    id: str
    host: str
    pid: int
    lanes: list[str]
    label: str
    upstream: str
    account: str
    in_flight: int
    held: int
    bounds: list[str]
    stopping: bool
    started_at: float


class Gate(msgspec.Struct, frozen=True):
    """A shut account: why, the status that shut it, since when, and when it is tried next (unix seconds)."""

    reason: str
    status: int
    since: float
    until: float


def live_workers(client: redis.Redis) -> list[WorkerInfo]:
    """Every worker that has said something lately."""
    any_client: Any = client
    with redis_errors():
        ids = [found.decode() for found in any_client.zrange(keys.WORKERS, 0, -1)]
        raws = any_client.mget([keys.worker(id) for id in ids]) if ids else []
    return [msgspec.json.decode(raw, type=WorkerInfo) for raw in raws if raw is not None]


def gate_of(client: redis.Redis, account: str) -> Gate | None:
    """The account's gate, or None while it is open."""
    any_client: Any = client
    with redis_errors():
        raw = {name.decode(): value.decode() for name, value in any_client.hgetall(keys.gate(account)).items()}
    if "reason" not in raw:
        return None
    return Gate(raw["reason"], int(raw.get("status") or 0), float(raw["since"]), float(raw["until"]))


def open_gate(client: redis.Redis, account: str) -> None:
    """Lets the next call of the account go at once, as a probe."""
    any_client: Any = client
    with redis_errors():
        any_client.delete(keys.gate(account))
