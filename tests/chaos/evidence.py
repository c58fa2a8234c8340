"""The evidence: what the store, the ledger and we ourselves know of everything that happened, as plain data."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

from jobs import keys
from jobs.connections import connect
from jobs.store import BatchStatus, Store
from ops.simulator.ledger import Call
from producers import Producer
from producers.producer import JobResult
from tests.chaos import plan
from tests.chaos.spans import Span
from tests.chaos.stand import Stand
from tests.chaos.workers import Life

#: What may be there when all is over; every other key of ours is a leftover.
_KEPT = re.compile(
    r"schema|batches|lanes|turn:\w+:\w*|answering:\w+|workers?|worker:.+|reaper|rounds|deaths|limits|(limit|minute|gate|flight):.+"
    r"|identity:[\w-]+|batch:\w+(:(requests|states|done|strays))?"
    r"|metrics|reported:\w+|tenants|tenant::batches|elsewhere|cleaned"
)


@dataclass(frozen=True)
class Batch:
    """A batch that was found in the store, with all its jobs; `jobs` are in the order of their ends."""

    spec: plan.Batch
    batch_id: str
    status: BatchStatus
    states: bytes
    jobs: list[JobResult]
    cancelled_at: float | None = None


@dataclass(frozen=True)
class Evidence:
    """Everything the oracle judges by; `acknowledged` are the batches by number whose producer was told that they stand."""

    limit: int
    max_attempts: int
    calls: list[Call]
    lives: dict[str, Life]
    batches: list[Batch]
    acknowledged: dict[int, str]
    abandoned: set[int]
    away: list[Span]
    leftovers: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Batches in the store that are none of ours, or there twice."""
    raised: list[str] = field(default_factory=list)
    """What producers met that is no `StoreUnavailable`."""


def gather(stand: Stand, batches: list[plan.Batch], limit: int, max_attempts: int) -> Evidence:
    """What is known when all is over: no worker is left and every batch has finished."""
    specs = {batch.number: batch for batch in batches}
    producers = stand.producers
    found: dict[int, Batch] = {}
    unknown: list[str] = []
    client = connect(stand.valkey.url)
    store = Store(client)
    with Producer(**stand.settings) as producer:
        for batch_id in store.kept_batches(1_000_000):
            jobs = list(producer.results(batch_id, follow=False))
            number = _number(store, batch_id, jobs)
            if number is None or number not in specs or number in found:
                unknown.append(f"{batch_id} (batch {number})")
                continue
            found[number] = Batch(
                specs[number],
                batch_id,
                producer.status(batch_id),
                store.states(batch_id),
                jobs,
                producers.cancelled.get(number),
            )
    evidence = Evidence(
        limit=limit,
        max_attempts=max_attempts,
        calls=stand.calls(),
        lives=stand.workers.lives,
        batches=[found[number] for number in sorted(found)],
        acknowledged=dict(producers.submitted),
        abandoned=set(producers.abandoned),
        away=[*stand.valkey.away, *stand.results_away],
        leftovers=leftovers(client),
        unknown=unknown,
        raised=list(producers.raised),
    )
    client.close()
    return evidence


def _number(store: Store, batch_id: str, jobs: list[JobResult]) -> int | None:
    """Which of the plan's batches it is: its first request says so, or an outcome where requests are no longer kept."""
    request = store.requests(batch_id, [0], store.status(batch_id).slice_size).get(0)
    names = [request.custom_id if request is not None else None, *(job.custom_id for job in jobs)]
    said = re.fullmatch(r"b(\d+)-\d+", next((name for name in names if name is not None), ""))
    return int(said[1]) if said else None


def leftovers(client: Any) -> list[str]:
    """Keys that nobody needs any more, and reservations that are still held."""
    found = []
    for raw in client.scan_iter(f"{keys.PREFIX}*", count=1000):
        name = raw.decode().removeprefix(keys.PREFIX)
        if name.startswith("staged:"):
            # Of a producer that was killed; it goes by itself.
            if client.ttl(raw) < 0:
                found.append(f"{name} (does not expire)")
        elif name.startswith("flight:"):
            if held := client.zcount(raw, time.time(), "+inf"):
                found.append(f"{name} ({held} reservations)")
        elif not _KEPT.fullmatch(name):
            found.append(name)
    return sorted(found)
