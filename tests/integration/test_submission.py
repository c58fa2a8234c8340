"""Submitting while things go wrong: repeated, cut at any command, killed, with a store that is away, forgetful or full."""

from __future__ import annotations

import logging
import os
import random
import re
import socket
import string
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import connections, keys, leases, patience, room, submission
from jobs.backends import RedisResults
from jobs.connections import connect
from jobs.errors import Conflict, MimoqError, NoRoom, StoreRefused, StoreUnavailable, UsageError
from jobs.patience import Patience
from jobs.requests import CHAT, Request
from jobs.results import About, success_payload
from jobs.singles import Single, enlist
from jobs.states import BatchState
from jobs.store import BatchStatus, Store
from jobs.submission import STAGING_TTL_S, NewBatch
from producers import Producer
from producers.connection import Connection
from tests.integration.store_model import USAGE, ending, leftovers, requests, run
from tests.integration.submission_stand import Victims, Wire, durable

#: Where a wire is cut at a command.
WHERE = ("before", "half", "after")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    client = connect(store_url)
    yield Store(client)
    client.config_set("maxmemory", 0)
    client.close()


@pytest.fixture
def wire(store_url: str) -> Iterator[Wire]:
    found = Wire(store_url)
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sleeps long before a store is looked at again."""
    monkeypatch.setattr(patience, "LOOK_S", 0.01)


def noise(count: int, size: int = 9_000, seed: int = 2) -> list[Request]:
    """Requests that hardly compress."""
    letters = random.Random(seed)
    texts = ("".join(letters.choices(string.ascii_letters, k=size)).encode() for _ in range(count))
    return [Request(CHAT, b'{"x":"%s"}' % text, f"c{index}") for index, text in enumerate(texts)]


def staged(client: Any) -> list[bytes]:
    """The keys of what is staged."""
    found: list[bytes] = client.keys(keys.PREFIX + "staged:*")
    return found


def whole(store: Store, batch_id: str, submitted: list[Request], slice_size: int = 50) -> bool:
    """Whether the batch has all of these requests, and nothing is staged any more."""
    found = store.requests(batch_id, range(len(submitted)), slice_size)
    assert [found[index] for index in range(len(submitted))] == submitted
    assert store.status(batch_id).total == len(submitted)
    assert store.client.ttl(keys.requests(batch_id)) == -1
    assert staged(store.client) == []
    return True


# -- staging


def test_what_is_staged_expires_and_a_cut_submit_leaves_no_batch(store: Store) -> None:
    ttls: list[int] = []

    def cut() -> Iterator[Request]:
        yield from noise(400)
        ttls.extend(store.client.ttl(name) for name in staged(store.client))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.submit(cut(), NewBatch())
    assert len(ttls) == 1
    assert STAGING_TTL_S - 60 < ttls[0] <= STAGING_TTL_S
    assert store.client.keys("*") == []


@pytest.mark.parametrize("lost", [keys.PREFIX + "staged", "a field"])
def test_requests_that_are_lost_half_way_make_no_batch(store: Store, lost: str) -> None:
    def slow() -> Iterator[Request]:
        for index, request in enumerate(noise(400)):
            if index == 300:
                (name,) = staged(store.client)
                if lost == "a field":
                    store.client.hdel(name, "1")
                else:
                    store.client.delete(name)
            yield request

    told: list[int] = []
    with pytest.raises(StoreUnavailable, match="nothing was submitted: submit again"):
        store.submit(slow(), NewBatch(identity="i"), told.append)
    assert told
    assert store.client.keys("*") == []


def test_a_slow_submit_gives_signs_of_life(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "SIGN_S", 0.0)

    def slow() -> Iterator[Request]:
        for index, request in enumerate(requests(70)):
            if index > 50:
                # Nothing of the block that is in the making has been written, but what was there lives on.
                (name,) = staged(store.client)
                assert store.client.hkeys(name) == [b"0"]
                assert store.client.ttl(name) > 100
                store.client.expire(name, 50)
            yield request

    batch_id, total, created = store.submit(slow(), NewBatch())
    assert (total, created) == (70, True)
    assert whole(store, batch_id, requests(70))


def test_a_batch_needs_a_request(store: Store) -> None:
    for new in (NewBatch(), NewBatch(identity="i")):
        with pytest.raises(MimoqError, match="at least one"):
            store.submit([], new)


# -- the same again


def test_an_identity_is_one_batch(store: Store, store_url: str) -> None:
    first, *_ = store.submit(requests(2), NewBatch(identity="i", content="a", ttl_s=100))
    assert store.submit(requests(2), NewBatch(identity="i", content="a")) == (first, 2, False)
    with pytest.raises(Conflict, match=first):
        store.submit(requests(3), NewBatch(identity="i", content="b"))
    assert store.kept_batches() == [first]
    assert store.batch_of_identity("i") == first
    assert store.batch_of_identity("j") is None
    assert not staged(store.client)

    store.forget_identity("i")
    second, _, created = store.submit(requests(1), NewBatch(identity="i", content="a", ttl_s=100))
    assert created
    assert second != first
    finish(store_url, first, 2)
    assert store.status(first).state is BatchState.FINISHED
    assert store.client.ttl(keys.identity("i")) == -1, "it is the second batch's by now"


def finish(url: str, batch_id: str, count: int, payload: bytes = b"{}") -> None:
    """Answers so many jobs of a batch with these bytes, uncompressed."""

    async def work(client: Any) -> None:
        jobs = [job for job in await leases.claim(client, "w", "bulk", [""], 1000) if job.batch_id == batch_id]
        about = About(None, CHAT, USAGE, [], 200)
        ends = [
            leases.End(job, "s", success_payload(job.job_id, payload, about, False), 1, USAGE) for job in jobs[:count]
        ]
        assert await leases.finish(client, batch_id, ends) == ["ended"] * count

    run(work, url)


def test_the_same_submit_again_changes_nothing(store: Store, store_url: str) -> None:
    new = NewBatch(slice_size=2)
    batch_id, *_ = store.submit(requests(4), new)
    finish(store_url, batch_id, 2)
    assert store.submit(requests(4), new) == (batch_id, 4, False)
    assert store.status(batch_id).succeeded == 2


def test_an_identity_whose_batch_has_gone_stands_for_nothing(store: Store) -> None:
    first, *_ = store.submit(requests(1), NewBatch(identity="i", content="a"))
    store.client.delete(keys.batch(first))
    assert store.batch_of_identity("i") is None
    assert store.submit(requests(1), NewBatch(identity="i", content="b"))[2]
    assert first not in store.kept_batches()


def test_the_content_is_all_that_is_stored_of_the_requests(store: Store) -> None:
    base = [Request(CHAT, b'{"a":1}', None), Request(CHAT, b'{"a":2}', "c")]
    others = [
        base[:1],
        base[::-1],
        [*base, base[0]],
        [Request("/v1/messages", b'{"a":1}', None), base[1]],
        [Request(CHAT, b'{"a":1} ', None), base[1]],
        [Request(CHAT, b'{"a":1}', ""), base[1]],
        [base[0], Request(CHAT, b'{"a":2}', "d")],
    ]
    batch_id, *_ = store.submit(base, NewBatch(identity="i"))
    # How many lie in a block, the lane and the rest are no part of it.
    assert store.submit(base, NewBatch(identity="i", slice_size=1, lane="interactive")).batch_id == batch_id
    for other in others:
        with pytest.raises(Conflict, match=f"{batch_id}, which has other requests"):
            store.submit(other, NewBatch(identity="i"))
    assert store.kept_batches() == [batch_id]


def test_a_batch_that_is_there_costs_no_writing(store: Store) -> None:
    made = noise(300)
    first = store.submit(made, NewBatch(identity="i"))

    def writes() -> int:
        stats = store.client.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("hset", "rename", "eval", "evalsha"))

    before = writes()
    assert store.submit(made, NewBatch(identity="i")) == (first.batch_id, 300, False)
    assert writes() == before


def test_two_equal_submits_at_once_make_one_batch(store: Store, store_url: str) -> None:
    for other, kinds in ((noise(120), [True, False]), (noise(121), ["Conflict", True])):
        store.client.flushall()
        both = threading.Barrier(2)
        came: list[Any] = []

        def submit(made: list[Request], both: threading.Barrier = both, came: list[Any] = came) -> None:
            def stream() -> Iterator[Request]:
                yield from made
                both.wait(20)  # neither has found the other's batch

            mine = Store(connect(store_url))
            try:
                came.append(mine.submit(stream(), NewBatch(identity="i")))
            except Conflict as error:
                came.append(error)
            mine.client.close()

        threads = [threading.Thread(target=submit, args=(made,)) for made in (noise(120), other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        found = [type(one).__name__ if isinstance(one, Exception) else one.created for one in came]
        assert sorted(found, key=str) == sorted(kinds, key=str)
        (batch_id,) = store.kept_batches()
        assert {one.batch_id for one in came if not isinstance(one, Exception)} == {batch_id}
        assert staged(store.client) == []


def test_keys_of_the_python_client(store_url: str, caplog: pytest.LogCaptureFixture) -> None:
    secret = "order 66, Ünïcode \udc80"
    with Producer(redis_url=store_url, result_ttl_s=100) as producer:
        job_id = producer.submit("hello", idempotency_key=secret)
        assert producer.submit("hello", idempotency_key=secret, lane="interactive") == job_id
        assert producer.submit_many(["hello"], idempotency_key=secret) == job_id.removesuffix("-0")
        assert producer.submit("hello", idempotency_key="another") != job_id
        for other in (["hello", "you"], ["bye"]):
            with pytest.raises(Conflict, match="give these a key of their own") as refused:
                producer.submit_many(iter(other), idempotency_key=secret)
            assert "order" not in str(refused.value)
            assert refused.value.exit_code == 2
        with pytest.raises(UsageError, match="idempotency_key: must not be empty"):
            producer.submit("hello", idempotency_key="")
        store = producer._connection.store
        assert len(store.kept_batches()) == 2
        # A finished batch is found too, and its key goes with it.
        finish(store_url, job_id.removesuffix("-0"), 1)
        assert producer.submit("hello", idempotency_key=secret) == job_id
        (name,) = [name for name in store.client.keys(keys.identity("*")) if store.client.ttl(name) > 0]
        assert 0 < store.client.ttl(name) <= 100
        for stored in store.client.keys("*"):
            assert b"order" not in stored
        # One ring for each batch that was made, none for those that were there.
        assert store.client.llen("mimoq.bulk") + store.client.llen("mimoq.interactive") == 2
    assert "order" not in caplog.text


# -- cut anywhere


def test_a_producer_that_is_killed_anywhere_leaves_nothing_or_a_whole_batch(
    wire: Wire, store: Store, store_url: str
) -> None:
    """And the same again makes one batch, whatever the first had done."""
    prompts = [request.body.decode()[6:-2] for request in noise(7, 900)]
    settings = {"redis_url": wire.url, "slice_size": 2, "store_patience_s": 0.0}
    told: dict[str, Any] = {"settings": settings, "key": "k", "requests": prompts, "pipeline_bytes": 1_000}
    victims = Victims()
    try:
        with Producer(redis_url=store_url, slice_size=2) as producer:
            made = list(producer._requests(prompts, None))
            store.client.flushall()
            assert victims.submit(**told) == 0
            seen = list(wire.seen)
            assert seen.count(b"HSET") == 4, "a flush for each block"
            assert seen.index(b"EVALSHA") < seen.index(b"LPUSH"), "rings after the batch"
            outcomes = set()
            # Every command from before the first write to the creation, and a ring.
            for at in (*range(seen.index(b"MULTI"), seen.index(b"EVALSHA") + 3), seen.index(b"LPUSH") + 1):
                for where in WHERE:
                    store.client.flushall()
                    wire.cut(at, where, victims.kill)
                    ended = victims.submit(**told)
                    # What is left is nothing, or a batch; what is staged expires.
                    left = store.kept_batches()
                    for name in staged(store.client):
                        assert 0 < store.client.ttl(name) <= STAGING_TTL_S, f"{where} {at}"
                    outcomes.add((ended, len(left), len(staged(store.client))))
                    # The staged rest of the dead is in nobody's way.
                    batch_id = producer.submit_many(prompts, idempotency_key="k")
                    assert left in ([], [batch_id])
                    assert store.kept_batches() == [batch_id]
                    for name in staged(store.client):
                        store.client.delete(name)
                    assert whole(store, batch_id, made, 2)
            assert outcomes == {(-9, 0, 0), (-9, 0, 1), (-9, 1, 0)}
    finally:
        victims.close()


def test_a_wire_that_breaks_anywhere_costs_a_submit_nothing(
    wire: Wire, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "PIPELINE_BYTES", 1_000)
    made = noise(7, 900)

    def submit() -> tuple[list[str], Any]:
        said: list[str] = []
        client = connect(wire.url)
        found = Store(client, patience=Patience(5.0, said.append)).submit(made, NewBatch(identity="i", slice_size=2))
        client.close()
        return said, found

    assert submit()[0] == []
    seen = list(wire.seen)
    assert len(seen) > 20
    for at in range(1, len(seen) + 1):
        for where in WHERE:
            store.client.flushall()
            wire.cut(at, where)
            said, (batch_id, total, created) = submit()
            assert wire.was_cut
            assert said == [
                "waiting for the store: Redis does not answer (ConnectionError); nothing was lost",
                "the store answers again",
            ]
            # Also where the reply to its creation was lost: it is this submit's, and is to be rung for.
            assert (total, created) == (7, True)
            assert store.kept_batches() == [batch_id]
            assert whole(store, batch_id, made, 2)


def test_who_gives_up_says_what_is_not_known(wire: Wire, store: Store) -> None:
    mine = Store(connect(wire.url))
    mine.submit(requests(1), NewBatch())
    wire.mend()
    mine.submit(requests(1), NewBatch())
    (create,) = [at for at, name in enumerate(wire.seen, 1) if name == b"EVALSHA"]
    wire.cut(create, "after")
    new = NewBatch()
    with pytest.raises(StoreUnavailable, match=f"`mimoq status {new.batch_id}`"):
        mine.submit(requests(1), new)
    assert store.status(new.batch_id).total == 1
    mine.client.close()


# -- a store that is away


class Said(list[str]):
    """Lines that were said; `then` is done at the first."""

    def __init__(self, then: Callable[[], object]) -> None:
        super().__init__()
        self._then = then

    def __call__(self, line: str) -> None:
        self.append(line)
        if len(self) == 1:
            self._then()


def test_a_submit_outlives_a_restart_of_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "PIPELINE_BYTES", 100_000)
    made = noise(120)
    with durable(tmp_path / "data") as server:
        said = Said(server.start)
        store = Store(connect(server.url), patience=Patience(30.0, said))

        def stream() -> Iterator[Request]:
            for index, request in enumerate(made):
                if index == 60:
                    server.kill()
                yield request

        batch_id, total, created = store.submit(stream(), NewBatch(slice_size=5))
        assert (total, created, len(said)) == (120, True, 2)
        assert said[0].startswith("waiting for the store: Redis does not answer (")
        assert said[1] == "the store answers again"
        assert whole(store, batch_id, made, 5)
        assert store.kept_batches() == [batch_id]
        store.client.close()


def test_a_store_that_has_lost_its_last_writes_makes_no_half_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "PIPELINE_BYTES", 100_000)
    made = noise(120)
    with durable(tmp_path / "data") as server:
        said = Said(server.start)
        store = Store(connect(server.url), patience=Patience(30.0, said))
        sizes: list[int] = []

        def stream() -> Iterator[Request]:
            for index, request in enumerate(made):
                if index == 100:
                    server.kill(keep=sizes[-2])
                yield request

        new = NewBatch(slice_size=5, identity="i")
        with pytest.raises(StoreUnavailable, match="restarted without its last writes"):
            store.submit(stream(), new, lambda jobs: sizes.append(server.written))
        assert said
        assert store.client.keys("*") == []
        batch_id, *_ = store.submit(made, new)
        assert whole(store, batch_id, made, 5)
        store.client.close()


def test_a_paused_store_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SOCKET_TIMEOUT_S", 0.2)
    with durable(tmp_path / "data") as server:
        said = Said(server.resume)
        store = Store(connect(server.url), patience=Patience(30.0, said))

        def stream() -> Iterator[Request]:
            yield from requests(60)
            server.pause()

        batch_id, *_ = store.submit(stream(), NewBatch())
        assert "waiting for the store: Redis does not answer (TimeoutError); nothing was lost" in said
        assert whole(store, batch_id, requests(60))
        store.client.close()


def test_every_call_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with durable(tmp_path / "data") as server, Producer(redis_url=server.url, store_patience_s=30) as producer:
        batch_id = producer.submit_many(["one"])
        calls: list[Callable[[], Any]] = [
            lambda: producer.status(batch_id),
            lambda: producer.job(f"{batch_id}-0"),
            lambda: list(producer.results(batch_id, follow=False)),
            lambda: producer._connection.store.pause(batch_id),
            lambda: producer._connection.store.resume(batch_id),
            lambda: producer.cancel(batch_id),
            lambda: producer.wait(batch_id),
            lambda: Producer(redis_url=server.url).close(),
        ]
        back: list[threading.Thread] = []

        def restart(record: logging.LogRecord) -> bool:
            """When somebody says that he waits."""
            if record.getMessage().startswith("waiting for the store"):
                back.append(threading.Thread(target=server.start))
                back[-1].start()
            return True

        logging.getLogger("mimoq").addFilter(restart)
        try:
            for call in calls:
                server.kill()
                caplog.clear()
                call()
                waits = [record for record in caplog.records if record.name == "mimoq"]
                assert [record.levelname for record in waits] == ["WARNING", "WARNING"]
                assert [record.getMessage().split(":")[0] for record in waits] == [
                    "waiting for the store",
                    "the store answers again",
                ]
                back.pop().join()
        finally:
            logging.getLogger("mimoq").removeFilter(restart)
        status = producer.status(batch_id)
        assert isinstance(status, BatchStatus)
        assert (status.state, status.cancelled) == (BatchState.FINISHED, 1)
        # A wait has its own end, be the store there or not.
        server.kill()
        with pytest.raises(TimeoutError, match="has not ended within 0"):
            producer.wait(batch_id, timeout_s=0.05)


def test_out_of_memory_is_waited_for_too(store: Store, store_url: str) -> None:
    """Where the room can't be asked for; else it is refused at once."""
    admin = store.client
    admin.acl_setuser(
        "u", enabled=True, passwords=["+p"], categories=["+@all"], commands=["-info"], keys=["*"], channels=["*"]
    )
    url = store_url.replace("unix://", "unix://u:p@")

    def fill() -> None:
        admin.config_set("maxmemory", 1_000_000)

    said = Said(lambda: admin.config_set("maxmemory", 0))
    made = requests(60)
    try:
        fill()
        mine = Store(connect(url), patience=Patience(5.0, said))
        batch_id, *_ = mine.submit(made, NewBatch())
        assert said[0].startswith("waiting for the store: Redis is out of memory: free some, or raise its maxmemory")
        assert whole(store, batch_id, made)

        def stream() -> Iterator[Request]:
            yield from noise(210)
            fill()

        before = admin.dbsize()
        with pytest.raises(StoreUnavailable, match=r"^Redis is out of memory"):
            Store(connect(url)).submit(stream(), NewBatch())
        admin.config_set("maxmemory", 0)
        assert admin.dbsize() == before, "what was staged is freed"
    finally:
        admin.config_set("maxmemory", 0)
        admin.acl_deluser("u")


def test_what_waiting_does_not_mend_fails_at_once(
    store: Store, store_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.client.acl_setuser("u", enabled=True, passwords=["+p"], commands=["+get"], keys=["*"])
    try:
        for user, problem in (("u:wrong", "refuses the user or password"), ("u:p", "does not allow its user")):
            with pytest.raises(StoreRefused, match=problem) as refused:
                Producer(redis_url=store_url.replace("unix://", f"unix://{user}@"))
            assert "wrong" not in str(refused.value)
    finally:
        store.client.acl_deluser("u")

    def look_up(host: str, *_: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(StoreRefused, match="Redis's host is not known: check MIMOQ_REDIS_URL"):
        Producer(redis_url="redis://nosuch/0")
    for bad in ("redis://h/0?db=x", "redis://h?nonsense=1", "redis://:pa/ss@h"):
        with pytest.raises(UsageError, match="MIMOQ_REDIS_URL") as wrong:
            Producer(redis_url=bad)
        assert "pa" not in str(wrong.value).replace("password", "")
    assert "waiting" not in caplog.text


def test_a_name_that_vanishes_later_is_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a stopped container takes its name with it."""

    def look_up(host: str, *_: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(StoreUnavailable) as away:
        Store(connect("redis://nosuch/0")).status("b")
    assert not isinstance(away.value, StoreRefused)


def test_redis_py_tries_nothing_twice_itself() -> None:
    for url in ("redis://h/0", "unix:///s"):
        pool = connect(url).connection_pool
        assert pool.connection_class(**pool.connection_kwargs).retry.get_retries() == 0


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_never_answers_is_not_waited_for(
    store_url: str, scheme: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("producers.connection.BELL_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with Producer(redis_url=store_url, broker_url=f"{scheme}://127.0.0.1:{port}/0") as producer:
            batch_id = producer.submit_many(["one", "two"])
            assert producer.status(batch_id).queued == 2
            # It connected, and was let wait once.
            silent.settimeout(0)
            silent.accept()[0].close()
            with pytest.raises(BlockingIOError):
                silent.accept()
    assert f"ring_failed: batch {batch_id} is submitted, workers will find it by themselves" in caplog.text
    assert "the broker does not answer" in caplog.text


# -- no room


def leave(store: Store, size: int) -> int:
    """Sets `maxmemory` so that so many bytes are free beside the margin; returns what Redis has in all."""
    used = int(store.client.info("memory")["used_memory"])
    limit = int((used + size) / (1 - room.MARGIN))
    store.client.config_set("maxmemory", limit)
    return limit


def test_a_submit_without_room_for_its_answers_is_refused(store: Store, store_url: str) -> None:
    store.submit(requests(1), NewBatch())
    each = room.ANSWER_BYTES + room.KEY_BYTES
    leave(store, 2_000 * each)
    store = Store(store.client)  # this one knows that there was no limit, and looks again some seconds later
    before = sorted(store.client.keys("*"))
    with pytest.raises(
        NoRoom, match=r"^no room for the answers: 3,000 jobs beside 1 of other batches need about"
    ) as full:
        store.submit(requests(3_000), NewBatch())
    assert full.value.exit_code == 1
    assert "nothing was submitted: raise its maxmemory" in str(full.value)
    assert re.fullmatch(r"no room for the answers[^\d\n]+", full.value.plain), "strangers learn nothing of others' load"
    assert sorted(store.client.keys("*")) == before
    large, *_ = store.submit(requests(1_200), NewBatch())
    # What has been promised room takes it, also from somebody who has not seen it yet.
    for other in (store, Store(connect(store_url))):
        with pytest.raises(NoRoom, match="1,000 jobs beside 1,201 of other batches"):
            other.submit(requests(1_000), NewBatch())
    store.cancel(large)
    store.client.config_set("maxmemory", 0)
    assert Store(connect(store_url)).submit(requests(3_000), NewBatch()).created


def outstanding(store: Store) -> int:
    """Jobs of other batches, as a refusal tells."""
    leave(store, 0)
    with pytest.raises(NoRoom) as full:
        Store(store.client).submit(requests(1), NewBatch())
    store.client.config_set("maxmemory", 0)
    told = re.search(r"beside ([\d,]+) of other batches", str(full.value))
    return int(told[1].replace(",", "")) if told else 0


def add_singles(store: Store, count: int) -> list[str]:
    """Ids of so many jobs, each a batch."""
    new = [Single(NewBatch(), request) for request in requests(count)]
    enlist(store.client, new, store.patience, Store(store.client)._room)
    return [single.new.batch_id for single in new]


def test_many_singles_are_counted_without_a_look_at_each(store: Store) -> None:
    add_singles(store, 400)
    store.submit(requests(5), NewBatch(answered=b"s"))
    store.client.config_resetstat()
    assert outstanding(store) == 404
    assert store.client.info("commandstats")["cmdstat_hmget"]["calls"] == room.TELLING + 1


def test_jobs_of_many_small_batches_all_count(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LOOKED_AT", 1)
    for jobs, answered in ((3, 2), (10, 9), (2, 1), (1, 0)):
        store.submit(requests(jobs), NewBatch(answered=b"s" * answered))
    assert outstanding(store) == 3 + 1 + 2 + 1


def test_what_is_outstanding_follows_ends_requeues_and_deleted_records(store: Store, store_url: str) -> None:
    async def fail(client: Any) -> None:
        while jobs := await leases.claim(client, "w", "bulk", [""], 10):
            for job in jobs:
                assert await leases.finish(client, job.batch_id, [ending(job, "f")]) == ["ended"]

    async def audit(client: Any) -> None:
        for batch_id in batches:
            await leases.audit(client, batch_id, 10)

    batches = [store.submit(requests(3), NewBatch())[0], *add_singles(store, 2)]
    assert outstanding(store) == 5
    run(fail, store_url)
    assert outstanding(store) == 0
    assert leftovers(store.client) == set()
    for batch_id in batches[:2]:
        store.requeue_failed(batch_id)
    assert outstanding(store) == 4
    store.client.delete(keys.OPEN_MANY)  # as of a mimoq that did not know it
    run(audit, store_url)
    assert outstanding(store) == 4
    store.client.delete(*map(keys.batch, batches))
    run(audit, store_url)
    assert outstanding(store) == 0
    assert store.client.exists(keys.OPEN, keys.OPEN_MANY) == 0


def test_what_answers_took_tells_what_they_will_take(store: Store, store_url: str) -> None:
    told, *_ = store.submit(requests(4), NewBatch(answered=b"ss\0\0"))
    finish(store_url, told, 2, b'"%s"' % (b"x" * 30_000))
    leave(store, 20 * 25_000)
    store = Store(store.client)
    with pytest.raises(NoRoom, match=r"20 jobs need about 0\.6 MB of Redis's memory, 0\.[45] MB are free"):
        store.submit(requests(20), NewBatch())
    assert store.submit(requests(10), NewBatch()).created


def test_room_is_looked_for_while_requests_are_staged(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "PIPELINE_BYTES", 100_000)
    leave(store, 1_000_000)
    read: list[int] = []

    def stream() -> Iterator[Request]:
        for index, request in enumerate(noise(2_000, 1_000)):
            read.append(index)
            yield request

    with pytest.raises(NoRoom):
        store.submit(stream(), NewBatch())
    assert 200 < len(read) < 1_000
    assert store.client.keys("*") == []


def test_answered_rows_need_no_room(store: Store) -> None:
    leave(store, 500_000)
    with pytest.raises(NoRoom):
        store.submit(requests(1_000), NewBatch())
    assert store.submit(requests(1_000), NewBatch(answered=b"s" * 990)).created


def test_results_elsewhere_need_room_there(store: Store, store_url: str, tmp_path: Path) -> None:
    with durable(tmp_path / "data") as server:
        results = connect(server.url)
        both = Store(store.client, RedisResults(results))
        leave(Store(results), 500_000)
        with pytest.raises(NoRoom):
            both.submit(requests(1_000), NewBatch())
        leave(store, 2_000_000)
        results.config_set("maxmemory", 0)
        assert both.submit(requests(5_000), NewBatch()).created
        results.close()


def test_no_room_is_one_line(
    store: Store, store_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from producers import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIMOQ_REDIS_URL", store_url)
    monkeypatch.setenv("MIMOQ_API_KEY", "k")
    Path("in.jsonl").write_text('{"prompt":"x"}\n' * 1_000)
    store.client.set(keys.SCHEMA, connections.SCHEMA_VERSION)
    leave(store, 500_000)
    before = sorted(store.client.keys("*"))
    for command in ("submit", "run"):
        monkeypatch.setattr("sys.argv", ["mimoq", command, "in.jsonl"])
        assert cli.main() == 1
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("mimoq: no room for the answers: 1,000 jobs need about ")
        assert sorted(store.client.keys("*")) == before


def test_a_connection_has_one_store_that_waits_and_one_that_does_not(store_url: str) -> None:
    from jobs.settings import Settings

    connection = Connection(Settings(redis_url=store_url))
    assert connection.store.patience is connection.patience
    assert connection.bare.patience is not connection.patience
    connection.close()
    assert os.environ.get("MIMOQ_REDIS_URL") is None
