"""What every result backend must do, whichever it is: one suite for all of them, on real servers."""

from __future__ import annotations

import asyncio
import errno
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from structlog.testing import capture_logs

from jobs import keys, leases
from jobs.backends import RedisResults, ResultBackend, open_backend
from jobs.connections import celery_url, connect, connect_async
from jobs.errors import StoreRefused, StoreUnavailable, UsageError
from jobs.leases import Job
from jobs.looks import Wanted, look
from jobs.requests import CHAT, Request
from jobs.results import (
    NO_USAGE,
    About,
    Attempt,
    Failure,
    StoredResult,
    Usage,
    decode_result,
    failure_payload,
    success_payload,
)
from jobs.settings import load_settings
from jobs.states import JobState
from jobs.store import NewBatch, Store
from tests.components import PostgreSQL, Valkey
from tests.integration.engine_stand import (
    ANSWER,
    FakeUpstream,
    answered,
    flights,
    go_soon,
    in_loop,
    refused,
    standing,
    until,
)
from tests.integration.store_model import ending, requests, run
from tests.waiting import wait_for
from worker.outside import Outside, _same
from worker.reaper import Reaper

USAGE = Usage(3, 2, 0, 0, 5)
ATTEMPTS = [Attempt(at=1.5, latency_s=0.25, verdict="succeeded", account="a", status=200, usage=USAGE)]
#: As long as an answer may be, and text that a reader could take for the end of one.
BODIES = {
    "short": b'{"id":"1","n":[1,2.5,null,true]}',
    "unicode": '{"text":"h\u00e9llo \u4f60\u597d \U0001f600 \u2028"}'.encode(),
    "escapes": b'{"text":"\\u0000 \\ud83d\\ude00 \\n \\"x\\"", "spaced" : [ 1 ]}',
    "misleading": b'{"traceback":null,"children":[],"date_done":"2020-01-01","task_id":"x","mimoq":{}}',
    "large": b'{"text":"%s"}' % (b"0123456789abcdef" * 320_000),
}


@dataclass
class Place:
    """A backend under test: where it is, and how it goes away and comes back."""

    name: str
    url: str = ""
    stop: Callable[[], None] = field(default=lambda: None)
    start: Callable[[], None] = field(default=lambda: None)
    pause: Callable[[], None] = field(default=lambda: None)
    go_on: Callable[[], None] = field(default=lambda: None)
    compression: str = "gzip"
    store: Any = None  # a client of the store, where it is the backend too

    @property
    def exact(self) -> bool:
        """Whether bodies come back as they came, to the byte."""
        return self.name != "file"

    def open(self, silent_s: float = 10.0) -> ResultBackend:
        settings = load_settings(result_backend=self.url, result_compression=self.compression)
        return open_backend(settings, self.url if self.store is not None else "unix:///nobody", self.store, silent_s)

    def reader(self) -> Celery:
        """A plain app of somebody else's."""
        return Celery(broker="memory://", backend=celery_url(self.url), set_as_current=False)


@pytest.fixture(scope="module")
def other() -> Iterator[Valkey]:
    server = Valkey(durable=True)
    yield server
    with suppress(ProcessLookupError):
        server.go_on()
    server.stop()


@pytest.fixture
def place(request: pytest.FixtureRequest, store_url: str, tmp_path: Path) -> Iterator[Place]:
    """The backend that a test is given by `on`, empty."""
    name = request.param
    if name == "same":
        with closing(connect(store_url)) as client:
            yield Place(name, store_url, store=client)
    elif name == "redis":
        server: Valkey = request.getfixturevalue("other")
        server.flush()
        yield Place(name, server.url, server.kill, server.start, server.pause, server.go_on)
    elif name.startswith("postgresql"):
        database: PostgreSQL = request.getfixturevalue("postgresql")
        database.flush()
        compression = "none" if name.endswith("plain") else "gzip"
        yield Place(
            name, database.url, database.kill, database.start, database.pause, database.go_on, compression=compression
        )
    else:
        yield Place(name, f"file://{tmp_path}")


def on(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("place", names, indirect=True)


every = on("same", "redis", "postgresql", "postgresql plain", "file")
outside_ones = on("redis", "postgresql", "file")
first_class = on("redis", "postgresql")


@pytest.fixture
def backend(place: Place) -> Iterator[ResultBackend]:
    found = place.open()
    found.check()
    yield found
    found.close()


def success(job_id: str, body: bytes = BODIES["short"], attempts: list[Attempt] = ATTEMPTS) -> bytes:
    return success_payload(job_id, body, About("c", CHAT, USAGE, attempts, 200, "r", model="m"), compress=False)


def failure(job_id: str, message: str = "n\u00f6") -> bytes:
    error = Failure("bad_request", message, 400, json_raw(b'{"error":{"traceback":null}}'))
    return failure_payload(job_id, About("c", CHAT, USAGE, ATTEMPTS, 400, error=error), compress=False)


def json_raw(body: bytes) -> Any:
    import msgspec

    return msgspec.Raw(body)


def revoked(job_id: str) -> bytes:
    """As common.lua makes it."""
    return (
        b'{"status":"REVOKED","result":{"exc_type":"TaskRevokedError","exc_message":["expired"],'
        b'"exc_module":"celery.exceptions"},"traceback":null,"children":[],"date_done":null,"task_id":"%s"}'
    ) % job_id.encode()


def one(backend: ResultBackend, job_id: str) -> StoredResult:
    (found,) = backend.read([job_id])
    assert found is not None
    return found


# -- results


@every
def test_bodies_come_back_as_they_came(place: Place, backend: ResultBackend) -> None:
    made = {f"{name}-0": success(f"{name}-0", body) for name, body in BODIES.items()}
    backend.write(list(made.items()))
    found = backend.read([*made, "nobody-0"])
    assert found.pop() is None
    for (job_id, payload), stored in zip(made.items(), found, strict=True):
        assert stored is not None
        assert (stored.status, stored.task_id) == ("SUCCESS", job_id)
        assert json.loads(bytes(stored.result)) == json.loads(BODIES[job_id[:-2]])
        if place.exact:
            assert bytes(stored.result) == BODIES[job_id[:-2]]
        sent = decode_result(payload)
        assert (stored.mimoq, stored.date_done, stored.ended_at) == (sent.mimoq, sent.date_done, sent.ended_at)
    assert backend.read([]) == []


@every
def test_failures_and_revocations(backend: ResultBackend) -> None:
    made = [("a-0", failure("a-0")), ("a-1", revoked("a-1"))]
    backend.write(made)
    for job_id, payload in made:
        stored, sent = one(backend, job_id), decode_result(payload)
        assert json.loads(bytes(stored.result)) == json.loads(bytes(sent.result))
        assert (stored.status, stored.mimoq, stored.ended_at) == (sent.status, sent.mimoq, sent.ended_at)


@every
def test_what_is_written_twice_counts_once_and_the_last_write_stands(backend: ResultBackend) -> None:
    first, last = failure("a-0"), success("a-0")
    backend.write([("a-0", first), ("a-0", first)])
    backend.write([("a-0", first)])
    assert one(backend, "a-0").mimoq == decode_result(first).mimoq
    backend.write([("b-0", last), ("a-0", last)])
    assert one(backend, "a-0").mimoq == decode_result(last).mimoq
    backend.delete(["a-0", "nobody-0"])
    backend.delete([])
    backend.delete_failures([])
    backend.write([])
    assert [found is not None for found in backend.read(["a-0", "b-0"])] == [False, True]


@every
def test_failures_go_and_answers_stay(backend: ResultBackend) -> None:
    packed = success_payload("a-1", b"{}", About("c", CHAT, USAGE, []), compress=backend.compressed)
    made = [("a-0", success("a-0")), ("a-1", packed), ("a-2", failure("a-2")), ("a-3", revoked("a-3"))]
    backend.write(made)
    ids = [job_id for job_id, _ in made]
    backend.delete_failures([*ids, "nobody-0"])
    assert [found and found.status for found in backend.read(ids)] == ["SUCCESS", "SUCCESS", None, None]


@on("postgresql", "file")
def test_no_failure_takes_the_place_of_an_answer(backend: ResultBackend) -> None:
    """As that of a stale worker's next one, where both were being written at once."""
    answer = success("a-0")
    backend.write([("a-0", answer)])
    for other in (failure("a-0"), revoked("a-0")):
        backend.write([("a-0", other)])
        assert (one(backend, "a-0").status, one(backend, "a-0").mimoq) == ("SUCCESS", decode_result(answer).mimoq)


@on("postgresql", "file")
def test_what_somebody_spoilt_is_no_outage(
    place: Place, backend: ResultBackend, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    backend.write([("a-0", success("a-0"))])
    if place.name == "file":
        (tmp_path / "celery-task-meta-a-0").write_text("nonsense")
    else:
        with request.getfixturevalue("postgresql").connect() as connection:
            connection.execute("UPDATE celery_taskmeta SET mimoq = 'nonsense'")
    with pytest.raises(ValueError, match="result"):
        backend.read(["a-0"])


@on("file")
def test_numbers_beyond_a_float_come_back(backend: ResultBackend) -> None:
    body = b'{"Infinity":"-Infinity \\" Infinity","n":[1e999,-1e999,%s]}' % (b"9" * 60)
    backend.write([("a-0", success("a-0", body))])
    assert bytes(one(backend, "a-0").result) == body


@on("file")
def test_a_place_that_is_gone_is_an_outage(place: Place, backend: ResultBackend, tmp_path: Path) -> None:
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    with pytest.raises(StoreUnavailable):
        backend.write([("a-0", success("a-0"))])
    moved.rename(tmp_path)
    backend.write([("a-0", success("a-0"))])


class Locked(Exception):
    """As SQLAlchemy wraps what SQLite says of a file that others write to, or that finds no room."""

    orig = sqlite3.OperationalError("database is locked")


@pytest.mark.parametrize(
    ("fails", "error", "raises"),
    [
        (lambda size, tries: size > 1_000, RuntimeError("an answer may stand here"), ValueError),
        (lambda size, tries: size > 1_000, OSError(errno.ENOSPC, "an answer may stand here"), StoreUnavailable),
        (lambda size, tries: size > 1_000, Locked(), StoreUnavailable),
        (lambda size, tries: True, RuntimeError("an answer may stand here"), StoreUnavailable),
        (lambda size, tries: tries == 1, RuntimeError(), None),
    ],
)
@on("file")
def test_a_value_is_at_fault_if_others_are_taken_meanwhile(
    backend: Any,
    fails: Callable[[int, int], bool],
    error: Exception,
    raises: type[Exception] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, tries = backend._backend.store_result, 0

    def picky(task_id: str, result: Any, status: str) -> None:
        nonlocal tries
        tries += 1
        if fails(len(repr(result)), tries):
            raise error
        store(task_id, result, status)

    monkeypatch.setattr(backend._backend, "store_result", picky)
    results = [("a-0", success("a-0", b'{"x":"%s"}' % (b"x" * 2_000)))]
    if raises is None:
        backend.write(results)
        assert one(backend, "a-0").status == "SUCCESS"
        return
    with pytest.raises(raises, match=type(error).__name__) as raised:
        backend.write(results)
    assert "may stand" not in str(raised.value)


@every
def test_a_plain_celery_app_reads_them(place: Place, backend: ResultBackend) -> None:
    backend.write([("a-0", success("a-0", BODIES["escapes"])), ("a-1", failure("a-1")), ("a-2", revoked("a-2"))])
    with closing(place.reader()) as app:
        good, bad, gone, none = (AsyncResult(f"a-{index}", app=app) for index in range(4))
        assert good.get(timeout=5)["text"] == '\0 \U0001f600 \n "x"'
        assert good.status == "SUCCESS"
        assert good.date_done is not None
        with pytest.raises(RuntimeError) as raised:
            bad.get(timeout=5)
        assert raised.value.args == ("bad_request", 400, "n\u00f6")
        assert (bad.status, gone.status, none.status) == ("FAILURE", "REVOKED", "PENDING")
        with pytest.raises(TaskRevokedError, match="expired"):
            gone.get(timeout=5)
        assert not good.children
        if place.name in ("same", "redis"):
            app.backend.result_consumer.stop()
            app.backend.client.connection_pool.disconnect()


@on("same", "redis", "postgresql")
def test_many_threads_at_once(backend: ResultBackend) -> None:
    def work(number: int) -> bool:
        made = [(f"b{number % 3}-{index}", success(f"b{number % 3}-{index}")) for index in range(20)]
        backend.write(made if number % 2 else made[::-1])  # as two who are about the same jobs
        return None not in backend.read([job_id for job_id, _ in made])

    with ThreadPoolExecutor(12) as threads:
        assert all(threads.map(work, range(24)))


@first_class
def test_one_that_was_restarted_answers_the_next_call(place: Place, backend: ResultBackend) -> None:
    backend.write([("a-0", success("a-0"))])
    place.stop()
    for call in (lambda: backend.read(["a-0"]), lambda: backend.write([("a-1", success("a-1"))])):
        with pytest.raises(StoreUnavailable, match="MIMOQ_RESULT_BACKEND") as raised:
            call()
        assert not isinstance(raised.value, StoreRefused)
    place.start()
    wait_for(lambda: answers(backend), what="an answer")
    assert one(backend, "a-0").status == "SUCCESS"
    backend.write([("a-1", success("a-1"))])


def answers(backend: ResultBackend) -> bool:
    with suppress(StoreUnavailable):
        backend.check()
        return True
    return False


@first_class
def test_one_that_stands_still_is_given_up_on(place: Place) -> None:
    with closing(place.open(silent_s=0.3)) as backend:
        backend.check()
        place.pause()
        try:
            for call in (lambda: backend.read(["a-0"]), lambda: backend.write([("a-0", success("a-0"))])):
                with pytest.raises(StoreUnavailable):
                    call()
        finally:
            place.go_on()
        wait_for(lambda: answers(backend), what="an answer")


# -- their end


@on("redis")
def test_each_goes_at_its_time(backend: RedisResults) -> None:
    backend.write([("a-0", success("a-0")), ("a-1", success("a-1"))])
    backend.expire(["a-0", "a-1"], int(time.time()) + 500)
    backend.keep(["a-1"])
    assert 490 < backend.client.ttl(keys.result("a-0")) <= 500
    assert backend.client.ttl(keys.result("a-1")) == -1


@on("postgresql")
def test_what_is_old_goes_unless_its_batch_is_kept(
    place: Place, backend: ResultBackend, postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.backends.postgresql.CLEANUP_ROWS", 2)
    made = [f"{batch}-{index}" for batch in ("old", "kept", "new") for index in range(3)]
    backend.write([(job_id, success(job_id)) for job_id in made])
    with postgresql.connect() as connection:
        connection.execute(
            "UPDATE celery_taskmeta SET date_done = date_done - interval '2 hours' WHERE task_id NOT LIKE 'new%'"
        )
        connection.execute(
            "INSERT INTO celery_tasksetmeta (id, taskset_id, date_done) VALUES (1, 'g', now() - interval '2 hours')"
        )
        backend.cleanup(3_600, ["kept", "unheard"])
        left = [job_id for job_id, stored in zip(made, backend.read(made), strict=True) if stored is not None]
        assert left == made[3:]
        assert connection.execute("SELECT count(*) FROM celery_tasksetmeta").fetchone() == (0,)


@on("postgresql")
def test_the_reaper_cleans_up_once_an_hour(place: Place, backend: ResultBackend, store_url: str) -> None:
    made: list[tuple[float, list[str]]] = []
    monkeypatched = type(
        "Told", (), {"cleanup": lambda self, ttl_s, kept: made.append((ttl_s, kept)), "expires": False}
    )

    async def work(client: Any) -> None:
        old, young = NewBatch(), NewBatch()
        with closing(connect(store_url)) as sync:
            for new in (old, young):
                Store(sync).submit(requests(1), new)
            sync.zadd(keys.BATCHES, {old.batch_id: time.time() - 600})
        for _ in range(2):
            await Outside(client, monkeypatched(), ttl_s=500).cleanup()
        assert made == [(500, [old.batch_id])]
        assert 3_500 < await client.ttl(keys.CLEANED) <= 3_600

    run(work, store_url)


@on("postgresql")
def test_a_cleanup_that_takes_too_long_ends_at_the_server_too(
    place: Place, postgresql: PostgreSQL, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.backends.postgresql.CLEANUP_GROUPS", "SELECT pg_sleep(60), %s")
    backend = place.open(silent_s=0.5)
    backend.check()

    async def work(client: Any) -> None:
        outside = Outside(client, backend, ttl_s=500)
        with pytest.raises(StoreUnavailable, match="too long"):
            await outside.cleanup()
        assert 200 < await client.ttl(keys.CLEANED) <= 300, "not at once again"
        outside.close()

    run(work, store_url)
    with postgresql.connect() as connection:
        row = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(60)%'")
        assert row.fetchone() == (0,)


# -- a worker's way with them


@outside_ones
def test_a_batch_from_its_calls_to_its_deletion(
    place: Place, backend: ResultBackend, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_soon(monkeypatch)

    @in_loop
    async def main() -> None:
        upstream = FakeUpstream(answered(), refused(400), answered(), hold=True)
        async with standing(store_url, upstream, backend=backend, beat=False, worker_max_in_flight=3) as stand:
            assert stand.engine.outside is not None
            await stand.engine.outside.mark()
            reaper = Reaper(stand.engine.flusher._client, NoBell(), "w", stand.engine.outside)
            batch = stand.submit(5)
            stand.engine.look("bulk")
            await until(partial(upstream.has, 3))
            stand.engine.give_back_waiting()
            await until(lambda: stand.store.client.hlen(keys.claims(batch)) == 3, "the rest is given back")
            store = stand.store
            store.cancel(batch)
            upstream.release()
            await stand.ended(batch)
            await reaper.round()
            assert reaper.telling is not None
            await reaper.telling
            found = store.results(batch, list(range(5)))
            assert [stored and stored.status for stored in found] == [
                "SUCCESS",
                "FAILURE",
                "SUCCESS",
                "REVOKED",
                "REVOKED",
            ]
            assert store.client.keys("celery-task-meta-*") == []
            looks = look(store.client, store.backend, [Wanted("", batch, index) for index in range(5)])
            assert [item and (item.state, item.custom_id, item.endpoint) for item in looks] == [
                (state, f"c{index}", CHAT)
                for index, state in enumerate(
                    [JobState.SUCCEEDED, JobState.FAILED, JobState.SUCCEEDED, JobState.CANCELLED, JobState.CANCELLED]
                )
            ]
            assert looks[0] is not None
            assert looks[0].attempts[0].status == 200
            store.delete(batch, "")
            assert store.results(batch, list(range(5))) == [None] * 5

    main()


class NoBell:
    def depth(self, lane: str, upstream: str) -> int:
        return 1

    def ring(self, batch_id: str, lane: str, upstream: str, times: int) -> None:
        raise AssertionError("nobody rings")


@outside_ones
def test_only_what_failed_is_called_again(place: Place, backend: ResultBackend, store_url: str) -> None:
    @in_loop
    async def main() -> None:
        upstream = FakeUpstream(refused(400), answered(), answered())
        async with standing(store_url, upstream, backend=backend) as stand:
            batch = stand.submit(3)
            stand.engine.look("bulk")
            assert (await stand.ended(batch)).failed == 1
            assert stand.store.requeue_failed(batch) == 1
            again = [index for index in range(3) if stand.store.results(batch, [index]) == [None]]
            assert len(again) == 1
            stand.engine.look("bulk")
            assert (await stand.ended(batch)).succeeded == 3
            assert len(upstream.asked) == 4
            assert None not in stand.store.results(batch, [0, 1, 2])

    main()


@outside_ones
def test_a_dead_workers_answer_is_not_bought_again(place: Place, backend: ResultBackend, store_url: str) -> None:
    @in_loop
    async def main() -> None:
        async with standing(store_url, FakeUpstream(), backend=backend) as stand:
            batch = stand.submit(2)
            client = connect_async(store_url)
            dead = await leases.claim(client, "dead", "bulk", [""], 2, lease_s=0.01)
            backend.write([(dead[0].job_id, success(dead[0].job_id))])
            # As reserve.lua notes a call that is let through: the reaper counts it, and the answer tells what it cost.
            await client.hset(keys.lease(dead[0].token), f"c{dead[0].index}", 1)
            taken = 0
            while taken < 2:
                taken += (await leases.reap(client))[0]
            await client.aclose(close_connection_pool=True)
            stand.engine.look("bulk")
            status = await stand.ended(batch)
            assert (status.succeeded, status.attempts, len(stand.upstream.asked)) == (2, 2, 1)
            abouts = [one(backend, f"{batch}-{index}").mimoq for index in range(2)]
            assert status.usage == sum((about.usage for about in abouts if about is not None), NO_USAGE)
            assert one(backend, dead[0].job_id).mimoq == decode_result(success(dead[0].job_id)).mimoq

    main()


#: Of more digits than Python reads; nobody looked at it when the answer came.
TOO_LONG = ANSWER[:-1] + b',"x":%s}' % (b"9" * 5_000)


@on("postgresql", "file")
def test_a_result_that_is_refused_ends_its_job_and_stops_nobody(
    place: Place, backend: ResultBackend, store_url: str, request: pytest.FixtureRequest
) -> None:
    allowed = None
    if place.name == "postgresql":
        database: PostgreSQL = request.getfixturevalue("postgresql")
        with database.connect() as connection:
            connection.execute(
                """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF NEW.task_id LIKE '%-0' AND NEW.status = 'SUCCESS' THEN RAISE SQLSTATE '22000'; END IF;
                RETURN NEW; END $$"""
            )
            connection.execute(
                "CREATE TRIGGER refuse BEFORE INSERT ON celery_taskmeta FOR EACH ROW EXECUTE FUNCTION refuse()"
            )
        allowed = "DROP TRIGGER refuse ON celery_taskmeta"

    @in_loop
    async def main() -> None:
        upstream = FakeUpstream(*([answered(TOO_LONG)] if allowed is None else []))
        async with standing(store_url, upstream, backend=backend) as stand:
            batch = stand.submit(7)
            with capture_logs() as logs:
                stand.engine.look("bulk")
                status = await stand.ended(batch)
            assert (status.succeeded, status.failed, status.attempts, len(upstream.asked)) == (6, 1, 7, 7)
            assert status.usage == sum([USAGE] * 7, NO_USAGE)
            assert stand.engine.flusher._held_bytes == 0
            abouts = [stand.about(batch, index) for index in range(7)]
            (refused,) = (about for about in abouts if about.error is not None)
            assert (refused.error.code, refused.usage, len(refused.attempts)) == ("result_refused", USAGE, 1)
            assert [line["event"] for line in logs if line["log_level"] != "info"] == ["result_refused"]
            assert "9999" not in repr(logs)
            assert "9999" not in refused.error.message
            if allowed is not None:
                with database.connect() as connection:
                    connection.execute(allowed)
            assert stand.store.requeue_failed(batch) == 1
            stand.engine.look("bulk")
            assert (await stand.ended(batch)).succeeded == 7

    main()


@on("file")
def test_a_refused_answer_of_a_worker_that_has_lost_its_job_is_no_failure(
    backend: ResultBackend, store_url: str
) -> None:
    async def work(client: Any) -> None:
        with closing(connect(store_url)) as sync:
            Store(sync, backend).submit(requests(2), NewBatch())
        jobs = await leases.claim(client, "w", "bulk", [""], 2)
        stale = [ending(job, "s") for job in jobs]
        for end in stale:
            object.__setattr__(end, "payload", success(end.job.job_id, TOO_LONG))
        object.__setattr__(stale[0], "job", replace(jobs[0], token="another"))
        outside = Outside(client, backend)
        left = await outside.write(stale)
        outside.close()
        assert [(end.letter, end.code) for end in left] == [("f", "result_refused")] * 2
        assert [found and found.status for found in backend.read([job.job_id for job in jobs])] == [None, "FAILURE"]
        assert await leases.finish(client, jobs[0].batch_id, left, stored_elsewhere=True) == ["fenced", "ended"]

    run(work, store_url)


@outside_ones
def test_a_second_retry_takes_no_answer_of_the_first(backend: ResultBackend, store_url: str) -> None:
    """Both have seen the failures; the answer comes before the second takes them away."""
    with closing(connect(store_url)) as client:
        store = Store(client, backend)
        batch = store.submit(requests(2), NewBatch())[0]
        end_elsewhere(store_url, "f")
        backend.write([(f"{batch}-0", success(f"{batch}-0")), (f"{batch}-1", failure(f"{batch}-1"))])
        assert store.requeue_failed(batch) == 2
        assert [found and found.status for found in store.results(batch, [0, 1])] == ["SUCCESS", None]


def test_times_are_compared_as_times() -> None:
    job = Job("b", 0, "t", requests(1)[0], b"", 0, None, 500)
    end = ending(job, "s")
    told = decode_result(end.payload)
    assert told.date_done is not None
    whole = told.date_done.partition(".")[0]
    object.__setattr__(end, "payload", end.payload.replace(told.date_done.encode(), whole.encode()))
    stored = StoredResult("SUCCESS", "b-0", told.result, told.mimoq, f"{whole}.000000")
    assert _same(end, stored)
    assert not _same(end, StoredResult("SUCCESS", "b-0", told.result, told.mimoq, f"{whole}.000001"))


@pytest.mark.parametrize("silent", [False, True])
@first_class
def test_a_backend_that_is_away_costs_no_answer_and_holds_up_nothing_else(
    place: Place, store_url: str, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    """It dies, or stands still, while calls are in flight."""
    go_soon(monkeypatch)
    monkeypatch.setattr("worker.flusher.SILENT_S", 0.2)
    backend = place.open(silent_s=1.0)
    backend.check()

    @in_loop
    async def main() -> None:
        upstream = FakeUpstream(hold=True)
        async with standing(store_url, upstream, backend=backend, worker_max_in_flight=4) as stand:
            batch = stand.submit(12)
            stand.engine.look("bulk")
            await until(lambda: upstream.in_flight == 4)
            (place.pause if silent else place.stop)()
            upstream.release(hold=True)
            await until(lambda: stand.engine.flusher.failing, "the flusher sees it")
            # Reservations end with their calls, not with the store of what they brought.
            await until(lambda: flights(stand) == upstream.in_flight, "settled reservations")
            asked = len(upstream.asked)
            assert stand.store.status(batch).succeeded == 0
            stand.engine.give_back_waiting()
            await until(lambda: stand.store.client.hlen(keys.claims(batch)) == asked, "the rest is given back")
            upstream.release()
            await until(lambda: upstream.in_flight == 0)
            assert len(upstream.asked) == asked, "nothing is called meanwhile"
            assert stand.store.status(batch).succeeded == 0
            await asyncio.to_thread(place.go_on if silent else place.start)
            await until(lambda: stand.store.status(batch).succeeded == asked, "what was paid for is stored", 15)
            assert not stand.engine.flusher.failing
            stand.engine.look("bulk")
            status = await stand.ended(batch)
            assert (status.succeeded, status.attempts, len(upstream.asked)) == (12, 12, 12)
            assert None not in stand.store.results(batch, list(range(12)))

    main()


@on("redis")
def test_a_slow_backend_holds_up_no_settlement(place: Place, backend: ResultBackend, store_url: str) -> None:
    go, write = threading.Event(), backend.write

    def slowly(results: Any) -> None:
        assert go.wait(10)
        write(results)

    backend.write = slowly  # type: ignore[method-assign]  # an object of this test's own

    @in_loop
    async def main() -> None:
        async with standing(store_url, FakeUpstream(), backend=backend) as stand:
            batch = stand.submit(3)
            stand.engine.look("bulk")
            try:
                await until(lambda: len(stand.upstream.asked) == 3)
                await until(lambda: flights(stand) == 0, "settled reservations")
                assert stand.store.status(batch).succeeded == 0
                assert stand.store.client.hlen(keys.claims(batch)) == 3
            finally:
                go.set()
            assert (await stand.ended(batch)).succeeded == 3

    main()


# -- what a finished job costs Redis


def end_elsewhere(url: str, letters: str, compress: bool = False) -> list[Job]:
    """A worker whose results live elsewhere claims and ends what is ready."""

    async def work(client: Any) -> list[Job]:
        ended: list[Job] = []
        while jobs := await leases.claim(client, "w", "bulk", [""], 500):
            ends = [ending(job, letters[job.index % len(letters)]) for job in jobs]
            await leases.finish(client, jobs[0].batch_id, ends, stored_elsewhere=True)
            ended += jobs
        return ended

    return list(run(work, url))


def test_requests_go_with_the_last_success_of_their_block(store_url: str) -> None:
    with closing(connect(store_url)) as client:
        store = Store(client, RedisResults(client))  # as good as another
        made = requests(9)
        made[5] = Request(CHAT, custom_id="c5", body=b'{"messages":[],"n":5,"x":"%s"}' % (b"x" * 200_000))
        batch, *_ = store.submit(made, NewBatch(slice_size=4))
        assert sorted(client.hkeys(keys.requests(batch))) == [b"0", b"1", b"2", b"r5"]
        end_elsewhere(store_url, "sssfsssss")  # index 3 fails
        assert client.hkeys(keys.requests(batch)) == [b"0"]
        assert store.requests(batch, range(9), 4).keys() == {0, 1, 2, 3}
        assert store.requeue_failed(batch) == 1
        assert [job.request for job in end_elsewhere(store_url, "s")] == [made[3]]
        assert not client.exists(keys.requests(batch))
        assert store.status(batch).succeeded == 9


def test_a_finished_job_costs_under_100_bytes(store_url: str) -> None:
    count = 2_000
    with closing(connect(store_url)) as client:
        made = [Request(CHAT, b'{"messages":[],"x":"%d %s"}' % (n, b"x" * 1_000), f"c{n}") for n in range(count)]
        batch, *_ = Store(client).submit(made, NewBatch())
        end_elsewhere(store_url, "s")
        kept = list(client.scan_iter(f"*{batch}*", 1_000))
        assert sum(client.memory_usage(name, samples=0) or 0 for name in kept) < 50 * count


# -- PostgreSQL's own


@on("postgresql")
def test_the_same_write_again_changes_nothing(backend: ResultBackend, place: Place, postgresql: PostgreSQL) -> None:
    made = [("a-0", success("a-0")), ("a-1", failure("a-1"))]
    with postgresql.connect() as connection:

        def rows() -> list[Any]:
            return connection.execute(
                "SELECT id, xmin::text, ctid::text FROM celery_taskmeta ORDER BY task_id"
            ).fetchall()

        backend.write(made)
        before = rows()
        backend.write(made)
        assert rows() == before
        assert len(before) == 2


@on("postgresql")
def test_only_what_a_row_holds_is_refused(place: Place, backend: ResultBackend, postgresql: PostgreSQL) -> None:
    """Not one for which the table has no number left, which the server says in words of the same kind."""
    long = "x" * 200
    with pytest.raises(ValueError, match="22001"):
        backend.write([("a-0", success("a-0")), (long, success(long))])
    with postgresql.connect() as connection:
        connection.execute("SELECT setval('task_id_sequence', 2147483647)")
        with pytest.raises(StoreUnavailable, match="22003"):
            backend.write([("a-0", success("a-0"))])
        connection.execute("ALTER SEQUENCE task_id_sequence MAXVALUE 2147483648")
        with pytest.raises(StoreUnavailable, match="2200H"):
            backend.write([("a-0", success("a-0"))])


@on("postgresql")
def test_workers_that_start_at_once_make_one_table(place: Place, postgresql: PostgreSQL) -> None:
    opened = [place.open() for _ in range(4)]
    assert opened[0].read(["a-0"]) == [None], "a reader finds nothing, and makes nothing"
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda backend: backend.check(), opened))
    opened[0].write([("a-0", success("a-0"))])
    postgresql.flush()  # somebody drops it while they run
    opened[1].cleanup(500, [])
    opened[1].delete(["a-0"])
    opened[1].write([("a-0", success("a-0"))])
    assert one(opened[2], "a-0").status == "SUCCESS"
    for backend in opened:
        backend.close()


@on("postgresql")
def test_a_table_that_celery_has_made(place: Place, postgresql: PostgreSQL) -> None:
    with closing(place.reader()) as app:
        app.backend.store_result("theirs", {"a": 1}, "SUCCESS")
        with closing(place.open()) as backend:
            assert backend.read(["a-0"]) == [None]
            backend.check()
            backend.write([("a-0", success("a-0"))])
            assert one(backend, "a-0").status == "SUCCESS"
            assert one(backend, "theirs").mimoq is None
        app.backend.store_result("more", {"a": 2}, "SUCCESS")
        assert app.AsyncResult("more").get(timeout=5) == {"a": 2}


@on("postgresql")
def test_what_waiting_does_not_help_is_said_in_one_line(place: Place, postgresql: PostgreSQL) -> None:
    with postgresql.connect() as connection:
        connection.execute("DROP ROLE IF EXISTS worker")
        connection.execute("CREATE ROLE worker LOGIN PASSWORD 'right'")
    made = {
        postgresql.url_of("worker:secret"): "authentication failed",
        postgresql.url_of("worker:right", "nowhere"): "database does not exist",
        postgresql.url_of("worker:right"): "CREATE on the schema",
    }
    for url, word in made.items():
        with closing(Place("p", url).open()) as backend, pytest.raises(StoreRefused, match=word) as raised:
            backend.check()
        assert "secret" not in str(raised.value)
        assert "\n" not in str(raised.value)
    with closing(place.reader()) as app:
        app.backend.store_result("theirs", 1, "SUCCESS")  # the table is another's, without our column
    with postgresql.connect() as connection:
        connection.execute("GRANT USAGE ON SCHEMA public TO worker")
        connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO worker")
    with closing(Place("p", postgresql.url_of("worker:right")).open()) as backend:
        with pytest.raises(StoreRefused, match="ADD COLUMN IF NOT EXISTS mimoq"):
            backend.check()
        with closing(place.open()) as owner:
            owner.check()
        backend.check()
        with pytest.raises(StoreRefused, match="rights"):
            backend.write([("a-0", success("a-0"))])


# -- addresses


def test_a_database_that_is_away_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery.backends.database.session.PREPARE_MODELS_MAX_RETRIES", 0)
    place = Place("sqlite", f"db+sqlite:///{tmp_path}/nowhere/results.db")
    with closing(place.open()) as backend:
        with pytest.raises(StoreUnavailable, match=r"OperationalError.*MIMOQ_RESULT_BACKEND"):
            backend.check()
        assert not caplog.records
        (tmp_path / "nowhere").mkdir()
        backend.check()
        backend.write([("a-0", success("a-0"))])
        assert one(backend, "a-0").status == "SUCCESS"


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("rpc://", "one process alone"),
        ("amqp://u:secret@h//", "one process alone"),
        ("disabled://", "keeps no results"),
        ("cache+memory://", "no other process"),
        ("db+postgresql://u:secret@h/d", r"db\+postgresql\+psycopg://"),
        ("db+postgres://u:secret@h/d", r"db\+postgresql\+psycopg://"),
        ("db+postgresql+psycopg2://u:secret@h/d", r"db\+postgresql\+psycopg://"),
        ("postgresql://u:secret@h/d", r"db\+postgresql\+psycopg://"),
        ("db+postgresql+psycopg://u:secret@h:x y/d?no=1", "can't be read"),
        ("mongodb://u:secret@h/d", "install the library"),
        ("nonsense://u:secret@h", "install the library"),
        ("redis://u:secret@h:port", "MIMOQ_RESULT_BACKEND"),
    ],
)
def test_an_address_that_can_not_serve_is_one_line(url: str, word: str) -> None:
    with pytest.raises(UsageError, match=word) as raised:
        open_backend(load_settings(result_backend=url), "unix:///s", None)
    assert "secret" not in str(raised.value)
    assert "MIMOQ_RESULT_BACKEND" in str(raised.value)


def test_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.backends.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'mimoq\[postgres\]'"):
        open_backend(load_settings(result_backend="db+postgresql+psycopg://h/d"), "unix:///s", None)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (None, None),
        ("unix:///s", None),
        ("redis+socket:///s", None),
        ("redis+socket:///s?virtual_host=2", {"path": "/s", "db": 2}),
        ("redis://h:1/2", {"host": "h", "port": 1, "db": 2}),
    ],
)
def test_redis_is_the_stores_own_or_another(url: str | None, expected: dict[str, Any] | None) -> None:
    with closing(connect("unix:///s")) as client:
        backend = open_backend(load_settings(result_backend=url), "unix:///s", client)
        assert isinstance(backend, RedisResults)
        assert backend.with_state is (expected is None)
        if expected is not None:
            assert backend.client.connection_pool.connection_kwargs.items() >= expected.items()
        backend.close()
