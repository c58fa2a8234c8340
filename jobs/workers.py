"""What is known of live workers: the read side that status displays show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from jobs import keys
from jobs.connections import redis_errors

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


def live_workers(client: redis.Redis) -> list[WorkerInfo]:
    """Every worker that has said something lately."""
    any_client: Any = client
    with redis_errors():
        ids = [found.decode() for found in any_client.zrange(keys.WORKERS, 0, -1)]
        raws = any_client.mget([keys.worker(id) for id in ids]) if ids else []
    return [msgspec.json.decode(raw, type=WorkerInfo) for raw in raws if raw is not None]
