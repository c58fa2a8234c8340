"""The Python client against a real worker process."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.errors import InvalidRequest, NotFound, StoreUnavailable, UsageError
from jobs.requests import make_request
from jobs.states import BatchState, JobState
from jobs.store import BatchStatus
from ops.simulator import RunningSimulator, running_simulator
from producers import AsyncProducer, JobResult, Producer
from tests.components import Valkey
from tests.integration.commands import opened
from tests.waiting import wait_for

MESSAGE = {"max_tokens": 20, "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def upstream(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSimulator]:
    """A simulator that a worker of the tests' Valkey calls."""
    valkey.flush()
    with (
        running_simulator() as sim,
        opened(tmp_path_factory.mktemp("box"), base_url=sim.url, api_key="sk-test", redis_url=valkey.url) as box,
    ):
        worker = box.start("worker", "--lane", "bulk")
        yield sim
        worker.signal(signal.SIGTERM)
        worker.wait(0)


@pytest.fixture
def sim(upstream: RunningSimulator) -> RunningSimulator:
    upstream.configure(hold=False, triggers={}, script=[])
    upstream.reset()
    return upstream


@pytest.fixture
def producer(sim: RunningSimulator, valkey: Valkey) -> Iterator[Producer]:
    with Producer(redis_url=valkey.url) as found:
        yield found


def done(found: BatchStatus | JobResult) -> JobResult:
    assert isinstance(found, JobResult)
    return found


def test_one_job_from_its_submission_to_its_answer(producer: Producer, sim: RunningSimulator) -> None:
    sim.configure(script=["500"])
    job_id = producer.submit("What is a queue?", custom_id="mine")
    found = done(producer.wait(job_id, timeout_s=20))
    assert (found.job_id, found.custom_id, found.state, found.error) == (job_id, "mine", JobState.SUCCEEDED, None)
    assert found.response is not None
    assert found.response["choices"][0]["message"]["reasoning_content"]
    assert found.usage is not None
    assert found.usage.total_tokens == found.response["usage"]["total_tokens"]
    assert (found.status_code, bool(found.request_id)) == (200, True)
    # The retry is on record: what came back, what was made of it, how long it waited.
    assert [(attempt.status, attempt.verdict == "succeeded") for attempt in found.attempts] == [
        (500, False),
        (200, True),
    ]
    assert found.attempts[0].wait_s > 0
    assert found == producer.job(job_id)
    for secret in ("choices", "queue?"):
        assert secret not in repr(found)


def test_requests_of_every_form(producer: Producer) -> None:
    ready = make_request("ready", model="m", custom_id="ready")
    batch = producer.submit_many(
        [
            "words",
            {"prompt": "a prompt"},
            {"messages": [{"role": "user", "content": "x"}]},
            {"custom_id": "line", "method": "POST", "url": "/v1/messages", "body": MESSAGE},
            ready,
        ]
    )
    results = {result.job_id: result for result in producer.results(batch)}
    assert len(results) == 5
    assert {result.state for result in results.values()} == {JobState.SUCCEEDED}
    assert {result.custom_id for result in results.values()} == {None, "line", "ready"}
    assert [r.response["type"] for r in results.values() if r.response and "type" in r.response] == ["message"]
    job_id = producer.submit(MESSAGE, endpoint="/v1/messages")
    assert (done(producer.wait(job_id)).response or {})["type"] == "message"
    renamed = producer.submit(ready, custom_id="renamed")
    assert done(producer.wait(renamed)).custom_id == "renamed"


def test_results_come_while_the_batch_runs(producer: Producer, sim: RunningSimulator) -> None:
    sim.configure(script=[None, None, None, "421"], hold=True)
    batch = producer.submit_many(f"number {i}" for i in range(6))
    assert list(producer.results(batch, follow=False)) == []
    assert producer.job(f"{batch}-5").state in (JobState.QUEUED, JobState.RUNNING)
    with pytest.raises(TimeoutError, match=batch):
        producer.wait(batch, timeout_s=0.01)
    with pytest.raises(TimeoutError, match="has not ended within"):
        producer.wait(f"{batch}-0", timeout_s=0.01)
    sim.wait_until(lambda totals: totals.in_flight == 5)
    follower = producer.results(batch)
    sim.configure(hold=False)
    results = list(follower)
    assert sorted(result.job_id for result in results) == [f"{batch}-{i}" for i in range(6)]
    (failed,) = [result for result in results if result.state is JobState.FAILED]
    assert failed.response is None
    assert failed.error is not None
    assert (failed.error.code, failed.error.status, failed.status_code) == ("content_filter", 421, 421)
    assert list(producer.results(batch, follow=False)) == results
    status = producer.wait(batch)
    assert isinstance(status, BatchStatus)
    assert (status.state, status.succeeded, status.failed) == (BatchState.FINISHED, 5, 1)
    assert producer.status(batch) == producer.status(f"{batch}-0") == status


def test_a_wait_wakes_when_the_job_ends(producer: Producer, sim: RunningSimulator, valkey: Valkey) -> None:
    sim.configure(hold=True)
    job_id = producer.submit("wait for me")
    woken: list[JobResult] = []

    def wait() -> None:
        with Producer(redis_url=valkey.url) as other:
            woken.append(done(other.wait(job_id)))

    waiter = threading.Thread(target=wait)
    waiter.start()
    sim.wait_until(lambda totals: totals.in_flight == 1)
    assert not woken
    sim.configure(hold=False)
    waiter.join(20)
    assert [result.state for result in woken] == [JobState.SUCCEEDED]


def test_cancel_keeps_what_has_come(producer: Producer, sim: RunningSimulator) -> None:
    sim.configure(script=[None])
    first = producer.submit("answered")
    producer.wait(first)
    sim.configure(hold=True)
    batch = producer.submit_many(f"held {i}" for i in range(3))
    sim.wait_until(lambda totals: totals.in_flight == 3)
    producer.cancel(batch)
    status = producer.wait(batch, timeout_s=20)
    assert isinstance(status, BatchStatus)
    assert (status.cancelled, status.succeeded) == (3, 0)
    assert {result.state for result in producer.results(batch)} == {JobState.CANCELLED}
    # A batch that is over stays as it is.
    assert producer.cancel(first).succeeded == 1
    assert producer.job(first).state is JobState.SUCCEEDED


def test_what_is_wrong_is_refused_and_nothing_submitted(producer: Producer, sim: RunningSimulator) -> None:
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"requests": []}, UsageError, "at least one"),
        ({"requests": ["good", {"prompt": "x", "temperature": 9}]}, InvalidRequest, "request 1: temperature"),
        ({"requests": ["good"] * 70 + [{"messages": []}]}, InvalidRequest, "request 70: "),
        ({"requests": ["x"], "lane": "fast"}, UsageError, "lane"),
        ({"requests": ["x"], "max_attempts": 0}, UsageError, "max_attempts"),
        ({"requests": ["x"], "deadline_s": 0}, UsageError, "deadline_s"),
        ({"requests": ["x"], "deadline_s": float("nan")}, UsageError, "deadline_s"),
        ({"requests": ["x"], "endpoint": "/v1/embeddings"}, UsageError, "/v1/embeddings"),
    ]
    for arguments, kind, message in bad:
        with pytest.raises(kind, match=message):
            producer.submit_many(**arguments)
    with pytest.raises(InvalidRequest, match="temperature"):
        producer.submit({"prompt": "x", "temperature": 9}, custom_id="c")
    assert sim.totals()["arrived"] == 0


@pytest.mark.parametrize("name", ["", "nope", "nope-0", "-", "-1", "x-y-z", "0" * 24])
def test_what_is_not_there_is_not_found(producer: Producer, name: str) -> None:
    for ask in (producer.status, producer.job, producer.cancel, producer.wait):
        with pytest.raises(NotFound):
            ask(name)
    with pytest.raises(NotFound):
        list(producer.results(name))


def test_a_job_beyond_the_batch_is_not_found(producer: Producer) -> None:
    batch, _, _ = producer.submit("one").rpartition("-")
    with pytest.raises(NotFound):
        producer.job(f"{batch}-1")


def test_settings_and_stores_that_can_not_be_are_told() -> None:
    with pytest.raises(UsageError, match="MIMOQ_SLICE_SIZE"):
        Producer(slice_size=0)
    with pytest.raises(StoreUnavailable, match="MIMOQ_REDIS_URL"):
        Producer(redis_url="unix:///nowhere/valkey.sock", store_patience_s=0)


def test_a_deadline_ends_what_no_worker_took(producer: Producer) -> None:
    # Nobody serves the interactive lane here; the bulk worker's reaper watches deadlines of all.
    job_id = producer.submit("too late", lane="interactive", deadline_s=0.05)
    found = done(producer.wait(job_id, timeout_s=20))
    assert (found.state, found.attempts) == (JobState.EXPIRED, [])


def test_the_same_in_asyncio(sim: RunningSimulator, valkey: Valkey) -> None:
    async def main() -> None:
        async with AsyncProducer(redis_url=valkey.url) as producer:
            job_id = await producer.submit("hello", custom_id="mine")
            found = done(await producer.wait(job_id, timeout_s=20))
            assert (found.custom_id, found.state) == ("mine", JobState.SUCCEEDED)
            assert await producer.job(job_id) == found
            keyed = await producer.submit("hello", idempotency_key="k")
            assert await producer.submit("hello", idempotency_key="k") == keyed
            await producer.wait(keyed, timeout_s=20)
            sim.configure(hold=True)
            batch = await producer.submit_many(f"async {i}" for i in range(5))
            with pytest.raises(TimeoutError, match="has not ended within"):
                await producer.wait(batch, timeout_s=0.01)
            assert [result async for result in producer.results(batch, follow=False)] == []
            # A wait does not keep other calls from being made.
            waiting = asyncio.create_task(producer.wait(batch))
            assert (await producer.status(batch)).total == 5
            assert not waiting.done()
            sim.configure(hold=False)
            assert {result.job_id async for result in producer.results(batch)} == {f"{batch}-{i}" for i in range(5)}
            status = await waiting
            assert isinstance(status, BatchStatus)
            assert status.succeeded == 5
            assert (await producer.cancel(batch)).succeeded == 5
            with pytest.raises(NotFound):
                await producer.status("nope")
            with pytest.raises(InvalidRequest):
                await producer.submit({"messages": []})
        unused = AsyncProducer()
        await unused.close()

    asyncio.run(main())


def test_a_client_without_a_redis_uses_the_embedded_valkey(sim: RunningSimulator, tmp_path: Any) -> None:
    data = tmp_path / "data"
    with Producer(data_dir=data) as producer:
        job_id = producer.submit("kept for a worker to come")
    with opened(tmp_path / "box", base_url=sim.url, api_key="sk-test", data_dir=str(data)) as box:
        worker = box.start("worker", "--lane", "bulk")
        with Producer(data_dir=data) as producer:
            assert done(producer.wait(job_id, timeout_s=30)).state is JobState.SUCCEEDED
        worker.signal(signal.SIGTERM)
        worker.wait(0)
    wait_for(lambda: not still_served(data), what="the end of the embedded Valkey")


def still_served(data: Any) -> bool:
    """Whether a server of the data folder still listens."""
    from jobs.runtime import Runtime

    return Runtime.of(data).socket.exists()


def test_a_broker_that_is_away_is_only_warned_of(
    store_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(seconds: float) -> None:
        raise AssertionError("a submit waits for no second try")

    monkeypatch.setattr("kombu.utils.functional.sleep", wait)
    with Producer(redis_url=store_url, broker_url="redis://127.0.0.1:1/0") as producer:
        batch_id = producer.submit_many(["one", "two"])
        assert producer.status(batch_id).total == 2
    assert "ring_failed" in caplog.text
    assert batch_id in caplog.text


def test_one_job_of_several_is_not_cancelled_with_the_others(store_url: str) -> None:
    with Producer(redis_url=store_url, broker_url="redis://127.0.0.1:1/0") as producer:
        batch_id = producer.submit_many(["one", "two"])
        with pytest.raises(UsageError, match="one job of 2"):
            producer.cancel(f"{batch_id}-1")


def test_a_broker_that_can_not_be_is_refused_before_anything_is_submitted(store_url: str) -> None:
    with pytest.raises(UsageError, match=r"^MIMOQ_BROKER_URL: TLS options such as ssl_ca_certs need"):
        Producer(redis_url=store_url, broker_url="amqp://127.0.0.1//?ssl_ca_certs=/x")
