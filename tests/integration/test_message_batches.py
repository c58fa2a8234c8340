"""Anthropic's message batches over HTTP: what is refused how, bounds, idempotency, tenants, bodies that are large or cut.

Nobody serves the bulk lane here: requests wait until the test itself plays the worker.
"""

from __future__ import annotations

import json
import secrets
import signal
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from jobs import keys
from jobs.requests import MESSAGES
from tests.integration.api_stand import (
    ANSWER,
    PROMPT,
    Api,
    ApiStand,
    answer,
    api_stand,
    ask_message,
    claim,
    core_standing,
    line,
)
from tests.integration.engine_stand import in_loop
from tests.waiting import wait_for

BATCHES = "/v1/messages/batches"
MOST_BYTES = 120_000_000
MOST_REQUESTS = 6_000
LONGEST = 200_000
DAY_S = 86_400
NOT_THERE = "there is no such batch"


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiStand]:
    with api_stand(tmp_path_factory.mktemp("api")) as stand:
        stand.api(
            message_batch_max_bytes=str(MOST_BYTES),
            message_batch_max_requests=str(MOST_REQUESTS),
            max_line_bytes=str(LONGEST),
            model="a-model-of-the-settings",
        )
        yield stand
        assert "Traceback" not in stand.apis[0].text
        stand.kept_secrets()


@pytest.fixture
def http(stand: ApiStand) -> httpx.Client:
    """A client of a new tenant."""
    return stand.http()


def item(custom_id: Any = "a", **params: Any) -> dict[str, Any]:
    """A request of a batch."""
    return {"custom_id": custom_id, "params": ask_message(**params)}


def create(http: httpx.Client, **headers: str) -> dict[str, Any]:
    """A new batch of the requests r0, r1, r2."""
    told = {"requests": [item(f"r{number}") for number in range(3)]}
    return made(http.post(BATCHES, json=told, headers=headers))


def made(response: httpx.Response) -> dict[str, Any]:
    """The batch of an answer."""
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def get(http: httpx.Client, batch: str) -> dict[str, Any]:
    """A look at a batch, whose counts always add up to 3."""
    found = made(http.get(f"{BATCHES}/{batch}"))
    assert sum(found["request_counts"].values()) == 3
    return found


def inside(batch: str) -> str:
    """Its id in the store."""
    return batch.removeprefix("msgbatch_")


def play(stand: ApiStand, batch: str, *indexes: int) -> None:
    """Answers these requests, in this order."""
    for job in claim(stand.valkey.url, *(f"{inside(batch)}-{index}" for index in indexes), lane="bulk"):
        answer(stand.valkey.url, job)


def refused(response: httpx.Response, status: int, kind: str) -> str:
    """Why: raises AssertionError unless this is an error of the protocol."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    told = response.json()
    assert told.keys() == {"type", "error", "request_id"}
    assert (told["type"], told["request_id"]) == ("error", response.headers["request-id"])
    assert told["error"]["type"] == kind
    message: str = told["error"]["message"]
    assert PROMPT not in message
    return message


def invalid(response: httpx.Response) -> str:
    """Why a request is not valid."""
    return refused(response, 400, "invalid_request_error")


def nothing_staged(stand: ApiStand) -> bool:
    """Whether no upload has left anything behind."""
    return not stand.redis.keys("mimoq:staged:*")


def batches(stand: ApiStand) -> int:
    """How many there are in the store."""
    return int(stand.redis.zcard(keys.BATCHES))


def head(token: str, *headers: str) -> bytes:
    """The head of a request that brings a batch."""
    told = "".join(f"{header}\r\n" for header in headers)
    return f"POST {BATCHES} HTTP/1.1\r\nHost: x\r\nX-Api-Key: {token}\r\n{told}\r\n".encode()


def connected(api: Api) -> socket.socket:
    """A connection to an API process."""
    url = httpx.URL(api.url)
    return socket.create_connection((url.host, url.port or 0), timeout=60.0)


# -- created


def test_what_is_stored_of_a_batch(stand: ApiStand, http: httpx.Client) -> None:
    body = ask_message(temperature=0.5)
    nameless = {name: value for name, value in body.items() if name != "model"}
    odd = b'{"messages" : [{"role":"user","content":"\\u00e9\\/ 1"}],\n"max_tokens":10, "x":[1.0,1e2] ,"model":"m"}'
    raw = b'\xef\xbb\xbf\n{ "\\u0072equests" : [{"params":%s,"custom_id":"a_-9Z"},\r\n{"custom_id":"b","params":%s}]}\n'
    batch = made(http.post(BATCHES, content=raw % (json.dumps(nameless).encode(), odd)))
    status = stand.store.status(inside(batch["id"]))
    assert (status.lane, status.protocol, status.total) == ("bulk", "anthropic", 2)
    assert status.deadline_at == pytest.approx(status.created_at + DAY_S, abs=0.01)
    found = stand.store.requests(status.batch_id, [0, 1], status.slice_size)
    assert [(found[n].custom_id, found[n].endpoint) for n in (0, 1)] == [("a_-9Z", MESSAGES), ("b", MESSAGES)]
    assert json.loads(found[0].body) == {**body, "model": "a-model-of-the-settings"}
    assert found[1].body == odd


def test_what_sdks_send_beside_it_makes_no_difference(http: httpx.Client) -> None:
    headers = {"anthropic-beta": "message-batches-2024-09-24", "anthropic-version": "2023-06-01"}
    batch = made(http.post(f"{BATCHES}?beta=true", json={"requests": [item()]}, headers=headers))
    for path in (f"{BATCHES}/{batch['id']}", f"{BATCHES}/{batch['id']}?beta=true"):
        assert made(http.get(path, headers=headers)) == batch
    assert made(http.get(f"{BATCHES}?beta=true&limit=1", headers=headers))["data"] == [batch]
    cancelled = http.post(f"{BATCHES}/{batch['id']}/cancel?beta=true", headers=headers)
    assert made(cancelled)["processing_status"] == "ended"
    assert http.get(f"{BATCHES}/{batch['id']}/results?beta=true", headers=headers).status_code == 200
    assert made(http.delete(f"{BATCHES}/{batch['id']}?beta=true", headers=headers))["id"] == batch["id"]


def without(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """The same without one member."""
    return {key: inner for key, inner in value.items() if key != name}


PARAMS = ask_message()
LONG_NAME = "p" * 100
BAD: list[tuple[Any, str]] = [
    # of requests, and what is said of the first of them
    ([{}], "requests.0.custom_id: is missing; and 1 more, as requests.0.params: is missing"),
    ([without("custom_id", item())], "requests.0.custom_id: is missing"),
    ([item(None)], "requests.0.custom_id: must be a string that matches ^[a-zA-Z0-9_-]{1,64}$"),
    ([item(7)], "requests.0.custom_id: must be"),
    ([item("")], "requests.0.custom_id: must be"),
    ([item("a" * 65)], "requests.0.custom_id: must be"),
    ([item("a.b")], "requests.0.custom_id: must be"),
    ([item("a\n")], "requests.0.custom_id: must be"),
    ([item("é")], "requests.0.custom_id: must be"),
    ([item("a"), item("b"), item("a")], "requests.2.custom_id: is that of an earlier request too"),
    ([without("params", item())], "requests.0.params: is missing"),
    ([{"custom_id": "a", "params": None}], "requests.0.params: must be an object"),
    ([{"custom_id": "a", "params": [PARAMS]}], "requests.0.params: must be an object"),
    ([item("a"), item("b", max_tokens=0)], "requests.1.params.max_tokens: 0 is under 1"),
    ([{"custom_id": "a", "params": without("max_tokens", PARAMS)}], "requests.0.params.max_tokens: is missing"),
    ([item(messages=[])], "requests.0.params.messages: is empty"),
    (
        [item(messages=[{"role": "user", "content": PROMPT}, {"role": "robot", "content": PROMPT}])],
        "requests.0.params.messages.1.role: must be one of user, assistant",
    ),
    ([item(system=[{"type": "text", "text": 1}])], "requests.0.params.system.0.text: must be a string"),
    ([item(stream=True)], "requests.0.params.stream: is not supported in a batch"),
    ([item(stream="yes")], "requests.0.params.stream: must be true or false"),
    ([{**item(), "priority": 1}], "requests.0.priority: stands beside custom_id and params"),
    ([{**item(), f"{PROMPT} {LONG_NAME}": 1}], "requests.0: stands beside custom_id and params"),
    ([None], "requests.0: is not a JSON object"),
    (["a"], "requests.0: is not a JSON object"),
    ([[item()]], "requests.0: is not a JSON object"),
]


@pytest.mark.parametrize(("requests", "why"), BAD, ids=range(len(BAD)))
def test_a_request_that_breaks_a_rule(http: httpx.Client, requests: list[Any], why: str) -> None:
    assert invalid(http.post(BATCHES, json={"requests": requests})).startswith(why)
    assert http.get(BATCHES).json()["data"] == []


DEEP = b'{"custom_id":"a","params":{"x":' + b"[" * 5_000 + b"]" * 5_000 + b"}}"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"[]", "the body is not a JSON object"),
        (b"null", "the body is not a JSON object"),
        (b'{"requests":[{}]} x', "the body is not a JSON object"),
        (b'{"requests":[{}', "the body is not JSON: it ends too early"),
        (b'{"requests":[{},]}', "the body is not a JSON object"),
        (b'{"requests":[],"requests":[]}', "the body names a member twice"),
        (b"{}", "requests: is missing"),
        (b'{"requests":[]}', "requests: is empty"),
        (b'{"requests":null}', "requests: must be an array"),
        (b'{"requests":{"a":1}}', "requests: must be an array"),
        (b'{"requests":[{"custom_id":}]}', "requests.0: is not JSON"),
        (b'{"requests":["\xff"]}', "requests.0: is not UTF-8"),
        (b'{"requests":[%s]}' % DEEP, "requests.0"),
        (b'{"requests":[{"custom_id":"\\ud800","params":{}}]}', "requests.0"),
        (b'{"requests":[%s],"model":"m"}' % json.dumps(item()).encode(), "model: is not known"),
        (b'{"%s":1,"requests":[%s]}' % (PROMPT.encode(), json.dumps(item()).encode()), "a member: is not known"),
    ],
)
def test_a_body_that_is_no_batch(http: httpx.Client, content: bytes, why: str) -> None:
    assert invalid(http.post(BATCHES, content=content)).startswith(why)
    assert http.get(BATCHES).json()["data"] == []


def test_of_many_that_are_bad_the_first_are_told_and_how_many(stand: ApiStand, http: httpx.Client) -> None:
    before = batches(stand)
    requests = [item(f"r{n}", metadata={"filler": secrets.token_hex(1_000)}) for n in range(3_000)]
    for place in range(2_000, 3_000):
        requests[place]["params"]["max_tokens"] = -place
    told = invalid(http.post(BATCHES, json={"requests": requests}))
    assert told == (
        "requests.2000.params.max_tokens: -2000 is under 1; and 999 more, as "
        + "; ".join(f"requests.{place}.params.max_tokens: -{place} is under 1" for place in range(2_001, 2_005))
    )
    assert batches(stand) == before
    assert nothing_staged(stand)


# -- bounds


def test_too_many_requests(http: httpx.Client) -> None:
    def sent(count: int) -> httpx.Response:
        return http.post(BATCHES, json={"requests": [item(f"r{n}") for n in range(count)]})

    batch = made(sent(MOST_REQUESTS))
    assert batch["request_counts"]["processing"] == MOST_REQUESTS
    made(http.post(f"{BATCHES}/{batch['id']}/cancel"))
    assert invalid(sent(MOST_REQUESTS + 1)) == f"requests: has over {MOST_REQUESTS:,} items"


def test_a_request_that_is_too_long(http: httpx.Client) -> None:
    requests = [item("a"), item("b", metadata={"filler": "x" * LONGEST}), item("c", max_tokens=0)]
    told = invalid(http.post(BATCHES, json={"requests": requests}))
    assert told.startswith(f"requests.1: is longer than {LONGEST:,} bytes; and 1 more, as requests.2.")


def test_a_body_that_is_too_long(stand: ApiStand, http: httpx.Client) -> None:
    with connected(stand.apis[0]) as connection:  # refused before any of it is sent
        connection.sendall(head(stand.token(), f"Content-Length: {MOST_BYTES + 1}"))
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")

    def endless() -> Iterator[bytes]:
        yield b'{"requests":['
        for number in range(MOST_BYTES // 10_000 + 100):
            yield json.dumps(item(f"r{number}", metadata={"filler": "x" * 10_000})).encode() + b","

    small = stand.api(message_batch_max_bytes="1000000")
    client = stand.http(api=small)
    assert "over 1,000,000 bytes" in refused(client.post(BATCHES, content=endless()), 413, "request_too_large")
    beside = b'{"requests":[],"x":"%s"}' % (b"x" * 100_000)
    refused(http.post(BATCHES, content=beside), 413, "request_too_large")
    refused(http.post(BATCHES, content=b"x", headers={"Content-Encoding": "gzip"}), 415, "invalid_request_error")
    assert nothing_staged(stand)


def test_a_large_body_needs_no_memory(stand: ApiStand, http: httpx.Client) -> None:
    process = psutil.Process(stand.apis[0].process.pid)
    filler = "y" * 20_000
    count = 100_000_000 // (len(filler) + 200)
    create(http)
    before = process.memory_info().rss
    most = 0

    def sent() -> Iterator[bytes]:
        nonlocal most
        yield b'{"requests":['
        for number in range(count):
            request = item(f"r{number}", metadata={"filler": filler})
            yield (b"," if number else b"") + json.dumps(request).encode()
            if number % 100 == 0:
                most = max(most, process.memory_info().rss)
        yield b"]}"

    batch = made(http.post(BATCHES, content=sent()))
    assert batch["request_counts"]["processing"] == count
    assert most - before < 50_000_000
    made(http.post(f"{BATCHES}/{batch['id']}/cancel"))


def pieces(size: int) -> Iterator[bytes]:
    """The beginning of a body: texts of chance, which stay long when compressed, so that blocks of it are stored early."""
    yield b'{"requests":['
    for number in range(size // 10_000):
        request = item(f"r{number}", metadata={"filler": secrets.token_hex(5_000)})
        yield (b"," if number else b"") + json.dumps(request).encode()


def test_a_body_that_is_cut_leaves_nothing(stand: ApiStand, http: httpx.Client) -> None:
    before = batches(stand)
    token = stand.token()
    begun = b"".join(pieces(8_000_000))
    for framing in (f"Content-Length: {len(begun) * 2}", "Transfer-Encoding: chunked"):
        with connected(stand.apis[0]) as connection:
            connection.sendall(head(token, framing))
            if "chunked" in framing:
                connection.sendall(b"%x\r\n" % len(begun))
            connection.sendall(begun)
            wait_for(lambda: not nothing_staged(stand), what="blocks in the store")
        wait_for(lambda: nothing_staged(stand), what="what was staged to go")
    assert batches(stand) == before
    assert stand.http(token).get(BATCHES).json()["data"] == []


def test_an_api_that_is_killed_in_the_middle_leaves_no_batch(stand: ApiStand) -> None:
    before = batches(stand)
    token = stand.token()
    api = stand.api()
    begun = b"".join(pieces(8_000_000))
    with connected(api) as connection:
        connection.sendall(head(token, f"Content-Length: {len(begun) * 2}") + begun)
        wait_for(lambda: not nothing_staged(stand), what="blocks in the store")
        assert api.end(signal.SIGKILL) == -signal.SIGKILL
    assert batches(stand) == before
    assert stand.http(token).get(BATCHES).json()["data"] == []
    left = stand.redis.keys("mimoq:staged:*")
    assert all(stand.redis.ttl(name) > 0 for name in left)  # nobody else will take it away
    stand.redis.unlink(*left)


# -- idempotency


def test_a_key_gives_the_batch_it_gave_before(stand: ApiStand, http: httpx.Client) -> None:
    items = [item(f"r{n}") for n in range(3)]

    def sent(requests: list[Any], key: str = "k", client: httpx.Client = http) -> httpx.Response:
        return client.post(BATCHES, json={"requests": requests}, headers={"Idempotency-Key": key})

    first = made(sent(items))
    assert made(sent(items)) == first
    for other in (
        items[:2],
        [*items, item("r9")],
        [item("r0"), *items[1:]],
        [*items[:2], {**items[2], "custom_id": "x"}],
    ):
        response = sent(other)
        assert "Idempotency-Key" in refused(response, 409, "invalid_request_error")
        assert response.headers["x-should-retry"] == "false"
    assert "max_tokens" in invalid(sent([item(max_tokens=0)]))
    assert made(sent(items, client=stand.http()))["id"] != first["id"]
    assert made(sent(items, key="l"))["id"] != first["id"]
    for key in ("", "k" * 256):
        assert "Idempotency-Key" in invalid(sent(items, key))
    assert len(made(http.get(BATCHES))["data"]) == 2
    made(http.post(f"{BATCHES}/{first['id']}/cancel"))
    made(http.delete(f"{BATCHES}/{first['id']}"))
    assert made(sent(items))["id"] != first["id"]


def test_a_native_key_is_another(stand: ApiStand, http: httpx.Client) -> None:
    key = {"Idempotency-Key": "k"}
    native = http.post("/v1/job-batches", json={"requests": [line()]}, headers=key)
    batch = create(http, **key)
    single = http.post("/v1/jobs", json={"request": ask_message(), "endpoint": MESSAGES}, headers=key)
    assert (native.status_code, single.status_code) == (202, 409)  # native ones share theirs
    assert inside(batch["id"]) != native.json()["id"]


# -- whose it is


def test_what_is_not_there_or_not_theirs(stand: ApiStand, http: httpx.Client) -> None:
    batch = create(http)["id"]
    native = http.post("/v1/job-batches", json={"requests": [line()]}).json()["id"]
    single = http.post("/v1/jobs", json={"request": ask_message(), "endpoint": MESSAGES}).json()["batch_id"]
    ids = [f"msgbatch_{native}", f"msgbatch_{single}", f"msgbatch_{'0' * 24}", native, inside(batch), "msgbatch_", "x"]
    ids += [batch.upper(), f"{batch}0", f"{batch}-0", "%00", "a" * 5_000, "msgbatch_" + "é" * 24]
    for client, found in [(stand.http(), batch), *((http, name) for name in ids)]:
        for method, path in (("GET", ""), ("POST", "/cancel"), ("DELETE", ""), ("GET", "/results")):
            answered = client.request(method, f"{BATCHES}/{found}{path}")
            assert refused(answered, 404, "not_found_error") == NOT_THERE, (method, path, found)
    assert get(http, batch)["processing_status"] == "in_progress"
    assert made(stand.http().get(BATCHES))["data"] == []
    assert [found["id"] for found in made(http.get(BATCHES))["data"]] == [batch]


def test_scopes(stand: ApiStand, http: httpx.Client) -> None:
    reader, writer = stand.http(stand.token(["read"])), stand.http(stand.token(["submit"]))
    batch = create(writer)["id"]
    for client, method, path in (
        (reader, "POST", ""),
        (reader, "POST", f"/{batch}/cancel"),
        (reader, "DELETE", f"/{batch}"),
        (writer, "GET", ""),
        (writer, "GET", f"/{batch}"),
        (writer, "GET", f"/{batch}/results"),
    ):
        refused(client.request(method, BATCHES + path), 403, "permission_error")
    assert made(reader.get(BATCHES))["data"] == []


# -- its states


def test_counts_stay_until_the_batch_has_ended(stand: ApiStand, http: httpx.Client) -> None:
    batch = create(http)["id"]
    play(stand, batch, 2, 0)
    found = get(http, batch)
    assert (found["processing_status"], found["request_counts"]["processing"]) == ("in_progress", 3)
    assert found["ended_at"] is found["results_url"] is found["cancel_initiated_at"] is None
    assert "not ended" in invalid(http.get(f"{BATCHES}/{batch}/results"))
    assert "not ended" in invalid(http.delete(f"{BATCHES}/{batch}"))
    play(stand, batch, 1)
    found = get(http, batch)
    assert (found["processing_status"], found["request_counts"]["succeeded"]) == ("ended", 3)
    assert found["results_url"] == f"{stand.apis[0].url}{BATCHES}/{batch}/results"
    assert found["cancel_initiated_at"] is None
    results = http.get(f"{BATCHES}/{batch}/results")
    assert (results.status_code, results.headers["content-type"]) == (200, "application/x-jsonl")
    assert results.content.count(b"\n") == len(results.text.splitlines()) == 3
    assert b"\r" not in results.content
    told = [json.loads(text) for text in results.text.splitlines()]
    assert [row["custom_id"] for row in told] == ["r2", "r0", "r1"]
    assert all(row["result"] == {"type": "succeeded", "message": json.loads(ANSWER)} for row in told)


def test_cancelled_while_a_request_is_being_called(stand: ApiStand, http: httpx.Client) -> None:
    batch = create(http)["id"]
    play(stand, batch, 0)
    jobs = claim(stand.valkey.url, f"{inside(batch)}-1", f"{inside(batch)}-2", lane="bulk")
    cancelled = made(http.post(f"{BATCHES}/{batch}/cancel"))
    assert (cancelled["processing_status"], cancelled["request_counts"]["processing"]) == ("canceling", 3)
    assert cancelled["created_at"] <= cancelled["cancel_initiated_at"] < cancelled["expires_at"]
    assert made(http.post(f"{BATCHES}/{batch}/cancel")) == get(http, batch) == cancelled
    answer(stand.valkey.url, *jobs)  # an answer that has come is kept
    found = get(http, batch)
    assert (found["processing_status"], found["request_counts"]["succeeded"]) == ("ended", 3)
    assert found["cancel_initiated_at"] == cancelled["cancel_initiated_at"] <= found["ended_at"]
    assert "has ended" in invalid(http.post(f"{BATCHES}/{batch}/cancel"))


def test_cancelled_and_deleted_with_its_results(stand: ApiStand, http: httpx.Client) -> None:
    batch = create(http)["id"]
    cancelled = made(http.post(f"{BATCHES}/{batch}/cancel"))  # nothing is being called, so it is over at once
    counts = {"processing": 0, "succeeded": 0, "errored": 0, "canceled": 3, "expired": 0}
    assert (cancelled["processing_status"], cancelled["request_counts"]) == ("ended", counts)
    assert cancelled["cancel_initiated_at"] <= cancelled["ended_at"]
    rows = [json.loads(text) for text in http.get(f"{BATCHES}/{batch}/results").text.splitlines()]
    assert rows == [{"custom_id": f"r{number}", "result": {"type": "canceled"}} for number in range(3)]
    assert stand.redis.exists(keys.result(f"{inside(batch)}-1"))
    assert made(http.delete(f"{BATCHES}/{batch}")) == {"id": batch, "type": "message_batch_deleted"}
    assert stand.redis.keys(f"*{inside(batch)}*") == []
    assert refused(http.delete(f"{BATCHES}/{batch}"), 404, "not_found_error") == NOT_THERE


@in_loop
async def test_where_results_are_said_to_be(store_url: str) -> None:
    for api_url, host, said in (
        (None, "127.0.0.1:8000", "http://127.0.0.1:8000"),
        (None, "[::1]:8000", "http://[::1]:8000"),
        ("https://batches.example/mimoq/", "127.0.0.1", "https://batches.example/mimoq"),
    ):
        async with core_standing(store_url, api_url=api_url) as (_, client):
            headers = {"Host": host}
            batch = made(await client.post(BATCHES, json={"requests": [item()]}, headers=headers))
            over = made(await client.post(f"{BATCHES}/{batch['id']}/cancel", headers=headers))
            assert over["results_url"] == f"{said}{BATCHES}/{batch['id']}/results"
            assert made(await client.get(BATCHES, headers=headers))["data"][0] == over


def test_a_host_that_no_address_can_hold_is_left_out(stand: ApiStand, http: httpx.Client) -> None:
    batch = create(http)["id"]
    made(http.post(f"{BATCHES}/{batch}/cancel"))
    for host in ("a{b}c", "x/../y", "", "a b", "a:b"):
        found = made(http.get(f"{BATCHES}/{batch}", headers={"Host": host}))
        assert found["results_url"] == f"{BATCHES}/{batch}/results"


# -- lists


def test_a_page_that_can_not_be(stand: ApiStand, http: httpx.Client) -> None:
    batch, other = create(http)["id"], create(stand.http())["id"]
    native = http.post("/v1/job-batches", json={"requests": [line()]}).json()["id"]
    for query in ("limit=0", "limit=1001", "limit=-1", "limit=x", "limit=1.5", f"after_id={'x' * 201}"):
        assert query.partition("=")[0] in invalid(http.get(f"{BATCHES}?{query}")), query
    for cursor in (other, native, f"msgbatch_{native}", inside(batch), f"msgbatch_{'0' * 24}", "x", "é"):
        for name in ("after_id", "before_id"):
            told = invalid(http.get(BATCHES, params={name: cursor}))
            assert told == f"{name}: is no message batch of yours", cursor
    assert "not both" in invalid(http.get(BATCHES, params={"after_id": batch, "before_id": batch}))
    for query in ("limit=1", "limit=1000"):
        assert [found["id"] for found in made(http.get(f"{BATCHES}?{query}"))["data"]] == [batch]
    for name in ("after_id", "before_id"):
        assert made(http.get(BATCHES, params={name: batch})) == {
            "data": [],
            "has_more": False,
            "first_id": None,
            "last_id": None,
        }


def test_behind_what_was_deleted(http: httpx.Client) -> None:
    found = [create(http)["id"] for _ in range(5)][::-1]
    for batch in found[1:3]:
        made(http.post(f"{BATCHES}/{batch}/cancel"))
        made(http.delete(f"{BATCHES}/{batch}"))

    def page(**params: Any) -> tuple[list[str], bool]:
        told = made(http.get(BATCHES, params=params))
        return [batch["id"] for batch in told["data"]], told["has_more"]

    assert page() == ([found[0], *found[3:]], False)
    assert page(after_id=found[2], limit=1) == ([found[3]], True)
    assert page(after_id=found[1]) == (found[3:], False)
    assert page(before_id=found[2]) == ([found[0]], False)
    assert page(before_id=found[4], limit=1) == ([found[3]], True)
