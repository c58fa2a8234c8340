"""Native jobs over HTTP: an API process, a real store, a worker with the simulator behind it for the bulk lane.

Nobody serves the interactive lane: what is submitted there waits until the test itself plays the worker.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.integration.api_stand import ANSWER, USAGE, ApiStand, answer, api_stand, ask, ask_message, claim, line, lines
from tests.waiting import wait_for

PRICES = {"m": {"prompt": 2.0, "completion": 10.0, "cached": 0.5}, "*": {"prompt": 1.0, "completion": 1.0}}
#: Less than a waiter looks by itself: what takes less was told.
TOLD_S = 10.0


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiStand]:
    triggers = {"meet a 400": "400", "meet a 421": "421"}
    with api_stand(tmp_path_factory.mktemp("api"), durable=True, triggers=triggers) as stand:
        stand.api(prices=json.dumps(PRICES), store_patience_s="2")
        stand.work("bulk", max_attempts="2")
        yield stand
        stand.kept_secrets()


@pytest.fixture
def http(stand: ApiStand) -> httpx.Client:
    """A client of a new tenant."""
    return stand.http()


def submit(http: httpx.Client, key: str | None = None, **new: Any) -> dict[str, Any]:
    """A job that was accepted, on the lane that nobody serves unless it says another."""
    headers = {} if key is None else {"Idempotency-Key": key}
    new = {"request": ask(), "lane": "interactive", **new}
    response = http.post("/v1/jobs", json=new, headers=headers)
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    return job


def get(http: httpx.Client, job: str, **params: Any) -> dict[str, Any]:
    """A look at a job."""
    response = http.get(f"/v1/jobs/{job}", params=params)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    assert found["id"] == job
    return found


def listed(http: httpx.Client, **params: Any) -> list[str]:
    """Ids of a page."""
    return [job["id"] for job in http.get("/v1/jobs", params=params).json()["data"]]


# -- submit and look


def test_the_life_of_a_job_as_its_submitter_sees_it(stand: ApiStand, http: httpx.Client) -> None:
    told: dict[str, Any] = {
        "custom_id": "mine",
        "metadata": {"who": "me", "Größe": "✓"},
        "deadline_s": 1000,
        "max_attempts": 3,
    }
    job = submit(http, **told)
    assert (job["state"], job["attempts"], job["response"], job["error"]) == ("queued", [], None, None)
    assert (job["custom_id"], job["metadata"], job["lane"]) == ("mine", told["metadata"], "interactive")
    assert job["deadline_at"] == pytest.approx(job["created_at"] + 1000, abs=0.01)
    assert get(http, job["id"]) == job
    (claimed,) = claim(stand.valkey.url, job["id"])
    assert claimed.max_attempts == 3
    running = get(http, job["id"])
    assert running == {**job, "state": "running"}
    answer(stand.valkey.url, claimed)
    ended = get(http, job["id"])
    assert ended["state"] == "succeeded"
    assert ended["ended_at"] == pytest.approx(time.time(), abs=60)
    assert [(a["verdict"], a["status"], a["latency_s"]) for a in ended["attempts"]] == [("succeeded", 200, 0.5)]
    assert ended["usage"] == {name: getattr(USAGE, name) for name in USAGE.__struct_fields__}
    # 600 tokens that were not cached, 400 that were, 200 of the answer.
    assert ended["cost"] == pytest.approx((600 * 2.0 + 400 * 0.5 + 200 * 10.0) / 1e6)
    same = {"id", "batch_id", "custom_id", "metadata", "created_at", "deadline_at", "lane", "endpoint"}
    assert {name: ended[name] for name in same} == {name: job[name] for name in same}


def test_the_response_is_byte_for_byte_what_the_upstream_sent(stand: ApiStand, http: httpx.Client) -> None:
    job = submit(http)
    answer(stand.valkey.url, *claim(stand.valkey.url, job["id"]))
    raw = http.get(f"/v1/jobs/{job['id']}").content
    assert b'"response":' + ANSWER + b',"error"' in raw


def test_the_request_reaches_the_upstream_as_it_was_written(stand: ApiStand, http: httpx.Client) -> None:
    body = (
        b'{"model":"m", "messages":[{"role":"user","content":"\\u00e9"}],\n "top_p":1.00,"seed":12345678901234567890}'
    )
    sent = http.post("/v1/jobs", content=b'{"request":%s,"lane":"interactive"}' % body)
    (job,) = claim(stand.valkey.url, sent.json()["id"])
    assert job.request.body == body


def test_a_job_is_there_whatever_dies_after_it_was_accepted(stand: ApiStand, http: httpx.Client) -> None:
    jobs = [submit(http) for _ in range(20)]
    stand.valkey.written()
    stand.valkey.kill()
    with ThreadPoolExecutor() as pool:  # one that comes meanwhile waits for the store
        late = pool.submit(submit, http)
        stand.valkey.start()
        jobs.append(late.result())
    for job in jobs:
        assert get(http, job["id"]) == job
    assert len(claim(stand.valkey.url, *(job["id"] for job in jobs))) == 21


def test_a_store_that_stays_away_is_said_to_be(stand: ApiStand, http: httpx.Client) -> None:
    job = submit(http)
    stand.valkey.written()
    stand.valkey.kill()
    try:
        with ThreadPoolExecutor() as pool:
            answers = list(
                pool.map(
                    lambda ask: ask(),
                    [
                        lambda: http.post("/v1/jobs", json={"request": ask()}),
                        lambda: http.get(f"/v1/jobs/{job['id']}"),
                        lambda: http.get("/v1/jobs"),
                        lambda: http.get("/readyz"),
                    ],
                )
            )
    finally:
        stand.valkey.start()
    assert [response.status_code for response in answers] == [503] * 4
    for response in answers[:3]:
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["retry-after"] == "1"
        assert response.json()["code"] == "store_unavailable"
    assert get(http, job["id"])["state"] == "queued"
    wait_for(lambda: http.get("/readyz").status_code == 200, what="a process that is ready again")


# -- idempotency


def test_a_key_with_the_same_body_gives_the_same_job(stand: ApiStand, http: httpx.Client) -> None:
    new = {"request": ask(), "lane": "interactive", "metadata": {"a": "1", "b": "2"}, "custom_id": "x"}
    first = submit(http, "k1", **new)
    other_order = dict(reversed(new.items())) | {"metadata": {"b": "2", "a": "1"}}
    for body in (new, other_order):
        again = http.post("/v1/jobs", content=json.dumps(body, indent=1), headers={"Idempotency-Key": "k1"})
        assert (again.status_code, again.json()) == (200, first)
        assert again.headers["location"] == f"/v1/jobs/{first['id']}"
    for change in ({"lane": "bulk"}, {"request": ask()}, {"metadata": {"a": "1"}}, {"custom_id": None}):
        other = http.post("/v1/jobs", json={**new, **change}, headers={"Idempotency-Key": "k1"})
        assert (other.status_code, other.json()["code"]) == (409, "conflict")
    assert submit(http, "k2", **new)["id"] != first["id"]
    # Another tenant's key is another key.
    assert submit(stand.http(), "k1", request=ask())["id"] != first["id"]
    assert listed(http)[1:] == [first["id"]]


def test_of_many_with_one_key_at_once_there_is_one_job(http: httpx.Client) -> None:
    new = {"request": ask(), "lane": "interactive"}
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda _: http.post("/v1/jobs", json=new, headers={"Idempotency-Key": "k"}), range(20)))
    assert sorted(response.status_code for response in found) == [200] * 19 + [202]
    assert len({response.json()["id"] for response in found}) == 1
    assert len(listed(http)) == 1


def test_a_key_whose_job_has_ended_gives_the_ended_job(stand: ApiStand, http: httpx.Client) -> None:
    new = {"request": ask(), "lane": "interactive"}
    job = submit(http, "k", **new)
    answer(stand.valkey.url, *claim(stand.valkey.url, job["id"]))
    again = http.post("/v1/jobs", json=new, headers={"Idempotency-Key": "k"}, params={"wait": 10})
    assert (again.status_code, again.json()["state"]) == (200, "succeeded")


# -- what comes of a call


def test_a_call_that_is_made_again_is_on_record(stand: ApiStand, http: httpx.Client) -> None:
    stand.simulator.configure(script=["503"])
    done = http.post("/v1/jobs", json={"request": ask()}, params={"wait": 60})
    assert done.status_code == 200
    job = done.json()
    assert [(attempt["status"], attempt["verdict"]) for attempt in job["attempts"]][1:] == [(200, "succeeded")]
    assert job["attempts"][0]["status"] == 503
    assert job["usage"] == job["attempts"][1]["usage"]
    assert job["cost"] > 0


@pytest.mark.parametrize(
    ("prompt", "code", "status"), [("meet a 400", None, 400), ("meet a 421", "content_filter", 421)]
)
def test_an_error_of_the_upstream_is_told_whole(http: httpx.Client, prompt: str, code: str | None, status: int) -> None:
    request = {"model": "m", "messages": [{"role": "user", "content": prompt}]}
    job = http.post("/v1/jobs", json={"request": request}, params={"wait": 60}).json()
    assert (job["state"], job["response"], job["error"]["status"]) == ("failed", None, status)
    assert code in (None, job["error"]["code"])
    assert job["error"]["body"]["error"]["message"]
    assert [attempt["status"] for attempt in job["attempts"]] == [status]


def test_messages_are_jobs_too(http: httpx.Client) -> None:
    new = {"endpoint": "/v1/messages", "request": ask_message()}
    job = http.post("/v1/jobs", json=new, params={"wait": 60}).json()
    assert (job["state"], job["endpoint"], job["response"]["type"]) == ("succeeded", "/v1/messages", "message")


# -- waiting


def test_who_waits_is_answered_as_soon_as_the_job_ends(stand: ApiStand, http: httpx.Client) -> None:
    job = submit(http)
    with ThreadPoolExecutor() as pool:
        began = time.monotonic()
        waits = [pool.submit(get, http, job["id"], wait=600) for _ in range(5)]
        posted = pool.submit(
            http.post, "/v1/jobs", json={"request": ask(), "lane": "interactive"}, params={"wait": 600}
        )
        other = wait_for(lambda: [found for found in listed(http) if found != job["id"]], what="the other job")
        claimed = claim(stand.valkey.url, job["id"], *other)
        assert not any(wait.done() for wait in waits)
        for one in claimed:
            answer(stand.valkey.url, one)
        assert {wait.result()["state"] for wait in waits} == {"succeeded"}
        assert (posted.result().status_code, posted.result().json()["state"]) == (200, "succeeded")
        assert time.monotonic() - began < TOLD_S


def test_a_wait_that_is_over_tells_how_things_stand(http: httpx.Client) -> None:
    job = submit(http)
    assert get(http, job["id"], wait=0.05)["state"] == "queued"
    response = http.post("/v1/jobs", json={"request": ask(), "lane": "interactive"}, params={"wait": 0.05})
    assert (response.status_code, response.json()["state"]) == (202, "queued")
    for wait in ("-1", "601", "nan", "inf", "soon"):
        assert http.get(f"/v1/jobs/{job['id']}", params={"wait": wait}).status_code == 422


def test_a_job_that_has_ended_is_not_waited_for(stand: ApiStand, http: httpx.Client) -> None:
    job = submit(http)
    http.post(f"/v1/jobs/{job['id']}/cancel")
    began = time.monotonic()
    assert get(http, job["id"], wait=600)["state"] == "cancelled"
    assert time.monotonic() - began < TOLD_S


# -- the other ends


def test_a_cancelled_job_ends_at_once_unless_it_is_being_called(stand: ApiStand, http: httpx.Client) -> None:
    job = submit(http)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(get, http, job["id"], wait=600)
        cancelled = http.post(f"/v1/jobs/{job['id']}/cancel")
        assert cancelled.status_code == 200
        told = waiting.result()
        # It may be told of before its end is written, which says when.
        assert told | {"ended_at": None} == cancelled.json() | {"ended_at": None}
    assert (cancelled.json()["state"], cancelled.json()["error"]["code"]) == ("cancelled", "cancelled")
    assert cancelled.json()["ended_at"] is not None
    called = submit(http)
    (claimed,) = claim(stand.valkey.url, called["id"])
    assert http.post(f"/v1/jobs/{called['id']}/cancel").json()["state"] == "running"
    answer(stand.valkey.url, claimed)  # which has been paid for
    assert http.post(f"/v1/jobs/{called['id']}/cancel").json()["state"] == "succeeded"


def test_one_job_of_a_batch_is_not_cancelled_alone(http: httpx.Client) -> None:
    batch = http.post("/v1/job-batches", json={"requests": [line()], "lane": "interactive"}).json()["id"]
    refused = http.post(f"/v1/jobs/{batch}-0/cancel")
    assert (refused.status_code, refused.json()["code"]) == (409, "batch_job")
    assert f"/v1/job-batches/{batch}/cancel" in refused.json()["detail"]
    assert http.post(f"/v1/job-batches/{batch}/cancel").status_code == 200
    assert get(http, f"{batch}-0")["state"] == "cancelled"


def test_a_job_that_is_not_answered_by_its_deadline_expires(http: httpx.Client) -> None:
    job = submit(http, deadline_s=0.001)
    ended = get(http, job["id"], wait=60)
    assert (ended["state"], ended["error"]["code"]) == ("expired", "expired")
    written = wait_for(lambda: get(http, job["id"])["ended_at"], what="its end on record")
    assert ended["deadline_at"] <= written


# -- lists


def test_lists_by_id_batch_and_state(stand: ApiStand, http: httpx.Client) -> None:
    alone = [submit(http)["id"] for _ in range(3)]
    sent = lines(*(line(f"n{n}") for n in range(5)))
    headers = {"content-type": "application/jsonl"}
    batch = http.post("/v1/job-batches", content=sent, headers=headers, params={"lane": "interactive"}).json()["id"]
    inside = [f"{batch}-{index}" for index in range(5)]
    jobs = {job.job_id: job for job in claim(stand.valkey.url, *alone, *inside)}
    answer(stand.valkey.url, jobs[alone[1]])
    answer(stand.valkey.url, jobs[inside[3]], jobs[inside[1]])

    def ids(**params: Any) -> list[str]:
        """All pages, of two each."""
        found: list[str] = []
        after: dict[str, str] = {}
        while True:
            page = http.get("/v1/jobs", params={"limit": 2, **params, **after}).json()
            assert len(page["data"]) <= 2
            assert page["has_more"] == (page["after"] is not None)
            assert all("response" not in job for job in page["data"])
            found += [job["id"] for job in page["data"]]
            if not page["has_more"]:
                return found
            after = {"after": page["after"]}

    assert ids() == [*inside, *reversed(alone)]
    assert ids(batch=batch) == inside
    assert ids(state="succeeded") == [inside[1], inside[3], alone[1]]
    assert ids(state="running") == [inside[0], inside[2], inside[4], alone[2], alone[0]]
    assert ids(state="succeeded", batch=batch) == [inside[1], inside[3]]
    assert ids(state="failed") == []
    assert stand.http().get("/v1/jobs").json() == {"object": "list", "data": [], "has_more": False, "after": None}
    for refused in ({"state": "odd"}, {"limit": 0}, {"limit": 101}):
        assert http.get("/v1/jobs", params=refused).status_code == 422
    for unknown in ({"batch": "x"}, {"after": "x"}, {"after": f"{'0' * 24}-0"}, {"after": alone[0], "batch": batch}):
        assert http.get("/v1/jobs", params=unknown).status_code == 404


# -- bodies


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        ({}, 422, "request"),
        ({"request": {}}, 422, "messages"),
        ({"request": ask(), "lane": "fast"}, 422, "lane"),
        ({"request": ask(), "priority": 1}, 422, "priority"),
        ({"request": ask(), "deadline_s": 0}, 422, "deadline_s"),
        ({"request": ask(), "metadata": {"a": 1}}, 422, "metadata"),
        ({"request": ask(), "custom_id": "a\nb"}, 422, "custom_id"),
        ({"request": ask(), "callback_url": "http://127.0.0.1/"}, 422, "https"),
        ([], 422, "object"),
    ],
)
def test_what_breaks_a_rule_is_refused_with_its_name(http: httpx.Client, body: Any, status: int, part: str) -> None:
    refused = http.post("/v1/jobs", json=body)
    assert (refused.status_code, refused.headers["content-type"]) == (status, "application/problem+json")
    problem = refused.json()
    assert {"type", "title", "status", "detail", "code"} <= problem.keys()
    assert part in problem["detail"]
    assert listed(http) == []
