"""OpenAI's batches over HTTP: what is taken and refused, how lines are judged, what is seen while they run and afterwards.

A worker serves the bulk lane; what is submitted for the interactive one waits until the test itself plays the worker.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from jobs import files, keys
from jobs.requests import MESSAGES
from ops.simulator import digest
from tests.integration.api_stand import PROMPT, ApiStand, answer, api_stand, ask, ask_message, claim, line, lines
from tests.integration.openai_stand import Played, content, create, ended, get, input_of, seen, submit, upload
from tests.integration.store_model import redis_time
from tests.waiting import wait_for

CHAT = "/v1/chat/completions"
MOST_REQUESTS, MOST_LINE, MOST_BYTES = 4_000, 20_000, 3_000_000
HEX = "0123456789abcdef01234567"


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiStand]:
    folder = tmp_path_factory.mktemp("api")
    with api_stand(folder, triggers={"meet a 400": "400"}, answer_bytes=300) as stand:
        stand.api(
            files_dir=str(folder / "files"),
            batch_max_requests=str(MOST_REQUESTS),
            batch_max_bytes=str(MOST_BYTES),
            max_line_bytes=str(MOST_LINE),
            webhook_allow_http="true",
            webhook_allow_private="true",
        )
        stand.work("bulk", max_attempts="1")
        yield stand
        stand.kept_secrets()


@pytest.fixture
def http(stand: ApiStand) -> httpx.Client:
    """A client of a new tenant."""
    return stand.http()


def refused(
    response: httpx.Response, param: str | None = None, code: str | None = None, status: int = 400
) -> dict[str, Any]:
    """The error, which is one of OpenAI's and names this parameter."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["param"] == param or str(error["param"]).startswith(f"{param}."), error
    assert code in (None, error["code"]), error
    assert PROMPT not in response.text
    return error


def errors(http: httpx.Client, batch: str) -> list[tuple[int | None, str, str | None]]:
    """Line, code and param of the errors of a batch that failed for them."""
    failed = seen(http, batch, "failed", "in_progress", "completed")
    assert failed["status"] == "failed"
    assert (failed["output_file_id"], failed["error_file_id"], failed["request_counts"]["total"]) == (None, None, 0)
    assert failed["failed_at"] >= failed["created_at"]
    assert PROMPT not in json.dumps(failed)
    assert failed["errors"]["object"] == "list"
    return [(error["line"], error["code"], error["param"]) for error in failed["errors"]["data"]]


def events(stand: ApiStand, batch: str) -> list[str]:
    """Types of the events of a batch, in order."""
    name = batch.removeprefix("batch_")
    count = int(stand.redis.hget(keys.openai(name), "events") or 0)
    found: list[Any] = [stand.redis.hget(keys.event(f"evt_{name}_{number}"), "type") for number in range(1, count + 1)]
    return [kind.decode() for kind in found]


# -- lines


def test_a_long_input_with_errors_on_known_lines(stand: ApiStand, http: httpx.Client) -> None:
    good = line("x")
    bad: dict[int, tuple[Any, str, str | None]] = {
        1: ({**good, "custom_id": "b1", "method": "GET"}, "invalid_method", "method"),
        17: ({**good, "custom_id": ""}, "invalid_custom_id", "custom_id"),
        18: ({**good, "custom_id": 7}, "invalid_custom_id", "custom_id"),
        19: ({"method": "POST", "url": CHAT, "body": ask()}, "missing_required_parameter", "custom_id"),
        500: ({**good, "custom_id": "b500", "url": MESSAGES}, "invalid_url", "url"),
        501: ({"custom_id": "b501", "method": "POST", "url": CHAT}, "missing_required_parameter", "body"),
        502: ({**good, "custom_id": "b502", "body": [1]}, "invalid_request", "body"),
        1_000: (line("b1000", stream=True), "streaming_unsupported", "body.stream"),
        1_001: (line("b1001", temperature=99), "invalid_request", "body.temperature"),
        1_002: ({**good, "custom_id": "b1002", "body": {"model": "m"}}, "missing_required_parameter", "body.messages"),
        1_003: (line("b1003", model="another"), "mismatched_model", "body.model"),
        2_000: ({**good, "custom_id": "b2000", "colour": "red"}, "invalid_request", "colour"),
        2_001: (line("n999"), "duplicate_custom_id", "custom_id"),
        3_500: (line("b3500", user="u" * MOST_LINE), "line_too_long", None),
    }
    raw: dict[int, tuple[bytes, str, str | None]] = {
        600: (b"not json\n", "invalid_json_line", None),
        601: (b"[]\n", "invalid_json_line", None),
        602: (b'{"custom_id": "\xff"}\n', "invalid_custom_id", "custom_id"),
    }
    expected = {number: told[1:] for number, told in [*bad.items(), *raw.items()]}
    text = []
    for number in range(1, 3_601):
        if number in raw:
            text.append(raw[number][0])
        else:
            text.append(lines(bad[number][0] if number in bad else line(f"n{number}")))
        if number in (700, 701):  # blank lines are none, and have numbers
            text[-1] = b"\r\n"
    sent = b"".join(text)
    batch = create(http, input_file_id=upload(http, sent).json()["id"]).json()["id"]
    assert errors(http, batch) == [(number, *expected[number]) for number in sorted(expected)]
    assert not stand.redis.exists(keys.batch(batch[6:]))
    assert not stand.redis.keys("mimoq:staged:*")
    # What was wrong is mended, and nothing else was.
    mended = b"".join(part for number, part in enumerate(text, 1) if number not in expected)
    good_one = create(http, input_file_id=upload(http, mended).json()["id"], lane="interactive").json()["id"]
    found = seen(http, good_one, "in_progress", "failed")
    assert (found["status"], found["request_counts"]["total"]) == ("in_progress", 3_600 - len(expected) - 2)
    assert http.post(f"/v1/batches/{good_one}/cancel").status_code == 200


def test_bounds_of_an_input(http: httpx.Client) -> None:
    small = lines(*({**line(f"c{n}"), "body": {"messages": [{"role": "user", "content": "x"}]}} for n in range(4_001)))
    file = upload(http, small).json()["id"]
    assert errors(http, create(http, input_file_id=file).json()["id"]) == [(None, "too_many_requests", None)]
    one_less = upload(http, small[: small.rindex(b'{"custom_id": "c4000"')]).json()["id"]
    batch = create(http, input_file_id=one_less, lane="interactive").json()["id"]
    assert seen(http, batch, "in_progress", "failed")["request_counts"]["total"] == MOST_REQUESTS
    http.post(f"/v1/batches/{batch}/cancel")
    for nothing in (b"\n", b" \n\r\n", b"\xef\xbb\xbf\n"):
        file = upload(http, nothing).json()["id"]
        assert errors(http, create(http, input_file_id=file).json()["id"]) == [(None, "empty_file", None)]


def test_bodies_reach_the_upstream_as_they_were_written(stand: ApiStand, http: httpx.Client) -> None:
    content = f'"{PROMPT} as written \\u00e9 é\\u2028"'
    text = f'{{"model":"m",  "messages":[{{"role":"user","content":{content}}}], "top_p":1.0,"x":1e2}}'
    sent = f'{{"url":"{CHAT}","custom_id":"a","method":"POST","body":{text}}}\r\n'
    file = upload(http, sent.encode()).json()["id"]
    body = text.replace("as written", "in")
    inline = f'{{"requests":[{{"custom_id":"a",\n"body":{body}}}],"endpoint":"{CHAT}","lane":"interactive"}}'
    one = create(http, input_file_id=file, lane="interactive").json()["id"]
    two = http.post("/v1/batches", content=inline.encode()).json()["id"]
    for batch, name in ((one, "as written"), (two, "in")):
        assert seen(http, batch, "in_progress", "failed")["status"] == "in_progress"
        (job,) = claim(stand.valkey.url, f"{batch[6:]}-0")
        assert job.request.body == text.replace("as written", name).encode()
        answer(stand.valkey.url, job)
        assert ended(http, batch)["request_counts"]["completed"] == 1
    read = http.get(f"/v1/files/{get(http, two)['input_file_id']}/content").content
    assert json.loads(read)["body"]["x"] == 100
    assert b'"x":1e2' in read
    assert read.count(b"\n") == 1


# -- created


def test_what_a_new_batch_is_asked(http: httpx.Client) -> None:
    file = input_of(http, line())
    notes = upload(http, b"x", "n.txt", purpose="user_data").json()["id"]
    inline = {"requests": [{"custom_id": "a", "body": ask()}]}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"input_file_id": None}, "input_file_id"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"input_file_id": notes}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"endpoint": "/v1/chat/completions/"}, "endpoint"),
        ({"endpoint": None}, "endpoint"),
        ({"completion_window": None}, "completion_window"),
        *(
            ({"completion_window": window}, "completion_window")
            for window in ("", "24", "h", "0h", "-1h", "1.5h", "367d", "24H", " 24h", "1w", "9" * 30 + "s", 24, "٢h")
        ),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"metadata": {"": "v"}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": []}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at"}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "now", "seconds": 4_000}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3_599}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 2_592_001}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": "4000"}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 4_000, "x": 1}}, "output_expires_after"),
        ({"output_expires_after": 4_000}, "output_expires_after"),
        ({"callback_url": "ftp://127.0.0.1/"}, "callback_url"),
        ({"callback_url": "http://user:hunter2@127.0.0.1/"}, "callback_url"),
        ({"callback_url": "http://127.0.0.1/" + "x" * 2_048}, "callback_url"),
        ({"callback_url": 1}, "callback_url"),
        ({"lane": "fast"}, "lane"),
        ({"model": "m"}, "model"),
        ({"colour": "red"}, "colour"),
        (inline, "input_file_id"),
        ({"requests": []}, "requests"),
        ({"requests": {}}, "requests"),
        ({"requests": None}, "requests"),
        ({"input_file_id": None, "requests": []}, "requests"),
        ({"input_file_id": None, "requests": "x"}, "requests"),
        ({"input_file_id": None, **inline, "model": ""}, "model"),
        ({"input_file_id": None, **inline, "model": "m" * 257}, "model"),
        ({"input_file_id": None, **inline, "completion_window": "soon"}, "completion_window"),
        ({"input_file_id": None, "requests": [1, {"custom_id": "a", "body": "x" * MOST_LINE}]}, "requests.1"),
        ({"input_file_id": None, "requests": [1] * (MOST_REQUESTS + 1)}, "requests"),
    ]
    for change, param in changes:
        told = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h", **change}
        body = {name: value for name, value in told.items() if value is not None or name == "requests"}
        error = refused(http.post("/v1/batches", json=body), param)
        assert "hunter2" not in error["message"]
    unknown = create(http, input_file_id=f"file-{HEX}")
    assert unknown.status_code in (400, 404)
    refused(unknown, "input_file_id", status=unknown.status_code)
    for name in ("x", "", f"file-{HEX}-output", "../../etc/passwd"):
        response = create(http, input_file_id=name)
        assert response.status_code in (400, 404)
        assert response.json()["error"]["param"] == "input_file_id"
    assert http.get("/v1/batches").json()["data"] == []
    # Of what came inline and was refused nothing is kept.
    assert {found["id"] for found in http.get("/v1/files").json()["data"]} == {file, notes}


def test_bodies_that_are_no_json(http: httpx.Client) -> None:
    for body in (
        b"",
        b"x",
        b"[]",
        b'"text"',
        b"null",
        b"{",
        b'{"a":1,}',
        b'{"a":1}x',
        b'{"endpoint":"\xff"}',
        b'{"endpoint":"a","endpoint":"b"}',
        b'{"requests":[{}],"requests":[{}]}',
        b'{"requests":[{}',
        b"[" * 100_000,
        b'{"metadata":' + b"[" * 100_000,
    ):
        error = http.post("/v1/batches", content=body)
        assert error.status_code == 400, body[:50]
        assert set(error.json()["error"]) >= {"message", "type", "param", "code"}
    large = http.post("/v1/batches", content=b'{"metadata":"' + b"x" * 1_100_000 + b'"}')
    refused(large, status=413)
    refused(http.post("/v1/batches", content=b" " * (MOST_BYTES + 2_000_000)), status=413)
    refused(http.post("/v1/batches", content=b"{}", headers={"content-encoding": "gzip"}), status=415)


def test_inline_in_any_order_and_judged_as_lines_are(http: httpx.Client) -> None:
    items = [{"custom_id": f"i{n}", "body": ask()} for n in range(3)]
    full = {**line("i3"), "body": ask_message()}
    for body in (
        {"endpoint": CHAT, "requests": items},
        {"requests": items, "endpoint": CHAT, "completion_window": "1h", "metadata": {"a": "b"}},
        {"completion_window": "2h", "requests": [*items, {**full, "body": ask()}], "endpoint": CHAT},
    ):
        made = http.post("/v1/batches", json={**body, "lane": "bulk"})
        assert made.status_code == 202, made.text
        assert ended(http, made.json()["id"])["request_counts"]["total"] == len(body["requests"])
    bad = [items[0], {"custom_id": "i0", "body": ask()}, {"body": ask()}, {**items[1], "url": MESSAGES}, 7]
    batch = http.post("/v1/batches", json={"endpoint": CHAT, "requests": bad}).json()["id"]
    assert errors(http, batch) == [
        (2, "duplicate_custom_id", "custom_id"),
        (3, "missing_required_parameter", "custom_id"),
        (4, "invalid_url", "url"),
        (5, "invalid_json_line", None),
    ]


def test_a_key_gives_the_batch_it_gave_before(stand: ApiStand, http: httpx.Client) -> None:
    file = input_of(http, line())
    first = create(http, "k", input_file_id=file, lane="interactive", metadata={"a": "1", "b": "2"})
    assert first.status_code == 200
    batch = first.json()["id"]
    again = create(http, "k", lane="interactive", metadata={"b": "2", "a": "1"}, input_file_id=file)
    assert (again.status_code, again.json()["id"]) == (200, batch)
    for other in ({"metadata": {"a": "2"}}, {"completion_window": "23h"}, {"lane": "bulk"}):
        told: dict[str, Any] = {"lane": "interactive", "metadata": {"a": "1", "b": "2"}, "input_file_id": file}
        told.update(other)
        error = create(http, "k", **told)
        refused(error, code="idempotency_conflict", status=409)
        assert error.headers["x-should-retry"] == "false"
    for bad in ("", "k" * 256):
        refused(create(http, bad, input_file_id=file), code="idempotency_key")
    # Natively the same key stands for something else, and for others too.
    native = http.post("/v1/job-batches", json={"requests": [line()]}, headers={"Idempotency-Key": "k"})
    assert native.status_code == 202
    assert native.json()["id"] != batch.removeprefix("batch_")
    assert create(stand.http(), "k", input_file_id="file-x").status_code in (400, 404)
    seen(http, batch, "in_progress")
    Played(stand.valkey.url, batch).end("s", 0)
    ended(http, batch)
    # An answer that was lost is asked for once more, long after: its input may be gone by then.
    assert http.delete(f"/v1/files/{file}").status_code == 200
    late = create(http, "k", input_file_id=file, lane="interactive", metadata={"a": "1", "b": "2"})
    assert (late.status_code, late.json().get("id")) == (200, batch)


def test_a_key_of_requests_inline_leaves_one_file(http: httpx.Client) -> None:
    body: dict[str, Any] = {"endpoint": CHAT, "requests": [{"custom_id": "a", "body": ask()}], "lane": "interactive"}

    def post(told: dict[str, Any]) -> httpx.Response:
        return http.post("/v1/batches", json=told, headers={"Idempotency-Key": "i"})

    first = post(body)
    assert first.status_code == 202
    assert post(dict(reversed(body.items()))).json()["id"] == first.json()["id"]
    refused(post({**body, "requests": [{"custom_id": "b", "body": ask()}]}), status=409)
    refused(post({**body, "requests": body["requests"] * 2}), status=409)
    refused(http.post("/v1/batches", json=body, headers={"Idempotency-Key": "k" * 256}), code="idempotency_key")
    (file,) = http.get("/v1/files").json()["data"]
    assert file["id"] == first.json()["input_file_id"]


def test_a_key_of_a_batch_that_failed(http: httpx.Client) -> None:
    file = upload(http, b"x\n").json()["id"]
    batch = create(http, "k", input_file_id=file).json()["id"]
    assert errors(http, batch) == [(1, "invalid_json_line", None)]
    again = create(http, "k", input_file_id=file)
    assert (again.status_code, again.json()["id"], again.json()["status"]) == (200, batch, "failed")


# -- looked at


def test_pages(http: httpx.Client) -> None:
    made = [submit(http, line(), lane="interactive") for _ in range(5)]

    def page(**params: Any) -> tuple[list[str], bool]:
        found = http.get("/v1/batches", params=params).json()
        return [batch["id"] for batch in found["data"]], found["has_more"]

    newest = made[::-1]
    assert page() == (newest, False)
    assert page(limit=2) == (newest[:2], True)
    assert page(limit=2, after=newest[1]) == (newest[2:4], True)
    assert page(limit=2, after=newest[3]) == (newest[4:], False)
    assert page(after=newest[4]) == ([], False)
    for params, param in (
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"after": "x"}, "after"),
        ({"after": f"batch_{HEX}"}, "after"),
        ({"after": newest[0].removeprefix("batch_")}, "after"),
        ({"after": "x" * 201}, "after"),
    ):
        refused(http.get("/v1/batches", params=params), param)
    for batch in made:
        http.post(f"/v1/batches/{batch}/cancel")


def test_another_tenants_batch_is_as_one_that_is_not_there(stand: ApiStand, http: httpx.Client) -> None:
    batch = submit(http, line(), lane="interactive")
    seen(http, batch, "in_progress")
    native = http.post("/v1/job-batches", json={"requests": [line()]}).json()["id"]
    other = stand.http()
    foreign = [
        (other, name) for name in (batch, f"batch_{HEX}", "batch_x", "x", "batch_" + "f" * 3_000, "é", batch[6:])
    ]
    own = [(http, name) for name in (batch[6:], f"batch_{native}", f"msgbatch_{batch[6:]}", batch.upper(), batch + "0")]
    for method, tail in (("GET", ""), *(("POST", f"/{what}") for what in ("cancel", "pause", "resume", "retry"))):
        answers = {client.request(method, f"/v1/batches/{name}{tail}").content for client, name in foreign + own}
        assert len(answers) == 1
        assert json.loads(answers.pop())["error"]["code"] == "not_found"
    assert other.get("/v1/batches").json()["data"] == []
    unknown = other.get("/v1/batches", params={"after": f"batch_{HEX}"})
    assert other.get("/v1/batches", params={"after": batch}).content == unknown.content
    assert get(http, batch)["status"] == "in_progress"
    http.post(f"/v1/batches/{batch}/cancel")


def test_scopes(stand: ApiStand, http: httpx.Client) -> None:
    batch = submit(http, line(), lane="interactive")
    reads, submits = stand.http(stand.token(["read"])), stand.http(stand.token(["submit"]))
    refused(create(reads, input_file_id=f"file-{HEX}"), status=403)
    for what in ("cancel", "pause", "resume", "retry"):
        refused(reads.post(f"/v1/batches/{batch}/{what}"), status=403)
    refused(submits.get("/v1/batches"), status=403)
    refused(submits.get(f"/v1/batches/{batch}"), status=403)
    http.post(f"/v1/batches/{batch}/cancel")


# -- while it runs, and after


def test_lines_that_were_given_once_keep_their_numbers(stand: ApiStand, http: httpx.Client) -> None:
    batch = submit(http, *(line(f"n{n}") for n in range(6)), lane="interactive", callback_url="http://127.0.0.1:9/")
    seen(http, batch, "in_progress")
    played = Played(stand.valkey.url, batch)
    output = files.id_of(batch[6:], "output")

    def read(offset: int, **more: int) -> tuple[list[str], str, str]:
        response = http.get(f"/v1/files/{output}/content", params={"offset": offset, **more})
        assert response.status_code == 200
        names = [json.loads(text)["custom_id"] for text in response.text.splitlines()]
        return names, response.headers["x-incomplete"], response.headers["x-last-line"]

    assert get(http, batch)["output_file_id"] is None
    assert read(0) == ([], "true", "0")
    played.end("s", 3)
    assert get(http, batch)["output_file_id"] == output
    assert read(0) == (["n3"], "true", "1")
    played.end("f", 5)
    played.end("s", 0)
    assert read(1) == (["n0"], "true", "2")
    assert read(0, limit=1) == (["n3"], "true", "1")
    assert read(9) == ([], "true", "2")
    found = get(http, batch)
    assert found["request_counts"] == {"total": 6, "completed": 2, "failed": 1}
    assert found["error_file_id"] is None
    assert [row["custom_id"] for row in content(http, files.id_of(batch[6:], "error"))] == ["n5"]
    assert http.get(f"/v1/files/{output}").json()["bytes"] == len(http.get(f"/v1/files/{output}/content").content)
    assert output not in {file["id"] for file in http.get("/v1/files").json()["data"]}
    refused(http.delete(f"/v1/files/{output}"), "id", "file_in_use")
    # One that failed is called again while the others still run.
    assert http.post(f"/v1/batches/{batch}/retry").json()["request_counts"]["failed"] == 0
    played.end("s", 1, 5, 2, 4)
    assert read(2)[0] == ["n1", "n5", "n2", "n4"]
    found = ended(http, batch)
    assert read(0) == (["n3", "n0", "n1", "n5", "n2", "n4"], "false", "6")
    assert read(6) == ([], "false", "6")
    assert read(2, limit=2) == (["n1", "n5"], "true", "4")
    assert found["error_file_id"] is None
    assert http.get(f"/v1/files/{output}").json()["bytes"] == len(http.get(f"/v1/files/{output}/content").content)
    assert events(stand, batch) == ["batch.completed"]


def test_a_retry_of_a_completed_one_calls_what_failed_alone(stand: ApiStand, http: httpx.Client) -> None:
    good = [line(f"g{n}") for n in range(70)]
    bad = [line(f"b{n}") for n in range(5)]
    for item in bad:
        item["body"]["messages"][0]["content"] += " meet a 400"
    batch = submit(http, *good, *bad, callback_url="http://127.0.0.1:9/", completion_window="1h")
    first = ended(http, batch)
    assert first["request_counts"] == {"total": 75, "completed": 70, "failed": 5}
    before = http.get(f"/v1/files/{first['output_file_id']}/content").text.splitlines()
    stand.simulator.configure(triggers={})
    try:
        again = http.post(f"/v1/batches/{batch}/retry").json()
        assert again["status"] in ("in_progress", "finalizing", "completed")
        assert again["request_counts"]["completed"] >= 70
        assert again["expires_at"] == pytest.approx(redis_time(stand.redis) + 3_600, abs=5)
        wait_for(lambda: len(events(stand, batch)) == 2, what="a second end")
    finally:
        stand.simulator.configure(triggers={"meet a 400": "400"})
    done = ended(http, batch)
    assert (done["request_counts"], done["error_file_id"]) == ({"total": 75, "completed": 75, "failed": 0}, None)
    after = http.get(f"/v1/files/{done['output_file_id']}/content").text.splitlines()
    assert after[:70] == before
    assert {json.loads(text)["custom_id"] for text in after[70:]} == {f"b{n}" for n in range(5)}
    ledger = stand.simulator.ledger()
    assert [ledger["paid"][digest(item["body"])] for item in good + bad] == [1] * 75
    asked = [call["digest"] for call in ledger["calls"]]
    assert [asked.count(digest(item["body"])) for item in good + bad] == [1] * 70 + [2] * 5
    assert events(stand, batch) == ["batch.completed"] * 2
    # With nothing to call again it stays over, and is told no more.
    for _ in range(2):
        assert http.post(f"/v1/batches/{batch}/retry").json()["status"] == "completed"
    assert events(stand, batch) == ["batch.completed"] * 2


def test_what_can_be_done_in_which_state(stand: ApiStand, http: httpx.Client) -> None:
    def act(batch: str, what: str) -> httpx.Response:
        return http.post(f"/v1/batches/{batch}/{what}")

    failed = create(http, input_file_id=upload(http, b"x\n").json()["id"]).json()["id"]
    errors(http, failed)
    completed = submit(http, line())
    ended(http, completed)
    cancelled = submit(http, line(), lane="interactive")
    seen(http, cancelled, "in_progress")
    assert act(cancelled, "cancel").status_code == 200
    ended(http, cancelled, "cancelled")
    for batch, refusals in (
        (failed, ("cancel", "pause", "resume", "retry")),
        (completed, ("cancel", "pause", "resume")),
        (cancelled, ("pause", "resume", "retry")),
    ):
        for what in refusals:
            response = act(batch, what)
            refused(response, code="invalid_status")
            assert response.headers["x-should-retry"] == "false"
    assert act(cancelled, "cancel").json()["status"] == "cancelled"
    running = submit(http, line(), lane="interactive")
    seen(http, running, "in_progress")
    for what in ("pause", "pause", "resume", "resume", "pause"):
        assert act(running, what).json()["status"] == "in_progress"
    assert http.get(f"/v1/job-batches/{running[6:]}").json()["state"] == "paused"
    assert act(running, "cancel").json()["status"] in ("cancelling", "finalizing", "cancelled")
    ended(http, running, "cancelled")


def test_natively_it_is_the_same_batch(stand: ApiStand, http: httpx.Client) -> None:
    batch = submit(http, line("a"), line("b"), lane="interactive", callback_url="http://127.0.0.1:9/")
    seen(http, batch, "in_progress")
    native = f"/v1/job-batches/{batch[6:]}"
    assert http.get(native).json()["counts"]["total"] == 2
    assert http.post(f"{native}/cancel").status_code == 200
    found = ended(http, batch, "cancelled")
    assert found["cancelled_at"] >= found["cancelling_at"] >= found["created_at"]
    assert events(stand, batch) == ["batch.cancelled"]


def test_files_of_a_batch_that_go_before_it(stand: ApiStand, http: httpx.Client) -> None:
    told = {"anchor": "created_at", "seconds": 3_600}
    done = ended(http, submit(http, line(), output_expires_after=told))
    file = http.get(f"/v1/files/{done['output_file_id']}").json()
    assert file["expires_at"] == file["created_at"] + 3_600
    name = keys.file(file["id"])
    assert 3_500 < stand.redis.ttl(name) <= 3_600
    stand.redis.pexpire(name, 1)
    wait_for(lambda: not stand.redis.exists(name), what="the end of a file")
    for tail in ("", "/content"):
        refused(http.get(f"/v1/files/{file['id']}{tail}"), "id", "not_found", 404)
    refused(http.delete(f"/v1/files/{file['id']}"), "id", "not_found", 404)
    assert get(http, done["id"])["status"] == "completed"
    assert http.get("/v1/files", params={"purpose": "batch_output"}).json()["data"] == []


def test_deleting_the_output_deletes_the_responses(stand: ApiStand, http: httpx.Client) -> None:
    bad = line("bad")
    bad["body"]["messages"][0]["content"] += " meet a 400"
    done = ended(http, submit(http, line("good"), bad))
    assert http.delete(f"/v1/files/{done['output_file_id']}").json()["deleted"]
    batch = done["id"][6:]
    assert [stand.redis.exists(keys.result(f"{batch}-{index}")) for index in (0, 1)] == [0, 1]
    refused(http.get(f"/v1/files/{done['output_file_id']}/content"), "id", "not_found", 404)
    assert [row["custom_id"] for row in content(http, done["error_file_id"])] == ["bad"]
    # Called again, what failed is all that there is to read.
    stand.simulator.configure(triggers={})
    try:
        assert http.post(f"/v1/batches/{done['id']}/retry").status_code == 200
        wait_for(lambda: get(http, done["id"])["request_counts"]["completed"] == 2, what="an answer")
    finally:
        stand.simulator.configure(triggers={"meet a 400": "400"})
    found = seen(http, done["id"], "completed")
    rows = content(http, found["output_file_id"])
    assert {row["custom_id"] for row in rows if row["error"] is None} == {"bad"}


def test_an_expired_one_is_told_so(stand: ApiStand, http: httpx.Client) -> None:
    batch = submit(
        http,
        line("a"),
        line("b"),
        line("c"),
        lane="interactive",
        completion_window="2s",
        callback_url="http://127.0.0.1:9/",
    )
    seen(http, batch, "in_progress")
    played = Played(stand.valkey.url, batch)
    played.end("s", 1)
    # The others are let go, as by a worker that ends: the deadline meets them in the queue.
    held: Any = stand.redis.zrange(keys.LEASES, 0, -1)
    stand.redis.zadd(keys.LEASES, dict.fromkeys(held, 1.0), xx=True)
    found = ended(http, batch, "expired")
    assert found["request_counts"] == {"total": 3, "completed": 1, "failed": 2}
    assert found["expired_at"] >= found["finalizing_at"] >= found["expires_at"]
    assert {row["custom_id"]: row["error"]["code"] for row in content(http, found["error_file_id"])} == {
        "a": "batch_expired",
        "c": "batch_expired",
    }
    assert events(stand, batch) == ["batch.expired"]
    refused(http.post(f"/v1/batches/{batch}/retry"), code="invalid_status")
