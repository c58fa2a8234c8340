"""What every result backend must do, whichever it is: one suite for all of them, on real servers."""

from __future__ import annotations

import errno
import json
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult

from jobs import keys
from jobs.backends import RedisResults, ResultBackend, open_backend
from jobs.connections import connect
from jobs.errors import StoreRefused, StoreUnavailable, UsageError
from jobs.requests import CHAT
from jobs.results import (
    About,
    decode_result,
    success_payload,
)
from jobs.settings import load_settings
from jobs.store import NewBatch, Store
from tests.components import PostgreSQL
from tests.integration.backend_stand import (
    BODIES,
    USAGE,
    Place,
    every,
    failure,
    first_class,
    on,
    one,
    revoked,
    success,
)
from tests.integration.store_model import requests, run
from tests.waiting import wait_for
from worker.outside import Outside

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
def test_values_are_handed_out_as_they_lie_there_or_not_at_all(backend: ResultBackend) -> None:
    made = {"a-0": success("a-0"), "a-1": failure("a-1")}
    backend.write(list(made.items()))
    assert backend.packed(["a-1", "nobody-0", "a-0"]) == (
        [made["a-1"], None, made["a-0"]] if backend.compressed else None
    )
    assert not backend.packed([])


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


@on("file")
def test_a_failure_beside_what_a_late_answer_left_is_read(backend: ResultBackend) -> None:
    """Whose worker died between the two writes."""
    body = b'{"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5},"model":"m"}'
    backend.write([("a-0", failure("a-0")), ("a-1", success("a-1", body))])
    inner = backend._backend  # type: ignore[attr-defined]
    inner.set(inner.get_key_for_task("a-0.mimoq"), inner.get(inner.get_key_for_task("a-1.mimoq")))
    found = one(backend, "a-0")
    assert (found.status, found.mimoq) == ("FAILURE", None)


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
