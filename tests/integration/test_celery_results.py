"""Stored results, read by a plain Celery app that knows nothing of this project."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from redis.exceptions import ResponseError

from jobs import keys, leases
from jobs.connections import celery_url, connect
from jobs.leases import End, Job
from jobs.results import About, Failure, Usage, failure_payload, success_payload
from jobs.scripts import Script
from jobs.store import NewBatch, Store
from tests.integration.store_model import redis_time, requests, run, wait_until
from tests.waiting import wait_for

BODY = '{"id":"1","choices":[{"message":{"content":"héllo \\n \\u00fc 你好"}}],"usage":{"total_tokens":5}}'.encode()
USAGE = Usage(3, 2, 0, 0, 5)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    client = connect(store_url)
    yield Store(client)
    client.close()


@pytest.fixture
def reader(store_url: str) -> Iterator[Celery]:
    url = celery_url(store_url)
    app = Celery(broker=url, backend=url, set_as_current=False)
    yield app
    app.close()
    app.backend.result_consumer.stop()
    app.backend.client.connection_pool.disconnect()


def claimed(
    store: Store, url: str, count: int = 1, lease_s: float = 60.0, deadline_s: float | None = None
) -> list[Job]:
    batch_id, *_ = store.submit(requests(count), NewBatch(ttl_s=500, deadline_s=deadline_s))
    jobs: list[Job] = run(lambda client: leases.claim(client, "w", "bulk", [""], count, lease_s), url)
    assert {job.batch_id for job in jobs} == {batch_id}
    return jobs


def succeed(job: Job, url: str, compress: bool = True) -> None:
    payload = success_payload(
        job.job_id, BODY, About(job.request.custom_id, job.request.endpoint, USAGE, [], 200), compress
    )
    end = End(job, "s", payload, 1, USAGE)
    assert run(lambda client: leases.finish(client, job.batch_id, [end]), url) == ["ended"]


def fail(job: Job, url: str, failure: Failure, compress: bool = True) -> None:
    about = About(job.request.custom_id, job.request.endpoint, USAGE, [], failure.status, None, failure)
    end = End(job, "f", failure_payload(job.job_id, about, compress), 1, USAGE)
    assert run(lambda client: leases.finish(client, job.batch_id, [end]), url) == ["ended"]


@pytest.mark.parametrize("compress", [True, False])
def test_a_success_is_the_upstreams_body(store: Store, store_url: str, reader: Celery, compress: bool) -> None:
    (job,) = claimed(store, store_url)
    result = AsyncResult(job.job_id, app=reader)
    assert result.state == "PENDING"
    succeed(job, store_url, compress)
    answer = result.get(timeout=5)
    assert answer["choices"][0]["message"]["content"] == "héllo \n ü 你好"
    assert answer["usage"] == {"total_tokens": 5}
    assert result.state == "SUCCESS"
    assert result.date_done is not None
    assert 0 < store.client.ttl(f"celery-task-meta-{job.job_id}") <= 500


@pytest.mark.parametrize("compress", [True, False])
def test_a_get_that_waits_wakes_when_the_job_ends(store: Store, store_url: str, reader: Celery, compress: bool) -> None:
    (job,) = claimed(store, store_url)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(AsyncResult(job.job_id, app=reader).get(timeout=20)))
    waiting.start()
    name = f"celery-task-meta-{job.job_id}".encode()
    wait_for(lambda: name in store.client.pubsub_channels(), what="a subscription to the result")
    began = time.monotonic()
    succeed(job, store_url, compress)
    waiting.join()
    assert found[0]["id"] == "1"
    assert time.monotonic() - began < 10, "woken by the message, not by its own time-out"


@pytest.mark.parametrize("compress", [True, False])
def test_a_failure_raises_what_every_reader_has(store: Store, store_url: str, reader: Celery, compress: bool) -> None:
    (job,) = claimed(store, store_url)
    fail(job, store_url, Failure("content_filter", "refused: ünsafe", 421), compress)
    result = AsyncResult(job.job_id, app=reader)
    with pytest.raises(RuntimeError) as caught:
        result.get(timeout=5)
    assert type(caught.value) is RuntimeError
    assert caught.value.args == ("content_filter", 421, "refused: ünsafe")
    assert result.state == "FAILURE"


def test_a_failure_without_a_status(store: Store, store_url: str, reader: Celery) -> None:
    (job,) = claimed(store, store_url)
    fail(job, store_url, Failure("timeout", "no answer: timeout"))
    with pytest.raises(RuntimeError) as caught:
        AsyncResult(job.job_id, app=reader).get(timeout=5)
    assert caught.value.args == ("timeout", None, "no answer: timeout")


def test_a_waiting_get_wakes_for_a_failure_too(store: Store, store_url: str, reader: Celery) -> None:
    (job,) = claimed(store, store_url)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            AsyncResult(job.job_id, app=reader).get(timeout=20)
        except RuntimeError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    name = f"celery-task-meta-{job.job_id}".encode()
    wait_for(lambda: name in store.client.pubsub_channels(), what="a subscription to the result")
    fail(job, store_url, Failure("bad_request", "no", 400))
    waiting.join()
    assert caught[0].args == ("bad_request", 400, "no")


def test_a_cancelled_job_is_revoked_and_wakes_who_waits(store: Store, store_url: str, reader: Celery) -> None:
    batch_id, *_ = store.submit(requests(2), NewBatch())
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            AsyncResult(f"{batch_id}-1", app=reader).get(timeout=20)
        except TaskRevokedError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    name = f"celery-task-meta-{batch_id}-1".encode()
    wait_for(lambda: name in store.client.pubsub_channels(), what="a subscription to the result")
    store.cancel(batch_id)
    waiting.join()
    assert caught[0].args == ("cancelled",)
    result = AsyncResult(f"{batch_id}-0", app=reader)
    assert result.state == "REVOKED"
    with pytest.raises(TaskRevokedError, match="cancelled"):
        result.get(timeout=5)


def test_an_expired_job_is_revoked(store: Store, store_url: str, reader: Celery) -> None:
    (job,) = claimed(store, store_url, lease_s=0.02, deadline_s=500)
    result = AsyncResult(job.job_id, app=reader)
    assert result.state == "PENDING"
    store.client.zadd(keys.DEADLINES, {job.batch_id: 1.0})
    wait_until(store.client, redis_time(store.client) + 0.03)
    run(leases.reap, store_url)  # the lease is over, and the deadline
    Script("sweep")(store.client, ["mimoq:"], [job.batch_id, 100])
    assert result.state == "REVOKED"
    with pytest.raises(TaskRevokedError, match="expired"):
        result.get(timeout=5)
    assert store.status(job.batch_id).expired == 1


def test_a_requeued_job_is_pending_again(store: Store, store_url: str, reader: Celery) -> None:
    (job,) = claimed(store, store_url)
    fail(job, store_url, Failure("bad_request", "no", 400))
    assert AsyncResult(job.job_id, app=reader).state == "FAILURE"
    store.requeue_failed(job.batch_id)
    assert AsyncResult(job.job_id, app=reader).state == "PENDING"


def test_scripts_that_redis_forgot_are_sent_again(store: Store) -> None:
    for script in (Script("cancel"), Script("sweep")):
        store.client.script_flush()
        assert script(store.client, ["mimoq:"], ["no", 1]) in (b"unknown", 0)
    with pytest.raises(ResponseError):
        Script("sweep")(store.client, ["mimoq:"], [])


def test_scripts_that_redis_forgot_are_sent_again_by_async_clients_too(store: Store, store_url: str) -> None:
    store.client.script_flush()
    assert run(leases.reap, store_url)[:2] == (0, 0)
    assert run(leases.reap, store_url)[:2] == (0, 0)
