"""Native batches over HTTP: submitted inline or as a stream, followed while they run, paused, resumed, cancelled.

Nobody serves the interactive lane: what is submitted there waits until the test itself plays the worker.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from jobs import keys
from jobs.gates import gates_of
from jobs.identity import account
from jobs.requests import MESSAGES
from tests.integration.api_stand import (
    ANSWER,
    ApiStand,
    answer,
    api_stand,
    ask,
    ask_message,
    claim,
    line,
    lines,
)
from tests.integration.worker_stand import KEY
from tests.waiting import wait_for

JSONL = {"content-type": "application/jsonl"}
MOST_BYTES = 100_000_000
LONGEST_LINE = 200_000


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiStand]:
    with api_stand(tmp_path_factory.mktemp("api"), triggers={"meet a 400": "400"}) as stand:
        stand.api(api_max_upload_bytes=str(MOST_BYTES), max_line_bytes=str(LONGEST_LINE))
        stand.work("bulk")
        yield stand
        stand.kept_secrets()


@pytest.fixture
def http(stand: ApiStand) -> httpx.Client:
    """A client of a new tenant."""
    return stand.http()


def submit(http: httpx.Client, jobs: int = 5, **new: Any) -> str:
    """A batch that nobody serves."""
    told = {"lane": "interactive", "requests": [line(f"n{n}") for n in range(jobs)], **new}
    response = http.post("/v1/job-batches", json=told)
    assert response.status_code == 202, response.text
    batch: str = response.json()["id"]
    assert response.headers["location"] == f"/v1/job-batches/{batch}"
    return batch


def get(http: httpx.Client, batch: str) -> dict[str, Any]:
    """A look at a batch."""
    response = http.get(f"/v1/job-batches/{batch}")
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    counts = found["counts"]
    assert counts["total"] == sum(count for name, count in counts.items() if name != "total")
    return found


def results(http: httpx.Client, batch: str, **params: Any) -> list[dict[str, Any]]:
    """Lines of results."""
    response = http.get(f"/v1/job-batches/{batch}/results", params=params)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/jsonl")
    return [json.loads(text) for text in response.text.splitlines()]


def batches(stand: ApiStand) -> int:
    """How many there are in the store."""
    return int(stand.redis.zcard(keys.BATCHES))


def nothing_staged(stand: ApiStand) -> bool:
    """Whether no upload has left anything behind."""
    return not stand.redis.keys("mimoq:staged:*")


def play(stand: ApiStand, batch: str, *indexes: int) -> None:
    """Ends these jobs of a batch, in this order."""
    for job in claim(stand.valkey.url, *(f"{batch}-{index}" for index in indexes)):
        answer(stand.valkey.url, job)


def upload(token: str, framing: str) -> bytes:
    """The head of a request that brings JSON lines."""
    head = f"POST /v1/job-batches HTTP/1.1\r\nHost: x\r\nX-Api-Key: {token}\r\nContent-Type: application/jsonl\r\n"
    return f"{head}{framing}\r\n\r\n".encode()


# -- submitted


def test_inline_from_submit_to_results(http: httpx.Client) -> None:
    requests = [
        line("a"),
        {**ask(), "custom_id": "b"},
        {"prompt": "c?"},
        {**line("d"), "url": MESSAGES, "body": ask_message()},
    ]
    told = {"requests": requests, "metadata": {"who": "me"}, "deadline_s": 600}
    sent = http.post("/v1/job-batches", json=told)
    assert sent.status_code == 202
    batch = sent.json()
    assert (batch["counts"]["total"], batch["metadata"], batch["lane"]) == (4, {"who": "me"}, "bulk")
    assert batch["deadline_at"] == pytest.approx(batch["created_at"] + 600, abs=0.01)
    found = results(http, batch["id"], follow=True)
    assert {(job["custom_id"], job["state"], job["endpoint"] == MESSAGES) for job in found} == {
        ("a", "succeeded", False),
        ("b", "succeeded", False),
        (None, "succeeded", False),
        ("d", "succeeded", True),
    }
    assert [job["cursor"] for job in found] == [1, 2, 3, 4]
    ended = get(http, batch["id"])
    assert (ended["state"], ended["counts"]["succeeded"], ended["attempts"]) == ("finished", 4, 4)
    assert ended["usage"]["total_tokens"] == sum(job["usage"]["total_tokens"] for job in found)
    assert ended["created_at"] <= ended["started_at"] <= ended["ended_at"]


@pytest.mark.parametrize("kind", ["application/jsonl", "application/x-ndjson; charset=utf-8", "Application/JSONL"])
def test_as_json_lines_with_options_as_parameters(http: httpx.Client, kind: str) -> None:
    sent = b"\xef\xbb\xbf" + lines(line("a"), line("b")) + b"\r\n\n" + json.dumps(line("c")).encode()
    params: dict[str, str | int] = {
        "lane": "interactive",
        "metadata": '{"who":"me"}',
        "deadline_s": 600,
        "max_attempts": 2,
    }
    response = http.post("/v1/job-batches", content=sent, headers={"content-type": kind}, params=params)
    assert response.status_code == 202, response.text
    batch = response.json()
    assert (batch["counts"]["total"], batch["metadata"], batch["lane"]) == (3, {"who": "me"}, "interactive")
    listed = http.get("/v1/jobs", params={"batch": batch["id"]}).json()["data"]
    assert [job["custom_id"] for job in listed] == ["a", "b", "c"]
    assert all(job["metadata"] == {"who": "me"} and job["deadline_at"] for job in listed)


def test_a_key_gives_the_batch_it_gave_before(http: httpx.Client) -> None:
    def sent(key: str, *items: Any) -> httpx.Response:
        headers = {**JSONL, "Idempotency-Key": key}
        return http.post("/v1/job-batches", content=lines(*items), headers=headers, params={"lane": "interactive"})

    items = [line() for _ in range(3)]
    first = sent("k", *items)
    again = sent("k", *items)
    assert (first.status_code, again.status_code) == (202, 200)
    assert again.json() == first.json()
    for other in (items[:2], [*items, line()], [line(), *items[1:]]):
        assert sent("k", *other).status_code == 409
    told = {"requests": items, "lane": "interactive"}
    inline = http.post("/v1/job-batches", json=told, headers={"Idempotency-Key": "i"})
    assert inline.status_code == 202
    same = http.post("/v1/job-batches", json=dict(reversed(told.items())), headers={"Idempotency-Key": "i"})
    assert (same.status_code, same.json()) == (200, inline.json())
    other_options = http.post(
        "/v1/job-batches", json={**told, "metadata": {"a": "b"}}, headers={"Idempotency-Key": "i"}
    )
    assert other_options.status_code == 409
    assert len(http.get("/v1/job-batches").json()["data"]) == 2


def test_a_large_upload_needs_no_memory(stand: ApiStand, http: httpx.Client) -> None:
    process = psutil.Process(stand.apis[0].process.pid)
    body = json.dumps(line("x", metadata={"filler": "y" * 20_000})).encode() + b"\n"
    count = 60_000_000 // len(body)
    http.post("/v1/job-batches", content=body * 300, headers=JSONL, params={"lane": "interactive"})
    before = process.memory_info().rss
    most = 0

    def sent() -> Iterator[bytes]:
        nonlocal most
        for number in range(count):
            yield body
            if number % 100 == 0:
                most = max(most, process.memory_info().rss)

    response = http.post("/v1/job-batches", content=sent(), headers=JSONL, params={"lane": "interactive"})
    assert (response.status_code, response.json()["counts"]["total"]) == (202, count)
    assert most - before < 25_000_000
    http.post(f"/v1/job-batches/{response.json()['id']}/cancel")


# -- nothing is submitted


def test_lines_that_break_a_rule_are_named_and_nothing_is_submitted(stand: ApiStand, http: httpx.Client) -> None:
    before = batches(stand)
    good = lines(*(line() for _ in range(3_000)))
    bad = [b'{"custom_id": "x", "body": {}}\n', b"not json\n", b'{"x": "%s"}\n' % (b"z" * LONGEST_LINE)]
    refused = http.post("/v1/job-batches", content=good + bad[0] + good + bad[1] + bad[2] + good, headers=JSONL)
    assert (refused.status_code, refused.headers["content-type"]) == (422, "application/problem+json")
    problem = refused.json()
    assert problem["code"] == "invalid_requests"
    assert [item["line"] for item in problem["problems"]] == [3_001, 6_002, 6_003]
    assert "messages" in problem["problems"][0]["message"]
    assert "longer" in problem["problems"][2]["message"]
    assert problem["detail"].startswith("3 of the requests break a rule, nothing was submitted; line 3001")
    inline = http.post("/v1/job-batches", json={"requests": [line(), {"body": 1}, line(), {}]})
    assert [item["request"] for item in inline.json()["problems"]] == [1, 3]
    many = http.post("/v1/job-batches", content=b"x\n" * 1_000, headers=JSONL).json()
    assert len(many["problems"]) == 20
    assert many["detail"].startswith("1,000 of")
    assert batches(stand) == before
    assert nothing_staged(stand)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_batch_of_nothing(http: httpx.Client, content: bytes) -> None:
    refused = http.post("/v1/job-batches", content=content, headers=JSONL)
    assert refused.status_code == 422
    assert "at least one request" in refused.json()["detail"]
    assert http.post("/v1/job-batches", json={"requests": []}).status_code == 422


def test_options_that_can_not_be(http: httpx.Client) -> None:
    for params in (
        {"lane": "fast"},
        {"deadline_s": "0"},
        {"deadline_s": "nan"},
        {"max_attempts": "0"},
        {"metadata": "[]"},
        {"metadata": '{"a": 1}'},
        {"callback_url": "http://127.0.0.1/"},
        {"endpoint": "/v1/embeddings"},
    ):
        refused = http.post("/v1/job-batches", content=lines(line()), headers=JSONL, params=params)
        assert refused.status_code == 422, params
    assert http.post("/v1/job-batches", content=b"x", headers={"content-type": "text/csv"}).status_code == 415
    assert http.get("/v1/job-batches").json()["data"] == []


def test_an_upload_that_is_too_long(stand: ApiStand, http: httpx.Client) -> None:
    before = batches(stand)
    host, port = stand.apis[0].url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:  # refused before any of it is sent
        connection.sendall(upload(stand.token(), f"Content-Length: {MOST_BYTES + 1}"))
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    assert batches(stand) == before


def test_an_upload_that_is_cut_leaves_nothing(stand: ApiStand, http: httpx.Client) -> None:
    before = batches(stand)
    host, port = stand.apis[0].url.removeprefix("http://").split(":")
    token = stand.token()
    # Texts of chance, which stay long when compressed: blocks of it are in the store before it ends.
    body = lines(*(line(metadata={"filler": secrets.token_hex(5_000)}) for _ in range(800)))
    for framing in (f"Content-Length: {len(body) * 2}", "Transfer-Encoding: chunked"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(upload(token, framing))
            if "chunked" in framing:
                connection.sendall(f"{len(body):x}\r\n".encode())
            connection.sendall(body)
            wait_for(lambda: not nothing_staged(stand), what="blocks in the store")
        wait_for(lambda: nothing_staged(stand), what="what was staged to go")
    assert batches(stand) == before
    assert http.get("/v1/job-batches").json()["data"] == []


# -- followed


def test_results_come_while_the_batch_runs(stand: ApiStand, http: httpx.Client) -> None:
    batch = submit(http)
    assert results(http, batch) == []
    play(stand, batch, 3, 1)
    found = results(http, batch)
    assert [(job["id"], job["custom_id"], job["cursor"]) for job in found] == [
        (f"{batch}-3", "n3", 1),
        (f"{batch}-1", "n1", 2),
    ]
    assert found[0]["response"] == json.loads(ANSWER)
    assert results(http, batch, after="1") == found[1:]
    assert results(http, batch, after=f"{batch}-3") == found[1:]
    assert results(http, batch, after="2") == results(http, batch, after=f"{batch}-1") == []
    play(stand, batch, 4)
    assert [job["custom_id"] for job in results(http, batch, after="2")] == ["n4"]
    assert get(http, batch)["counts"]["succeeded"] == 3
    for unknown in (f"{batch}-0", f"{batch}-5", "x", "-1", f"{'0' * 24}-0", "9" * 13):
        refused = http.get(f"/v1/job-batches/{batch}/results", params={"after": unknown})
        assert (refused.status_code, refused.json()["code"]) == (404, "not_found"), unknown


def test_behind_any_job_of_many(stand: ApiStand, http: httpx.Client) -> None:
    """Indexes whose bytes look alike across the borders of others."""
    batch = submit(http, 600)
    order = [(n * 257) % 600 for n in range(600)]
    jobs = {job.index: job for job in claim(stand.valkey.url, *(f"{batch}-{index}" for index in order))}
    answer(stand.valkey.url, *(jobs[index] for index in order))
    for place in range(0, 600, 97):
        behind = results(http, batch, after=f"{batch}-{order[place]}")
        assert [job["id"] for job in behind] == [f"{batch}-{index}" for index in order[place + 1 :]]
    assert [job["cursor"] for job in results(http, batch)] == list(range(1, 601))


def test_following_stays_until_the_end(stand: ApiStand, http: httpx.Client) -> None:
    batch = submit(http, 3)
    play(stand, batch, 0)
    with http.stream("GET", f"/v1/job-batches/{batch}/results", params={"follow": True}) as response:
        came = response.iter_lines()
        assert json.loads(next(came))["custom_id"] == "n0"
        one, two = claim(stand.valkey.url, f"{batch}-1", f"{batch}-2")
        for job in (two, one):
            answer(stand.valkey.url, job)
            assert json.loads(next(came))["id"] == job.job_id
        assert list(came) == []


def test_progress_as_events(stand: ApiStand, http: httpx.Client) -> None:
    batch = submit(http, 2)
    with http.stream("GET", f"/v1/job-batches/{batch}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        came = events(response)
        kind, first = next(came)
        assert (kind, first["state"], first["counts"]["queued"]) == ("progress", "running", 2)
        assert first["held_back_by"] == ["no_worker"]
        http.post(f"/v1/job-batches/{batch}/pause")
        kind, paused = next(came)
        assert (kind, paused["state"], paused["held_back_by"]) == ("progress", "paused", ["paused"])
        http.post(f"/v1/job-batches/{batch}/resume")
        held = claim(stand.valkey.url, f"{batch}-0", f"{batch}-1")
        for job in held:
            answer(stand.valkey.url, job)
        *_, (kind, last) = came
        assert (kind, last["state"], last["counts"]["succeeded"]) == ("finished", "finished", 2)
    assert http.get(f"/v1/job-batches/{batch}/events").text.startswith("event: finished\n")


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind and data of server-sent events."""
    kind = ""
    for text in response.iter_lines():
        if text.startswith("event: "):
            kind = text.removeprefix("event: ")
        elif text.startswith("data: "):
            yield kind, json.loads(text.removeprefix("data: "))


def test_a_gate_is_told_as_what_holds_it_back(stand: ApiStand, http: httpx.Client) -> None:
    stand.simulator.configure(down="503")
    try:
        batch = http.post("/v1/job-batches", json={"requests": [line() for _ in range(60)]}).json()["id"]
        gates = wait_for(lambda: gates_of(stand.redis, account(KEY)), what="a gate that is shut")
        with http.stream("GET", f"/v1/job-batches/{batch}/events") as response:
            assert gates[0].why in next(events(response))[1]["held_back_by"]
        http.post(f"/v1/job-batches/{batch}/cancel")
    finally:
        stand.simulator.configure(down=None)


# -- changed


def test_paused_resumed_cancelled(stand: ApiStand, http: httpx.Client) -> None:
    batch = submit(http, 3)
    play(stand, batch, 1)
    changed = http.post(f"/v1/job-batches/{batch}/pause")
    assert (changed.status_code, changed.json()["state"]) == (200, "paused")
    assert http.post(f"/v1/job-batches/{batch}/pause").json()["state"] == "paused"
    assert http.post(f"/v1/job-batches/{batch}/resume").json()["state"] == "running"
    later = submit(http, 3)
    with ThreadPoolExecutor() as pool:
        following = pool.submit(results, http, later, follow=True)
        cancelled = http.post(f"/v1/job-batches/{later}/cancel").json()
        assert (cancelled["state"], cancelled["counts"]["cancelled"]) == ("finished", 3)
        found = following.result()
    assert [(job["state"], job["error"]["code"], job["response"]) for job in found] == [
        ("cancelled", "cancelled", None)
    ] * 3
    for change in ("pause", "resume", "cancel"):
        assert http.post(f"/v1/job-batches/{later}/{change}").json()["state"] == "finished"


def test_a_batch_that_only_fails_pauses_and_says_why(http: httpx.Client) -> None:
    request = {"model": "m", "messages": [{"role": "user", "content": "meet a 400"}]}
    batch = http.post("/v1/job-batches", json={"requests": [request] * 200, "max_attempts": 1}).json()["id"]
    paused = wait_for(lambda: (found := get(http, batch))["state"] == "paused" and found, what="a pause")
    assert "all failed alike" in paused["reason"]
    with http.stream("GET", f"/v1/job-batches/{batch}/events") as response:
        assert next(events(response))[1]["held_back_by"] == [paused["reason"]]
    http.post(f"/v1/job-batches/{batch}/cancel")


def test_batches_are_listed_without_singles(http: httpx.Client) -> None:
    made: list[str] = []
    for _ in range(3):
        made.insert(0, submit(http, 1))
        http.post("/v1/jobs", json={"request": ask(), "lane": "interactive"})
    page = http.get("/v1/job-batches", params={"limit": 2}).json()
    assert [batch["id"] for batch in page["data"]] == made[:2]
    assert (page["has_more"], page["after"]) == (True, made[1])
    rest = http.get("/v1/job-batches", params={"limit": 2, "after": page["after"]}).json()
    assert ([batch["id"] for batch in rest["data"]], rest["has_more"], rest["after"]) == (made[2:], False, None)
    assert http.get("/v1/job-batches", params={"after": "x"}).status_code == 404
