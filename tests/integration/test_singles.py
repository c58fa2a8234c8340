"""Single jobs that are written together, and calls that are made again, with a real Valkey."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from jobs import keys
from jobs.backends import RedisResults
from jobs.connections import connect
from jobs.errors import StoreUnavailable, Unanswered
from jobs.joins import answered, digest_of, join, left
from jobs.patience import no_patience
from jobs.room import Room
from jobs.singles import Enlisted, Single, enlist
from jobs.store import Store
from jobs.submission import NewBatch
from tests.components import Valkey
from tests.integration.store_model import requests

DIGEST = digest_of("t", "/v1/chat/completions", b"{}")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    client = connect(store_url)
    yield Store(client)
    client.config_set("maxmemory", 0)
    client.close()


def call(again: bool = False) -> Single:
    """A waiting call, one like the other."""
    return Single(NewBatch(tenant="t", lane="interactive"), requests(1)[0], DIGEST, 60, again)


def made(store: Store, *singles: Single) -> list[Enlisted]:
    """What came of these, of which none fails."""
    came = enlist(store.client, singles, no_patience(), Room(store.client, store.backend))
    found = [item for item in came if isinstance(item, Enlisted)]
    assert len(found) == len(came)
    return found


def test_a_call_made_again_joins_also_the_one_that_is_written_with_it(store: Store) -> None:
    first, second = made(store, call(), call(again=True))
    assert (first.created, second.created) == (True, False)
    assert second.batch_id == first.batch_id
    assert store.client.zcard(keys.BATCHES) == 1


def test_calls_alike_that_are_meant_are_jobs_of_their_own_and_each_is_joined_once(store: Store) -> None:
    first, second = made(store, call(), call())
    assert first.batch_id != second.batch_id
    left(store.client, DIGEST, second.batch_id)
    again = made(store, call(again=True), call(again=True))
    assert [item.batch_id for item in again] == [second.batch_id, first.batch_id]


def test_what_was_answered_is_not_joined(store: Store) -> None:
    (first,) = made(store, call())
    answered(store.client, DIGEST, first.batch_id)
    (again,) = made(store, call(again=True))
    assert (again.created, again.batch_id != first.batch_id) == (True, True)


def test_out_of_memory_a_call_made_again_still_finds_its_job(store: Store) -> None:
    (first,) = made(store, call())
    store.client.config_set("maxmemory", 1)
    assert join(store.client, DIGEST) == first.batch_id
    assert join(store.client, "0" * 32) is None


def test_who_got_no_answer_is_told_that_it_may_have_been_made() -> None:
    valkey = Valkey()
    try:
        client = connect(valkey.url, silent_s=0.2)
        with contextlib.closing(client):
            room = Room(client, RedisResults(client, with_state=True))
            room.check(1, 1)  # so that what goes unanswered is the submit itself
            valkey.pause()
            came = enlist(client, [call(), call()], no_patience(), room)
            valkey.go_on()
            assert [type(item) for item in came] == [Unanswered, Unanswered]
            assert isinstance(came[0], StoreUnavailable)
            assert "Idempotency-Key" in str(came[0])
    finally:
        valkey.stop()
