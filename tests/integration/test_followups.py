"""Follow-ups: written with a job's end, taken by one worker, seen to at least once; and how a task ends once more."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, signature
from celery.app.task import Context
from celery.exceptions import TaskRevokedError
from kombu.utils.json import loads

from jobs import followups, keys, leases
from jobs.broker import make_app
from jobs.connections import celery_url, connect
from jobs.errors import UsageError
from jobs.leases import End, Job
from jobs.links import Link, allowed, make_link, written
from jobs.results import NO_USAGE, About, Failure, Usage, failure_payload, success_payload
from jobs.settings import load_settings
from jobs.states import JobState
from jobs.store import NewBatch, Store
from producers import Producer
from tests.integration.api_stand import ask, core_standing, line, lines
from tests.integration.pipeline_stand import forget
from tests.integration.store_model import requests, run
from tests.waiting import wait_for
from worker.endings import Endings, Unended
from worker.followups import MOST_TRIES, FollowUps
from worker.signatures import signature_of

# redis-py's, of what Celery's backend calls.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")

LINK = {"task": "caller.note", "queue": "caller", "kwargs": {"why": "ended"}}
ANSWER = {"id": "1", "usage": {"total_tokens": 1234}, "choices": []}


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    client = connect(store_url)
    yield Store(client)
    client.close()


@pytest.fixture
def app(store_url: str) -> Iterator[Celery]:
    """The workers' app."""
    app = make_app(load_settings(), store_url)
    yield app
    forget(app)


@pytest.fixture
def caller(store_url: str) -> Iterator[Celery]:
    """Somebody's own."""
    url = celery_url(store_url)
    app = Celery("caller", broker=url, backend=url, set_as_current=False)
    app.conf.update(task_default_queue="caller")
    yield app
    forget(app)


def claimed(url: str, wanted: int, lane: str = "bulk") -> list[Job]:
    jobs: list[Job] = run(lambda client: leases.claim(client, "w", lane, [""], wanted, 60.0), url)
    return jobs


def end(url: str, job: Job, failure: Failure | None = None) -> None:
    """Ends a job, as its worker does."""
    about = About(None, "/v1/chat/completions", Usage(total_tokens=1234), [], 200, error=failure)
    if failure is None:
        stored = End(job, "s", success_payload(job.job_id, json.dumps(ANSWER).encode(), about, True), 1, NO_USAGE)
    else:
        stored = End(job, "f", failure_payload(job.job_id, about, True), 1, NO_USAGE, failure.code)
    assert run(lambda client: leases.finish(client, job.batch_id, [stored]), url) == ["ended"]


class Said:
    """What follow-ups tell and count."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.counts: list[str] = []

    def tell(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))


def seen_to(app: Celery, store: Store, until: Callable[[Said], bool]) -> Said:
    """What comes of a process that sees to follow-ups until then."""
    said = Said()
    seeing = FollowUps(app, store, said.tell, said.counts.append)
    seeing.start()
    seeing.stir()
    wait_for(lambda: until(said), what="follow-ups")
    seeing.stop()
    return said


def messages(app: Celery, queue: str) -> list[tuple[dict[str, Any], list[Any]]]:
    """Headers, and `[args, kwargs, embed]`, of what waits in a queue; it is taken off."""
    found = []
    with app.connection_for_read() as connection, connection.channel() as channel:
        while (message := channel.basic_get(queue, no_ack=True)) is not None:
            found.append((message.headers, loads(message.body)))
    return found


# -- written, taken, settled


def test_every_way_in_which_a_job_ends_has_its_follow_up(store: Store, store_url: str) -> None:
    batch_id = store.submit(requests(4), NewBatch(followup=written(LINK))).batch_id
    store.submit(requests(4), NewBatch())  # nothing follows these
    first, second, third, fourth = (job for job in claimed(store_url, 8) if job.batch_id == batch_id)
    end(store_url, first)
    end(store_url, second, Failure("bad_request", "no", 400))
    run(lambda client: leases.give_back(client, batch_id, [leases.Back(third)]), store_url)
    store.cancel(batch_id)  # the third at once, the fourth when its holder lets go of it
    run(lambda client: leases.give_back(client, batch_id, [leases.Back(fourth)]), store_url)
    taken = followups.take(store.client, 10)
    assert [(item.job_id, item.state) for item in sorted(taken)] == [
        (f"{batch_id}-0", JobState.SUCCEEDED),
        (f"{batch_id}-1", JobState.FAILED),
        (f"{batch_id}-2", JobState.CANCELLED),
        (f"{batch_id}-3", JobState.CANCELLED),
    ]
    assert [item.what for item in taken] == [Link("caller.note", "caller", {"why": "ended"})] * 4


def test_one_is_taken_once_and_again_when_its_worker_died(store: Store, store_url: str) -> None:
    store.submit(requests(1), NewBatch(followup=written(LINK)))
    (job,) = claimed(store_url, 1)
    end(store_url, job)
    (first,) = followups.take(store.client, 10, lease_s=0.05)
    assert followups.take(store.client, 10) == []
    (second,) = wait_for(lambda: followups.take(store.client, 10), what="the end of a lease")
    assert (first.tries, second.tries) == (1, 2)
    followups.done(store.client, first)  # too late: it is another's
    assert followups.pending(store.client) == 1
    followups.later(store.client, second, 0.0)
    (third,) = followups.take(store.client, 10)
    followups.done(store.client, third)
    assert followups.pending(store.client) == 0
    assert not store.client.exists(keys.FOLLOWUP_TRIES)


def test_a_job_that_ends_anew_is_followed_anew(store: Store, store_url: str) -> None:
    batch_id = store.submit(requests(1), NewBatch(followup=written(LINK))).batch_id
    (job,) = claimed(store_url, 1)
    end(store_url, job, Failure("bad_request", "no", 400))
    (first,) = followups.take(store.client, 10)
    store.requeue_failed(batch_id)
    (job,) = claimed(store_url, 1)
    end(store_url, job)
    followups.done(store.client, first)  # of its first end
    (second,) = followups.take(store.client, 10)
    assert second.state is JobState.SUCCEEDED


# -- links


@pytest.mark.parametrize(
    "given",
    [
        {"task": "a b"},
        {"task": ""},
        {"queue": "q"},
        {"task": "t", "args": [1]},
        {"task": "t", "kwargs": {"a": "x" * 5_000}},
        {"task": "t", "kwargs": {"a": object()}},
        {"task": "t", "queue": "mimoq.complete"},
    ],
)
def test_a_link_is_a_name_and_little_more(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="link: "):
        make_link(given)


def test_names_of_tasks_are_allowed_one_by_one_or_by_prefix() -> None:
    names = {"reports.done", "billing.*"}
    assert all(allowed(names, Link(task)) == Link(task) for task in ("reports.done", "billing.a.b"))
    assert not any(allowed(names, Link(task)) for task in ("reports.done.not", "billing", "billings.a", "*"))


def test_a_link_over_the_api_goes_to_the_queue_of_its_entry_and_no_other() -> None:
    names = {"a", "b@q", "c@q", "c@r", "d", "d.*@q"}
    assert allowed(names, Link("b")) == allowed(names, Link("b", "q")) == Link("b", "q")
    assert allowed(names, Link("c", "r")) == Link("c", "r")
    assert allowed(names, Link("d.e")) == Link("d.e", "q")
    refused = [
        Link("a", "celery"),
        Link("a", "q"),
        Link("b", "r"),
        Link("c"),
        Link("d", "q"),
        Link("b@q"),
        Link("b@q", "q"),
    ]
    assert not any(allowed(names, link) for link in refused)


def test_a_link_gets_the_ids_of_all_jobs_of_its_batch(
    store_url: str, store: Store, app: Celery, caller: Celery
) -> None:
    with Producer(redis_url=store_url) as producer:
        batch_id = producer.submit_many([{"prompt": "a"}, {"prompt": "b"}], link=LINK)
        single = producer.submit({"prompt": "c"}, link={"task": "caller.note"})
    for job in claimed(store_url, 3):
        end(store_url, job)
    said = seen_to(app, store, lambda said: len(said.counts) == 3)
    assert said.counts == ["done"] * 3
    found = messages(caller, "caller")
    assert sorted(body[0][0] for _, body in found) == [f"{batch_id}-0", f"{batch_id}-1"]
    assert {headers["task"] for headers, _ in found} == {"caller.note"}
    assert found[0][1][1] == {"why": "ended"}
    # One that names no queue goes where its app's default is said to be.
    assert [body[0] for _, body in messages(caller, "celery")] == [[single]]


# -- a task's end


def handed(caller: Celery, work: Any) -> list[str]:
    """The signatures that the tasks of some work arrive with."""
    work.apply_async()
    found = []
    for headers, (args, kwargs, embed) in messages(caller, "mimoq.complete"):
        found.append(signature_of(Context({**headers, **embed, "args": args, "kwargs": kwargs})))
    return found


def call(caller: Celery) -> Any:
    return signature("mimoq.complete", args=({"prompt": "p"},), queue="mimoq.complete", app=caller)


def mine(caller: Celery, **options: Any) -> Any:
    return signature("caller.gather", queue="caller", app=caller, **options)


def test_what_is_kept_of_a_message_is_not_what_it_asked_for(caller: Celery) -> None:
    (kept,) = handed(caller, chain(call(caller), mine(caller)))
    assert "prompt" not in kept
    assert {"id", "root_id", "chain", "callbacks", "errbacks", "group", "ignore_result"} <= json.loads(kept).keys()


def test_a_task_that_ended_in_part_ends_again_without_harm(app: Celery, caller: Celery) -> None:
    """Once the result is there its chain is not sent again; a chord counts its part once, however often it is told."""
    endings = Endings(app)
    (kept,) = handed(caller, chain(call(caller), mine(caller)))
    task = endings.end(kept, ANSWER)
    endings.end(kept, ANSWER, again=True)
    assert app.backend.get_result(task) == ANSWER
    assert len(messages(caller, "caller")) == 1

    first, second = handed(caller, chord([call(caller), call(caller)], mine(caller)))
    for kept, again in ((first, False), (first, True), (second, False), (second, True), (first, True)):
        endings.end(kept, ANSWER, again)
    ((_, body),) = messages(caller, "caller")
    assert body[0] == [[ANSWER, ANSWER]]


def test_a_failure_and_a_revocation_reach_result_and_errback(app: Celery, caller: Celery) -> None:
    endings = Endings(app)
    for error, state in (
        (RuntimeError("content_filter", 421, "no"), "FAILURE"),
        (TaskRevokedError("expired"), "REVOKED"),
    ):
        work = call(caller)
        work.link_error(mine(caller))
        (kept,) = handed(caller, work)
        task = endings.end(kept, error)
        meta = app.backend.get_task_meta(task)
        assert meta["status"] == state
        assert meta["result"].args == error.args
        assert meta["traceback"] is None
        ((_, body),) = messages(caller, "caller")
        assert body[0] == [task]


def test_no_failure_is_recorded_where_the_backend_is_away(
    app: Celery, caller: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept,) = handed(caller, chain(call(caller), mine(caller)))
    endings = Endings(app)
    with monkeypatch.context() as patch:
        patch.setattr(type(app.backend), "store_result", _away)
        with pytest.raises(Unended, match="ConnectionError") as caught:
            endings.end(kept, ANSWER)
        assert "secret" not in str(caught.value)
    task = endings.end(kept, ANSWER, again=True)
    assert app.backend.get_task_meta(task)["status"] == "SUCCESS"
    assert len(messages(caller, "caller")) == 2  # the chain at least once


def _away(*_: Any, **__: Any) -> None:
    from redis.exceptions import ConnectionError

    raise ConnectionError("secret")


def test_what_fails_is_tried_again_and_given_up_at_last(
    store: Store, store_url: str, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.submit(requests(1), NewBatch(followup=written(LINK)))
    (job,) = claimed(store_url, 1)
    end(store_url, job)
    monkeypatch.setattr(app, "send_task", _away)
    began = time.time()
    said = seen_to(app, store, lambda said: bool(said.counts))
    assert said.counts == ["failed"]
    assert store.client.zscore(keys.FOLLOWUPS, job.job_id) > began + 0.9
    store.client.hset(keys.FOLLOWUP_TRIES, job.job_id, MOST_TRIES - 1)
    store.client.zadd(keys.FOLLOWUPS, {job.job_id: 1.0})
    assert seen_to(app, store, lambda said: bool(said.counts)).counts == ["given_up"]
    assert followups.pending(store.client) == 0


def test_a_task_ends_though_the_worker_of_its_job_died_before_it_did(
    store: Store, store_url: str, app: Celery, caller: Celery
) -> None:
    (kept,) = handed(caller, chain(call(caller), mine(caller)))
    store.submit(requests(1), NewBatch(lane="complete", followup=followups.ending(kept)))
    (job,) = claimed(store_url, 1, "complete")
    end(store_url, job)
    assert followups.take(store.client, 1, lease_s=0.05)  # and dies
    said = seen_to(app, store, lambda said: bool(said.counts))
    task = json.loads(kept)["id"]
    assert app.backend.get_result(task) == ANSWER
    ((kind, fields),) = said.events
    assert (kind, fields["uuid"], fields["result"]) == ("task-succeeded", task, "1,234 tokens")
    assert not store.client.hexists(keys.batch(job.batch_id), "followup")


def test_examples_import_nothing_of_this_project() -> None:
    folder = Path(__file__).parents[2] / "examples" / "celery_pipeline"
    for path in folder.glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert not [line for line in lines if line.split()[1].split(".")[0] in ("jobs", "worker", "producers", "api")]


# -- over HTTP


def test_the_api_takes_links_to_tasks_that_the_operator_allows(store_url: str) -> None:
    async def main() -> None:
        async with core_standing(store_url, api_link_tasks="reports.done,billing.*@q") as (core, http):
            allowed = {"task": "billing.a", "queue": "q", "kwargs": {"a": 1}}
            job = await http.post("/v1/jobs", json={"request": ask(), "link": allowed})
            batch = await http.post("/v1/job-batches", json={"requests": [line()], "link": {"task": "reports.done"}})
            body = lines({"prompt": "x"})
            params = {"link": json.dumps(allowed)}
            jsonl = {"content-type": "application/jsonl"}
            streamed = await http.post("/v1/job-batches", params=params, content=body, headers=jsonl)
            ids = [job.json()["batch_id"], batch.json()["id"], streamed.json()["id"]]
            kept = [json.loads(await core.client.hget(keys.batch(batch_id), "followup") or b"") for batch_id in ids]
            assert [link["task"] for link in kept] == ["billing.a", "reports.done", "billing.a"]
            assert kept[0] == kept[2] == {"type": "link", **allowed}

            other = {"request": ask(), "link": {"task": "billing"}}
            refused = await http.post("/v1/jobs", json=other)
            assert (refused.status_code, refused.json()["code"]) == (403, "link_not_allowed")
            assert "MIMOQ_API_LINK_TASKS" in refused.json()["detail"]
            for link in ({"task": "reports.done", "queue": "q"}, {"task": "billing.a", "queue": "mimoq.complete"}):
                refused = await http.post("/v1/jobs", json={"request": ask(), "link": link})
                assert (refused.status_code, refused.json()["code"]) == (403, "link_not_allowed")
            for bad in ({"task": "no name"}, {"task": "billing.a", "args": []}, {"task": "billing.a", "kwargs": []}):
                answer = await http.post("/v1/jobs", json={"request": ask(), "link": bad})
                assert answer.status_code == 422
            assert await core.client.zcard(keys.BATCHES) == 3

    asyncio.run(main())
