"""OpenAI batches in the store: their record, what is due, and the way from a validated input to files that can be had."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from jobs import files, keys, leases, openai_batches
from jobs.connections import connect
from jobs.cursors import Asked
from jobs.errors import Conflict, NotFound, Unwanted
from jobs.leases import Job
from jobs.openai_batches import Due, NewOpenAIBatch, OpenAIBatch
from jobs.requests import CHAT
from jobs.scripts import Script
from jobs.store import NewBatch, Store
from jobs.submission import heard
from tests.integration.store_model import USAGE, ending, redis_time, requests, run, wait_until

TENANT = "t"
URL = "https://hooks.example/a"

_sweep = Script("sweep")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with connect(store_url) as client:
        yield Store(client)


def new(number: int = 0, tenant: str = TENANT, **more: Any) -> NewOpenAIBatch:
    """One of its own, with a window of an hour."""
    told = {"input_file_id": files.new_id(), "window": "1h", "window_s": 3_600.0, "content": f"content {number}"}
    return NewOpenAIBatch(f"{number:024x}", tenant, CHAT, **{**told, **more})


def created(store: Store, number: int = 0, **more: Any) -> str:
    """Writes one down."""
    batch_id, there = openai_batches.create(store.client, new(number, **more))
    assert there
    return batch_id


def made(store: Store, batch: str, jobs: int = 2, ttl_s: int = 1_000, **more: Any) -> None:
    """It becomes a batch of so many jobs, as the clerk makes it."""
    found = get(store, batch)
    told = {"identity": found.identity, "content": found.content, "callback": found.callback, "ttl_s": ttl_s, **more}
    submitted = store.submit(requests(jobs), to_be(batch, **told))
    assert (submitted.batch_id, submitted.created) == (batch, True)


def to_be(batch: str, **more: Any) -> NewBatch:
    """The batch that it is to become."""
    return NewBatch(batch_id=batch, tenant=TENANT, protocol="openai", **more)


def get(store: Store, batch: str) -> OpenAIBatch:
    """A look."""
    return openai_batches.get(store.client, TENANT, batch)


def end(store: Store, url: str, letters: str) -> list[Job]:
    """Ends the jobs that are ready, each with its letter."""
    jobs: list[Job] = run(lambda client: leases.claim(client, "w", "bulk", [""], 1_000, 600.0), url)
    jobs.sort(key=lambda job: job.index)
    ends = [ending(job, letter) for job, letter in zip(jobs, letters, strict=True)]
    run(lambda client: leases.finish(client, jobs[0].batch_id, ends), url)
    return jobs


def due(store: Store, tenant: str = TENANT) -> dict[str, float]:
    """What is due of a tenant's, and when. For as long as there is something the tenant is in line, not before its time."""
    found = store.client.zrange(keys.tenant_due(tenant), 0, -1, withscores=True)
    turn = store.client.zscore(keys.OPENAI_DUE, tenant)
    if found:
        first = found[0][1]
        assert first <= turn <= max(first, redis_time(store.client))
    else:
        assert turn is None
    return {raw.decode(): at for raw, at in found}


def taken(store: Store) -> Due | None:
    """Something that is due, however long it is leased."""
    for batch in due(store):
        openai_batches.renew(store.client, batch, 0.0)
    return openai_batches.take(store.client)


def finalized(store: Store, batch: str, output: tuple[int, int] = (1, 10), errors: tuple[int, int] = (1, 20)) -> bool:
    """Ends it with these lines and bytes of its files."""
    status = store.status(batch)
    assert status.finished_at is not None
    return openai_batches.finalize(store.client, batch, status.finished_at, output, errors)


def events(store: Store) -> list[tuple[str, str]]:
    """Types and subjects of what is to be told, in order."""
    found = store.client.zrange(keys.tenant_events(TENANT), 0, -1)
    names = [store.client.hmget(keys.event(raw.decode()), "type", "subject") for raw in found]
    return [(kind.decode(), subject.decode()) for kind, subject in names]


# -- created


def test_what_is_written_is_read(store: Store) -> None:
    asked = new(
        metadata='{"a":"b"}',
        callback=URL,
        output_ttl_s=4_000,
        lenient=True,
        model="m",
        lane="interactive",
        identity="i",
    )
    before = redis_time(store.client)
    assert openai_batches.create(store.client, asked) == (asked.batch_id, True)
    found = get(store, asked.batch_id)
    assert before <= found.created_at <= redis_time(store.client)
    for name in ("batch_id", "tenant", "endpoint", "input_file_id", "window", "window_s", "metadata", "callback"):
        assert getattr(found, name) == getattr(asked, name), name
    for name in ("lenient", "model", "lane", "identity", "content"):
        assert getattr(found, name) == getattr(asked, name), name
    assert (found.status, found.made, found.errors_bytes, found.output_from) == ("validating", None, 0, 0)
    assert (found.failed_at, found.cancelled_at, found.cancelling_at, found.finalized_at) == (None,) * 4
    plain = get(store, created(store, 1))
    assert (plain.lenient, plain.lane, plain.model, plain.metadata, plain.callback) == (False, "bulk", "", "", "")


def test_a_call_made_again_makes_nothing_new(store: Store) -> None:
    asked = new()
    assert openai_batches.create(store.client, asked) == (asked.batch_id, True)
    assert openai_batches.create(store.client, asked) == (asked.batch_id, False)
    assert store.client.zcard(keys.tenant_protocol(TENANT, "openai")) == 1


def test_an_identity_stands_for_one_batch(store: Store) -> None:
    first = created(store, 0, identity="i", content="c")
    assert openai_batches.create(store.client, new(1, identity="i", content="c")) == (first, False)
    with pytest.raises(Conflict):
        openai_batches.create(store.client, new(2, identity="i", content="other"))
    # It still does once it is a batch, and once it is over.
    made(store, first)
    assert openai_batches.create(store.client, new(3, identity="i", content="c")) == (first, False)
    store.cancel(first)
    assert finalized(store, first)
    assert openai_batches.create(store.client, new(4, identity="i", content="c")) == (first, False)
    assert openai_batches.create(store.client, new(5, identity="j", content="c"))[1]
    assert store.client.zcard(keys.tenant_protocol(TENANT, "openai")) == 2


def test_what_of_its_output_was_deleted_is_told_by_how_many_had_ended(store: Store, store_url: str) -> None:
    batch = created(store)
    made(store, batch, 3)
    assert get(store, batch).output_from == 0
    end(store, store_url, "sfs")
    openai_batches.output_deleted(store.client, batch)
    assert get(store, batch).output_from == 3
    openai_batches.output_deleted(store.client, "f" * 24)
    assert not store.client.exists(keys.openai("f" * 24))


def test_others_see_nothing_of_it(store: Store) -> None:
    batch = created(store)
    with pytest.raises(NotFound):
        openai_batches.get(store.client, "other", batch)
    assert openai_batches.batches_page(store.client, "other", Asked(5)) == ([], False)
    with pytest.raises(NotFound):
        openai_batches.batches_page(store.client, "other", Asked(5, batch))
    with pytest.raises(NotFound):
        openai_batches.wish(store.client, "f" * 24, "paused")


def test_pages_show_all_states(store: Store, store_url: str) -> None:
    validating, running, failed = (created(store, number) for number in range(3))
    made(store, running)
    openai_batches.fail(store.client, failed, "failed", b'{"data":[]}', 100)
    found, more = openai_batches.batches_page(store.client, TENANT, Asked(2))
    assert ([(batch.batch_id, batch.status) for batch in found], more) == (
        [(failed, "failed"), (running, "in_progress")],
        True,
    )
    rest, more = openai_batches.batches_page(store.client, TENANT, Asked(2, running))
    assert ([(batch.batch_id, batch.status) for batch in rest], more) == ([(validating, "validating")], False)


# -- made again by an SDK that did not hear of it


def unheard(store: Store, *batches: str) -> None:
    """Time goes by in which an answer to these should have come; the others have just been made."""
    for name in store.client.keys(keys.made("*")):
        for raw in store.client.zrange(name, 0, -1):
            age_s = 1.0 if raw.decode() in batches else -100.0
            store.client.zadd(name, {raw: redis_time(store.client) - age_s})


def again(store: Store, number: int) -> str:
    """The id that the call with the content "c", made again, is told."""
    return openai_batches.create(store.client, new(number, content="c", again=True))[0]


def test_a_retry_joins_what_nobody_has_heard_of(store: Store) -> None:
    first = created(store, 0, content="c")
    assert openai_batches.create(store.client, new(1, content="c"))[1]  # no retry: it is meant
    unheard(store, f"{1:024x}")
    assert again(store, 2) == f"{1:024x}"
    other = new(3, "other", content="c", again=True)
    assert openai_batches.create(store.client, other) == (other.batch_id, True)
    assert again(store, 4) == f"{1:024x}"  # as often as it is made
    assert set(due(store)) == {first, f"{1:024x}"}
    # Also once it is a batch, and once that has ended.
    made(store, f"{1:024x}")
    assert again(store, 5) == f"{1:024x}"


def test_a_retry_joins_nothing_that_is_on_its_way_to_who_asked_for_it(store: Store) -> None:
    """A call that is made again so soon was refused before it came here: what is alike is somebody else's."""
    first = created(store, 0, content="c")
    unheard(store)
    assert again(store, 1) != first


def test_a_retry_joins_the_oldest_that_nobody_has_heard_of(store: Store) -> None:
    first, second = created(store, 0, content="c"), created(store, 1, content="c")
    unheard(store, first, second)
    assert again(store, 2) == first
    heard(store.client, first)
    assert again(store, 3) == second
    heard(store.client, second)
    assert again(store, 4) not in (first, second)
    assert not store.client.zrange(keys.made("*"), 0, -1)


def test_a_retry_joins_nothing_that_was_heard_of(store: Store) -> None:
    first = created(store, 0, content="c")
    unheard(store, first)
    heard(store.client, first)
    heard(store.client, first)
    assert again(store, 1) != first
    # What is heard of has no hold on what is newer.
    unheard(store, f"{1:024x}")
    heard(store.client, first)
    heard(store.client, "f" * 24)
    assert again(store, 2) == f"{1:024x}"


@pytest.mark.parametrize("how", ["failed", "cancelling", "cancelled", "stopped", "expired"])
def test_a_retry_joins_nothing_that_was_stopped(store: Store, store_url: str, how: str) -> None:
    first = created(store, 0, content="c")
    if how == "cancelling":
        openai_batches.wish(store.client, first, "cancelled")
    elif how == "stopped":
        made(store, first)
        store.cancel(first)
    elif how == "expired":
        made(store, first, deadline_at=1.0)
        run(leases.reap, store_url)
        assert store.status(first).closing == "x"
    else:
        openai_batches.fail(store.client, first, "failed" if how == "failed" else "cancelled", b"", 100)
    unheard(store, first)
    assert again(store, 1) != first


def test_a_retry_of_a_native_submit_follows_the_same_rules(store: Store) -> None:
    def submit(again: bool = False) -> str:
        return store.submit(requests(2), NewBatch(tenant=TENANT, alike="t", again=again)).batch_id

    first = submit()
    unheard(store)
    second = submit(again=True)
    assert second != first  # it is too soon
    unheard(store, second)
    assert submit(again=True) == second
    heard(store.client, second)
    third = submit(again=True)
    assert third not in (first, second)
    unheard(store, third)
    store.cancel(third)
    assert submit(again=True) != third


# -- due


def test_one_who_takes_it_has_it_to_itself(store: Store) -> None:
    batch = created(store)
    assert openai_batches.take(store.client) == Due(batch, "validate", TENANT)
    assert openai_batches.take(store.client) is None
    assert due(store)[batch] == pytest.approx(redis_time(store.client) + openai_batches.LEASE_S, abs=5)
    assert openai_batches.renew(store.client, batch, 100.0)
    assert due(store)[batch] == pytest.approx(redis_time(store.client) + 100.0, abs=5)
    assert openai_batches.take(store.client) is None
    openai_batches.renew(store.client, batch, 0.0)
    assert openai_batches.take(store.client, 0.0) == Due(batch, "validate", TENANT)
    assert openai_batches.take(store.client) == Due(batch, "validate", TENANT)  # of one whose lease has run out
    assert set(due(store)) == {batch}


def test_the_oldest_is_taken_first_and_what_is_put_off_is_not_taken(store: Store) -> None:
    batches = [created(store, number) for number in range(4)]
    openai_batches.renew(store.client, batches[1], 100.0)
    assert [openai_batches.take(store.client) for _ in range(4)] == [
        Due(batches[0], "validate", TENANT),
        Due(batches[2], "validate", TENANT),
        Due(batches[3], "validate", TENANT),
        None,
    ]
    # What comes in meanwhile need not wait for any of their leases.
    assert openai_batches.take(store.client) is None
    fresh = created(store, 4)
    assert openai_batches.take(store.client) == Due(fresh, "validate", TENANT)
    assert set(due(store)) == {*batches, fresh}


def test_what_is_gone_is_cleaned_up_and_keeps_no_other_tenant_waiting(store: Store) -> None:
    gone = [created(store, number) for number in range(50)]
    store.client.delete(*map(keys.openai, gone))
    other = new(100, "other")
    openai_batches.create(store.client, other)
    assert openai_batches.take(store.client) == Due(other.batch_id, "validate", "other")
    batch = created(store, 101)
    found: set[Due | None] = set()
    for _ in range(len(gone) + 1):
        found.add(openai_batches.take(store.client))
    assert found - {None} == {Due(batch, "validate", TENANT)}
    assert list(due(store)) == [batch]
    store.client.delete(keys.openai(batch))
    assert openai_batches.take(store.client, busy=["other"]) is None
    store.client.zadd(keys.tenant_due(TENANT), {batch: 1.0})
    store.client.zadd(keys.OPENAI_DUE, {TENANT: 1.0})
    assert openai_batches.take(store.client) is None
    assert due(store) == {}
    assert store.client.zrange(keys.OPENAI_DUE, 0, -1) == [b"other"]


def many_due(store: Store, count: int) -> list[str]:
    """So many of the tenant's, all of them due for long."""
    names = [f"{number:024x}" for number in range(count)]
    pipe = store.client.pipeline(transaction=False)
    for name in names:
        pipe.hset(keys.openai(name), mapping={"tenant": TENANT, "created_at": "1.0"})
    pipe.zadd(keys.tenant_due(TENANT), dict.fromkeys(names, 1.0))
    pipe.zadd(keys.OPENAI_DUE, {TENANT: 1.0})
    pipe.execute()
    return names


def test_thousands_of_one_tenant_keep_no_other_waiting(store: Store) -> None:
    names = many_due(store, 3_000)
    first = openai_batches.take(store.client)
    other = new(5_000, "other")
    openai_batches.create(store.client, other)
    last = new(5_001, "last")
    openai_batches.create(store.client, last)
    found = [openai_batches.take(store.client) for _ in range(4)]
    assert {first, *found} == {
        *(Due(name, "validate", TENANT) for name in names[:3]),
        Due(other.batch_id, "validate", "other"),
        Due(last.batch_id, "validate", "last"),
    }
    assert Due(other.batch_id, "validate", "other") in found[:2]
    # Renewals of what one is at, as they go on all the time, win no turn.
    for number in range(6_000, 6_006):
        fresh = new(number, "other")
        openai_batches.create(store.client, fresh)
        pair = []
        for name in names[:2]:
            openai_batches.renew(store.client, name)
            pair.append(openai_batches.take(store.client))
        assert Due(fresh.batch_id, "validate", "other") in pair
        assert [due.tenant for due in pair if due].count(TENANT) == 1
    assert len(due(store)) == 3_000


def test_a_tenant_that_is_busy_keeps_no_other_waiting_and_its_turn(store: Store) -> None:
    names = many_due(store, 3_000)
    others = [new(5_000 + number, "other") for number in range(3)]
    for other in others:
        openai_batches.create(store.client, other)
    assert openai_batches.take(store.client, busy=[TENANT]) == Due(others[0].batch_id, "validate", "other")
    assert openai_batches.take(store.client, busy=["other", TENANT]) is None
    assert openai_batches.take(store.client, busy=[TENANT]) == Due(others[1].batch_id, "validate", "other")
    assert openai_batches.take(store.client) == Due(names[0], "validate", TENANT)
    assert openai_batches.take(store.client, busy=["other"]) == Due(names[1], "validate", TENANT)
    assert openai_batches.take(store.client) == Due(others[2].batch_id, "validate", "other")


def test_tenants_take_turns(store: Store) -> None:
    """Whoever came first with however many, each has one after the other."""
    tenants = ("a", "b", "c")
    for place, tenant in enumerate(tenants):
        for number in range(4):
            openai_batches.create(store.client, new(place * 10 + number, tenant))
    found = [openai_batches.take(store.client) for _ in range(12)]
    assert [due.tenant for due in found if due] == list(tenants) * 4
    for tenant in tenants:
        ids = [due.batch_id for due in found if due and due.tenant == tenant]
        assert ids == sorted(ids)
        assert set(due(store, tenant)) == set(ids)
    assert openai_batches.take(store.client) is None


def test_what_was_handed_on_is_taken_before_its_lease_ends(store: Store) -> None:
    batch = created(store)
    openai_batches.create(store.client, new(1, "other"))
    while openai_batches.take(store.client):
        pass
    openai_batches.renew(store.client, batch, 0.0)
    assert openai_batches.take(store.client) == Due(batch, "validate", TENANT)
    assert openai_batches.take(store.client) is None


def test_a_renewal_brings_nothing_back_that_is_no_longer_due(store: Store) -> None:
    batch = created(store)
    openai_batches.fail(store.client, batch, "failed", b"", 100)
    openai_batches.renew(store.client, batch)
    assert due(store) == {}


def test_what_is_to_be_done_follows_what_it_has_become(store: Store, store_url: str) -> None:
    batch = created(store)
    assert taken(store) == Due(batch, "validate", TENANT)
    made(store, batch)
    assert taken(store) == Due(batch, "made", TENANT)  # whoever made it has died before it said so
    openai_batches.made(store.client, batch, "m")
    assert (due(store), get(store, batch).model) == ({}, "m")
    end(store, store_url, "ss")
    assert taken(store) == Due(batch, "finalize", TENANT)
    assert finalized(store, batch)
    assert due(store) == {}


def test_one_that_ends_before_it_is_told_made_is_finalized_all_the_same(store: Store, store_url: str) -> None:
    batch = created(store)
    openai_batches.take(store.client)
    made(store, batch)
    end(store, store_url, "ss")
    openai_batches.made(store.client, batch, "m")
    assert openai_batches.take(store.client) == Due(batch, "finalize", TENANT)
    assert finalized(store, batch)
    # And once more by somebody who was slow: it stays over.
    openai_batches.made(store.client, batch, "m")
    assert due(store) == {}


# -- wishes while it is validated


def test_cancelled_before_it_is_a_batch(store: Store) -> None:
    batch = created(store, callback=URL)
    assert openai_batches.renew(store.client, batch)
    assert openai_batches.wish(store.client, batch, "cancelled")
    first = get(store, batch)
    assert (first.status, first.cancelled_at) == ("cancelling", None)
    assert openai_batches.wish(store.client, batch, "cancelled")
    assert get(store, batch).cancelling_at == first.cancelling_at
    assert not openai_batches.renew(store.client, batch)
    openai_batches.fail(store.client, batch, "cancelled", b"", 100)
    found = get(store, batch)
    assert (found.status, found.errors_bytes, found.made) == ("cancelled", 0, None)
    assert openai_batches.errors_of(store.client, batch) == b""
    assert due(store) == {}
    assert events(store) == [("batch.cancelled", f"batch_{batch}")]
    assert not openai_batches.wish(store.client, batch, "paused")


@pytest.mark.parametrize("how", ["missing", "cancelling", "cancelled", "failed"])
def test_what_nobody_wants_any_more_never_becomes_a_batch(store: Store, how: str) -> None:
    batch = f"{0:024x}"
    if how != "missing":
        created(store)
        openai_batches.wish(store.client, batch, "paused")
    if how == "cancelling":
        openai_batches.wish(store.client, batch, "cancelled")
    elif how == "cancelled":
        openai_batches.fail(store.client, batch, "cancelled", b"", 100)
    elif how == "failed":
        openai_batches.fail(store.client, batch, "failed", b"", 100)
    before = store.client.hgetall(keys.openai(batch))
    with pytest.raises(Unwanted):
        store.submit(requests(3), to_be(batch))
    assert store.client.hgetall(keys.openai(batch)) == before
    assert not store.client.exists(keys.batch(batch), keys.requests(batch))
    assert store.client.zcard(keys.BATCHES) == store.client.zcard(keys.OPEN) == 0
    assert not store.client.keys("mimoq:staged:*")
    # Nobody else is asked for such a record.
    assert store.submit(requests(3), NewBatch(tenant=TENANT, protocol="anthropic")).created


def test_one_that_is_a_batch_is_found_by_who_makes_it_once_more(store: Store) -> None:
    batch = created(store)
    made(store, batch)
    store.cancel(batch)
    again = store.submit(requests(2), to_be(batch, content=get(store, batch).content))
    assert (again.batch_id, again.created) == (batch, False)


def test_paused_while_it_was_validated_it_becomes_a_paused_batch(store: Store, store_url: str) -> None:
    paused, resumed = (created(store, number) for number in range(2))
    for batch in (paused, resumed):
        assert openai_batches.wish(store.client, batch, "paused")
    assert openai_batches.wish(store.client, resumed, "running")
    for batch in (paused, resumed):
        made(store, batch)
        openai_batches.made(store.client, batch, "m")
    assert [store.status(batch).state for batch in (paused, resumed)] == ["paused", "running"]
    assert [get(store, batch).status for batch in (paused, resumed)] == ["in_progress"] * 2
    assert due(store) == {}
    assert {job.batch_id for job in end(store, store_url, "ss")} == {resumed}
    store.resume(paused)
    openai_batches.made(store.client, paused, "m")
    assert {job.batch_id for job in end(store, store_url, "ss")} == {paused}


def test_a_wish_for_what_is_a_batch_is_not_noted(store: Store) -> None:
    batch = created(store)
    made(store, batch)
    for wish in ("cancelled", "paused", "running"):
        assert not openai_batches.wish(store.client, batch, wish)
    openai_batches.made(store.client, batch, "")
    found = get(store, batch)
    assert (found.status, found.model, found.cancelling_at) == ("in_progress", "", None)
    assert store.status(batch).state == "running"


def test_a_model_that_is_known_is_not_forgotten(store: Store) -> None:
    batch = created(store, model="m")
    made(store, batch)
    openai_batches.made(store.client, batch, "")
    assert get(store, batch).model == "m"
    openai_batches.made(store.client, "f" * 24, "m")
    assert not store.client.exists(keys.openai("f" * 24))


# -- ended without ever having been a batch


def test_what_is_wrong_is_kept_and_told_once(store: Store) -> None:
    batch = created(store, callback=URL, identity="i")
    told = json.dumps({"data": [{"code": "x", "line": 3, "message": "é", "param": None}], "object": "list"}).encode()
    for _ in range(2):
        openai_batches.fail(store.client, batch, "failed", told, 100)
    openai_batches.fail(store.client, batch, "cancelled", b"", 100)
    found = get(store, batch)
    assert (found.status, found.errors_bytes, found.cancelled_at) == ("failed", len(told), None)
    assert openai_batches.errors_of(store.client, batch) == told
    assert events(store) == [("batch.failed", f"batch_{batch}")]
    assert due(store) == {}
    assert 0 < store.client.ttl(keys.openai(batch)) <= 100
    assert 0 < store.client.ttl(keys.identity("i")) <= 100


def test_nobody_fails_what_is_a_batch(store: Store) -> None:
    batch = created(store, callback=URL)
    made(store, batch)
    openai_batches.fail(store.client, batch, "failed", b"{}", 100)
    assert (get(store, batch).status, events(store)) == ("in_progress", [])
    assert store.client.ttl(keys.openai(batch)) == -1
    openai_batches.fail(store.client, "f" * 24, "failed", b"{}", 100)
    assert not store.client.exists(keys.openai("f" * 24))


def test_an_identity_that_stands_for_a_newer_batch_outlives_the_failed_one(store: Store) -> None:
    batch = created(store, identity="i")
    store.forget_identity("i")
    newer = created(store, 1, identity="i")
    openai_batches.fail(store.client, batch, "failed", b"{}", 100)
    assert store.client.get(keys.identity("i")) == newer.encode()
    assert store.client.ttl(keys.identity("i")) == -1


# -- finalized


def test_its_end_makes_its_files_and_tells_once(store: Store, store_url: str) -> None:
    batch = created(store, callback=URL)
    made(store, batch, 3, ttl_s=1_000)
    end(store, store_url, "sfs")
    found = get(store, batch)
    assert (found.status, events(store)) == ("finalizing", [])
    assert [finalized(store, batch, (2, 50), (1, 20)) for _ in range(2)] == [True, False]
    found = get(store, batch)
    assert (found.status, events(store)) == ("completed", [("batch.completed", f"batch_{batch}")])
    assert found.made is not None
    assert found.made.usage.total_tokens == 3 * USAGE.total_tokens
    output, errors = (files.get(store.client, TENANT, files.id_of(batch, part)) for part in ("output", "error"))
    assert (output.bytes, errors.bytes, output.purpose) == (50, 20, "batch_output")
    assert output.filename == f"batch_{batch}_output.jsonl"
    assert output.created_at == errors.created_at == pytest.approx(found.finalized_at)
    # They go when the results go.
    left = store.client.ttl(keys.batch(batch))
    for name in (keys.file(output.file_id), keys.file(errors.file_id), keys.openai(batch)):
        assert left - 2 <= store.client.ttl(name) <= left, name
    listed, _ = files.files_page(store.client, TENANT, Asked(5))
    assert {file.file_id for file in listed} == {output.file_id, errors.file_id}


def test_a_file_without_lines_is_none(store: Store, store_url: str) -> None:
    batch = created(store)
    made(store, batch)
    end(store, store_url, "ss")
    assert finalized(store, batch, (2, 50), (0, 0))
    assert [file.file_id for file in files.files_page(store.client, TENANT, Asked(5))[0]] == [
        files.id_of(batch, "output")
    ]
    with pytest.raises(NotFound):
        files.get(store.client, TENANT, files.id_of(batch, "error"))


def test_files_that_go_before_the_batch(store: Store, store_url: str) -> None:
    batch = created(store, output_ttl_s=300)
    made(store, batch, 1, ttl_s=1_000)
    end(store, store_url, "s")
    assert finalized(store, batch, (1, 10), (0, 0))
    file = files.get(store.client, TENANT, files.id_of(batch, "output"))
    assert file.expires_at == pytest.approx(file.created_at + 300)
    assert 0 < store.client.ttl(keys.file(file.file_id)) <= 300
    assert store.client.ttl(keys.batch(batch)) > 900


def test_a_cancelled_one_ends_once_nobody_holds_any_of_it(store: Store, store_url: str) -> None:
    batch = created(store, callback=URL)
    made(store, batch, 2, slice_size=1)
    openai_batches.made(store.client, batch, "m")
    (held,) = run(lambda client: leases.claim(client, "w", "bulk", [""], 1, 600.0), store_url)
    store.cancel(batch)
    assert (get(store, batch).status, due(store)) == ("cancelling", {})
    run(lambda client: leases.give_back(client, batch, [leases.Back(held)]), store_url)
    assert (get(store, batch).status, list(due(store))) == ("cancelling", [batch])
    assert finalized(store, batch, (0, 0), (2, 20))
    assert (get(store, batch).status, events(store)) == ("cancelled", [("batch.cancelled", f"batch_{batch}")])


def test_an_expired_one_keeps_what_was_answered(store: Store, store_url: str) -> None:
    batch = created(store, callback=URL)
    made(store, batch, 3, slice_size=1, deadline_s=0.3)
    (held,) = run(lambda client: leases.claim(client, "w", "bulk", [""], 1, 600.0), store_url)
    run(lambda client: leases.finish(client, batch, [ending(held, "s")]), store_url)
    found = get(store, batch)
    assert found.made is not None
    assert found.made.deadline_at is not None
    wait_until(store.client, found.made.deadline_at)
    run(leases.reap, store_url)
    assert get(store, batch).status == "finalizing"
    assert _sweep(store.client, [keys.PREFIX], [batch, 10]) == 0
    assert finalized(store, batch, (1, 10), (2, 20))
    found = get(store, batch)
    assert found.made is not None
    assert (found.status, found.made.succeeded, found.made.expired) == ("expired", 1, 2)
    assert events(store) == [("batch.expired", f"batch_{batch}")]


def test_an_end_that_was_measured_and_is_none_any_more(store: Store, store_url: str) -> None:
    """It was opened again while somebody measured its files."""
    batch = created(store, callback=URL)
    made(store, batch, 2)
    end(store, store_url, "sf")
    stale = store.status(batch).finished_at
    assert stale is not None
    assert store.requeue_failed(batch, 100.0) == 1
    assert not openai_batches.finalize(store.client, batch, stale, (1, 1), (1, 1))
    end(store, store_url, "s")
    assert not openai_batches.finalize(store.client, batch, stale, (1, 1), (1, 1))
    assert (get(store, batch).status, events(store)) == ("finalizing", [])
    assert list(due(store)) == [batch]
    assert finalized(store, batch, (2, 2), (0, 0))


def test_opened_again_it_is_as_if_it_had_never_ended(store: Store, store_url: str) -> None:
    batch = created(store, callback=URL)
    made(store, batch, 2)
    end(store, store_url, "sf")
    assert finalized(store, batch)
    assert store.requeue_failed(batch, 100.0) == 1
    found = get(store, batch)
    assert (found.status, found.finalized_at, due(store)) == ("in_progress", None, {})
    assert found.made is not None
    assert found.made.deadline_at == pytest.approx(redis_time(store.client) + 100.0, abs=5)
    assert store.client.ttl(keys.openai(batch)) == -1
    assert files.files_page(store.client, TENANT, Asked(5)) == ([], False)
    end(store, store_url, "s")
    assert finalized(store, batch, (2, 33), (0, 0))
    assert files.get(store.client, TENANT, files.id_of(batch, "output")).bytes == 33
    assert events(store) == [("batch.completed", f"batch_{batch}")] * 2
    assert store.client.zcard(keys.tenant_events(TENANT)) == 2  # each with an id of its own


# -- deleted


def test_a_deleted_batch_keeps_its_place_only(store: Store, store_url: str) -> None:
    batches = [created(store, number, identity=f"i{number}") for number in range(3)]
    made(store, batches[1])
    end(store, store_url, "sf")
    assert finalized(store, batches[1])
    with pytest.raises(NotFound):
        store.delete(batches[1], "other")
    store.delete(batches[1], TENANT)
    with pytest.raises(NotFound):
        get(store, batches[1])
    assert not store.client.keys(f"mimoq:batch:{batches[1]}*")
    assert not store.client.keys(f"celery-task-meta-{batches[1]}*")
    assert not store.client.exists(keys.identity("i1"))
    assert store.client.zscore(keys.BATCHES, batches[1]) is None
    page, more = openai_batches.batches_page(store.client, TENANT, Asked(2, batches[1]))
    assert ([batch.batch_id for batch in page], more) == ([batches[0]], False)
    assert [batch.batch_id for batch in openai_batches.batches_page(store.client, TENANT, Asked(9))[0]] == [
        batches[2],
        batches[0],
    ]


def test_one_that_runs_is_not_deleted(store: Store) -> None:
    batch = created(store)
    made(store, batch)
    with pytest.raises(Conflict):
        store.delete(batch, TENANT)
    assert get(store, batch).status == "in_progress"


def test_a_deleted_one_is_not_finalized(store: Store, store_url: str) -> None:
    batch = created(store, callback=URL)
    made(store, batch, 1)
    end(store, store_url, "s")
    finished_at = store.status(batch).finished_at
    assert finished_at is not None
    store.delete(batch, TENANT)
    assert openai_batches.take(store.client) is None
    assert due(store) == {}
    assert not openai_batches.finalize(store.client, batch, finished_at, (1, 1), (0, 0))
    assert (store.client.exists(keys.openai(batch)), events(store)) == (0, [])


def test_records_tell_no_more_than_they_must(store: Store) -> None:
    asked = replace(new(), identity="an identity", content="a digest")
    openai_batches.create(store.client, asked)
    shown = repr(get(store, asked.batch_id))
    assert "an identity" not in shown
    assert "a digest" not in shown
