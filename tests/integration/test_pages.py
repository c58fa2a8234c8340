"""Pages of a tenant's jobs and batches: the whole in any state and any page size, with bounded work for each page."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobs import keys, pages
from jobs.connections import connect
from jobs.errors import NotFound
from jobs.pages import Page, batches_page, jobs_page
from jobs.states import LETTERS, JobState, job_id
from jobs.store import NewBatch, Store
from tests.integration.store_model import requests

TENANT = "t"


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    client = connect(store_url)
    yield Store(client)
    client.close()


def batch(store: Store, jobs: int = 1, tenant: str = TENANT, **more: Any) -> str:
    """A batch of so many jobs."""
    return store.submit(requests(jobs), NewBatch(tenant=tenant, **more))[0]


def single(store: Store) -> str:
    """A batch that is a single job."""
    found = batch(store)
    store.client.hset(keys.batch(found), "single", 1)
    return found


def end(store: Store, of: str, index: int, state: JobState) -> None:
    """Writes down that a job has ended: its state, and the count of it, which never disagree."""
    store.client.setrange(keys.states(of), index, LETTERS[state])
    store.client.hincrby(keys.batch(of), state, 1)


def vast(store: Store, jobs: int, ended: dict[int, JobState]) -> str:
    """A batch that says it has so many jobs, of which these have ended."""
    found = batch(store)
    store.client.hset(keys.batch(found), "total", jobs)
    for index, state in ended.items():
        end(store, found, index, state)
    return found


def all_pages(page: Callable[[str | None], Page[Any]], most: int = 10_000) -> list[Any]:
    """The items of page after page."""
    found: list[Any] = []
    after: str | None = None
    for _ in range(most):
        got = page(after)
        found += got.items
        if (after := got.after) is None:
            return found
    raise AssertionError("the pages never end")


def jobs(
    store: Store, of: str | None = None, state: JobState | None = None, limit: int = 2, tenant: str = TENANT
) -> list[str]:
    """Ids on all pages of jobs."""
    found = all_pages(lambda after: jobs_page(store.client, tenant, of, state, limit, after))
    return [job_id(item.batch_id, item.place) for item in found]


@pytest.mark.parametrize("seed", range(5))
def test_pages_of_any_size_hold_exactly_what_there_is(store: Store, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(seed)
    # Small bounds, so that pages end for every reason there is.
    monkeypatch.setattr(pages, "STEP_JOBS", dice.choice([1, 3, 50]))
    monkeypatch.setattr(pages, "MOST_JOBS", dice.choice([5, 40]))
    monkeypatch.setattr(pages, "STEP_BATCHES", dice.choice([1, 2, 500]))
    monkeypatch.setattr(pages, "MOST_BATCHES", dice.choice([2, 500]))
    made: list[str] = []
    singles: set[str] = set()
    for _ in range(12):
        size = dice.choice([0, 0, 1, 2, 7, 12])
        found = batch(store, size, slice_size=5) if size else single(store)
        made.insert(0, found)
        if not size:
            singles.add(found)
        total = store.status(found).total
        for index in range(total):
            fate = dice.choice([None, None, "claimed", *LETTERS])
            if fate == "claimed":
                store.client.hset(keys.claims(found), str(index), "token")
            elif fate is not None:
                end(store, found, index, JobState(fate))
        if dice.random() < 0.4:
            store.client.hset(keys.batch(found), "closing", dice.choice(["c", "x"]))
    batch(store, 3, "another")
    everything = [job_id(found, index) for found in made for index in range(store.status(found).total)]
    states = {id: store.job_state(id.rpartition("-")[0], int(id.rpartition("-")[2])) for id in everything}
    for limit in (1, 2, 7, 100):
        assert jobs(store, limit=limit) == everything
        for state in JobState:
            assert jobs(store, None, state, limit) == [id for id in everything if states[id] is state]
            one = made[dice.randrange(len(made))]
            wanted = [id for id in everything if states[id] is state and id.startswith(one)]
            assert jobs(store, one, state, limit) == wanted
        found_batches = all_pages(lambda after: batches_page(store.client, TENANT, limit, after))  # noqa: B023
        assert found_batches == [id for id in made if id not in singles]


def test_a_page_is_full_or_says_where_to_go_on(store: Store) -> None:
    first, second = batch(store, 2), batch(store, 2)
    page = jobs_page(store.client, TENANT, None, None, 4, None)
    assert ([item.batch_id for item in page.items], page.after) == ([second, second, first, first], None)
    page = jobs_page(store.client, TENANT, None, None, 2, None)
    assert page.after == job_id(second, 1)
    assert jobs_page(store.client, TENANT, None, None, 2, page.after).after is None


def test_a_state_that_is_rare_in_a_vast_batch(store: Store) -> None:
    rare = {0: JobState.FAILED, 777_777: JobState.FAILED, 1_999_999: JobState.FAILED}
    found = vast(store, 2_000_000, rare)
    before = int(store.client.info("stats")["total_commands_processed"])
    assert jobs(store, found, JobState.FAILED) == [job_id(found, index) for index in rare]
    assert jobs(store, None, JobState.SUCCEEDED) == []
    # Work goes by steps, not by jobs; a page that has looked at enough is short, and says that there is more.
    assert int(store.client.info("stats")["total_commands_processed"]) - before < 200
    page = jobs_page(store.client, TENANT, found, JobState.FAILED, 2, None)
    assert (len(page.items), page.after) == (1, job_id(found, pages.MOST_JOBS - 1))


def test_round_trips_go_by_steps_and_not_by_batches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "STEP_BATCHES", 10)
    wanted: dict[JobState, list[str]] = {state: [] for state in JobState if state is not JobState.EXPIRED}
    for _ in range(9):
        for state, ids in wanted.items():
            found = single(store)
            if state is JobState.RUNNING:
                store.client.hset(keys.claims(found), "0", "token")
            elif state is JobState.CANCELLED:
                store.client.hset(keys.batch(found), "closing", "c")
            elif state.terminal:
                end(store, found, 0, state)
            ids.insert(0, job_id(found, 0))
    mixed = batch(store, 3)
    end(store, mixed, 1, JobState.FAILED)
    wanted[JobState.FAILED].insert(0, job_id(mixed, 1))
    wanted[JobState.QUEUED][:0] = [job_id(mixed, 0), job_id(mixed, 2)]
    trips: list[object] = []
    connection = store.client.connection_pool.connection_class
    send = connection.send_packed_command

    def counting(self: Any, *args: Any, **more: Any) -> Any:
        trips.append(None)
        return send(self, *args, **more)

    monkeypatch.setattr(connection, "send_packed_command", counting)
    # 46 batches are 5 steps, each of their ids and their counts; only a real batch that has such jobs is looked into.
    steps = 2 * 5
    for state in JobState:
        trips.clear()
        page = jobs_page(store.client, TENANT, None, state, 100, None)
        assert [job_id(item.batch_id, item.place) for item in page.items] == wanted.get(state, [])
        inside = {JobState.FAILED: 2, JobState.QUEUED: 3}.get(state, 0)
        assert len(trips) == steps + inside, state
    trips.clear()
    assert len(jobs_page(store.client, TENANT, None, None, 100, None).items) == 48
    assert len(trips) == steps + 1


def test_a_vast_batch_is_read_no_further_than_a_page_needs(store: Store) -> None:
    found = vast(store, 50_000_000, {})
    page = jobs_page(store.client, TENANT, None, None, 3, job_id(found, 41_999_999))
    assert [item.place for item in page.items] == [42_000_000, 42_000_001, 42_000_002]


def test_batches_are_listed_without_single_jobs(store: Store) -> None:
    made: list[str] = []
    for number in range(6):
        if number % 2:
            single(store)
        else:
            made.insert(0, batch(store))
    for limit in (1, 2, 3, 4):
        assert all_pages(lambda after: batches_page(store.client, TENANT, limit, after)) == made  # noqa: B023
    page = batches_page(store.client, TENANT, 3, None)
    assert page.after is None
    assert batches_page(store.client, "another", 3, None) == Page([], None)


def test_what_is_no_longer_kept_is_passed_over_and_forgotten(store: Store) -> None:
    made = [batch(store) for _ in range(7)]
    for found in made[1::2]:
        store.client.delete(keys.batch(found))
    kept = made[::2][::-1]
    assert all_pages(lambda after: batches_page(store.client, TENANT, 1, after)) == kept
    assert store.client.zcard(keys.tenant_batches(TENANT)) == len(kept)
    assert jobs(store) == [job_id(found, 0) for found in kept]


def test_a_page_behind_a_batch_that_has_gone_meanwhile(store: Store) -> None:
    old, gone, _ = batch(store), batch(store), batch(store)
    page = jobs_page(store.client, TENANT, None, None, 2, None)
    assert page.after == job_id(gone, 0)
    store.client.delete(keys.batch(gone))
    with pytest.raises(NotFound, match="no batch"):
        jobs_page(store.client, TENANT, None, None, 2, page.after)
    assert jobs(store)[-1] == job_id(old, 0)


@pytest.mark.parametrize("after", ["x", "", "-0", "x-", "x-y", f"{'0' * 24}-0", f"{'0' * 24}-{'9' * 170}"])
def test_cursors_that_are_none(store: Store, after: str) -> None:
    found = batch(store)
    for of in (None, found):
        with pytest.raises(NotFound):
            jobs_page(store.client, TENANT, of, None, 2, after)
    with pytest.raises(NotFound):
        batches_page(store.client, TENANT, 2, after)


def test_a_cursor_behind_the_last_job(store: Store) -> None:
    old, new = batch(store), batch(store, 2)
    assert jobs_page(store.client, TENANT, new, None, 2, job_id(new, 99)).items == []
    assert [item.batch_id for item in jobs_page(store.client, TENANT, None, None, 2, job_id(new, 99)).items] == [old]


def test_another_tenants_batch_is_none(store: Store) -> None:
    found = batch(store, 2, "another")
    for of, after in ((found, None), (None, job_id(found, 0)), (found, job_id(found, 0))):
        with pytest.raises(NotFound):
            jobs_page(store.client, TENANT, of, None, 2, after)
