"""What the end of a job or batch leaves in the outbox, written in the step that ends it, with a real Valkey."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from jobs import keys, leases
from jobs.connections import connect
from jobs.patience import no_patience
from jobs.room import Room
from jobs.singles import Single, enlist
from jobs.store import Store
from jobs.submission import NewBatch
from tests.integration.store_model import ending, redis_time, requests, run, wait_until

URL = "https://example.com/told"


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    client = connect(store_url)
    yield Store(client)
    client.close()


def single(store: Store, **options: Any) -> str:
    """A job that was submitted alone."""
    new = NewBatch(callback=URL, tenant="t", **options)
    (made,) = enlist(store.client, [Single(new, requests(1)[0])], no_patience(), Room(store.client, store.backend))
    assert not isinstance(made, Exception)
    return made.batch_id


def end(url: str, letter: str) -> None:
    """Claims what is ready and ends it so."""

    async def work(client: Any) -> None:
        for job in await leases.claim(client, "w", "bulk", [""], 50):
            await leases.finish(client, job.batch_id, [ending(job, letter)])

    run(work, url)


def events(store: Store) -> list[dict[str, str]]:
    """All events, in the order in which they are due; each is also on its tenant's list."""
    found = []
    for raw, due in store.client.zrange(keys.OUTBOX, 0, -1, withscores=True):
        pairs = store.client.hgetall(keys.event(raw.decode()))
        record = {name.decode(): value.decode() for name, value in pairs.items()}
        assert store.client.zscore(keys.tenant_events(record["tenant"]), raw) == due == float(record["created_at"])
        found.append({"id": raw.decode(), **record})
    return found


@pytest.mark.parametrize(("letter", "kind"), [("s", "job.succeeded"), ("f", "job.failed")])
def test_the_end_of_a_job_or_batch_leaves_its_event(store: Store, store_url: str, letter: str, kind: str) -> None:
    job = single(store)
    batch, *_ = store.submit(requests(3), NewBatch(callback=URL, tenant="u"))
    assert events(store) == []
    end(store_url, letter)
    told = {(event["type"], event["subject"], event["tenant"], event["url"]) for event in events(store)}
    assert told == {(kind, f"{job}-0", "t", URL), ("batch.completed", batch, "u", URL)}
    assert {event["id"] for event in events(store)} == {f"evt_{job}_1", f"evt_{batch}_1"}


def test_what_nobody_is_to_be_told_of_leaves_none(store: Store, store_url: str) -> None:
    store.submit(requests(2), NewBatch(tenant="t"))
    end(store_url, "s")
    assert events(store) == []


def test_a_cancel_is_told(store: Store) -> None:
    job = single(store)
    batch, *_ = store.submit(requests(2), NewBatch(callback=URL))
    store.cancel(job)
    store.cancel(batch)
    assert [event["type"] for event in events(store)] == ["job.cancelled", "batch.cancelled"]


def test_a_deadline_is_told(store: Store, store_url: str) -> None:
    job = single(store, deadline_s=0.001)
    batch, *_ = store.submit(requests(2), NewBatch(callback=URL, deadline_s=0.001))
    wait_until(store.client, redis_time(store.client) + 0.01)
    run(leases.reap, store_url)
    for closing in (job, batch):
        store.cancel(closing)  # which sweeps
    assert [event["type"] for event in events(store)] == ["job.expired", "batch.expired"]


def test_a_batch_that_ends_again_is_told_again_with_an_id_of_its_own(store: Store, store_url: str) -> None:
    batch, *_ = store.submit(requests(1), NewBatch(callback=URL))
    end(store_url, "f")
    assert store.requeue_failed(batch) == 1
    end(store_url, "s")
    assert [event["id"] for event in events(store)] == [f"evt_{batch}_1", f"evt_{batch}_2"]
