"""Who may do what: tokens, scopes, rates, tenants; and what the door refuses, in the shape of the protocol called."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
from fastapi.routing import APIRoute

from api.app import ROUTERS, make_app
from api.auth import COUNT_S, FRESH_S
from api.door import HEADER_BYTES, OPEN
from jobs import tokens
from jobs.connections import connect
from jobs.requests import CHAT
from tests.components import Valkey
from tests.integration.api_stand import ApiStand, answer, api_stand, ask, ask_message, claim, core_standing, line, lines
from tests.integration.engine_stand import in_loop
from tests.waiting import wait_for

CALLS = ("/v1/chat/completions", "/v1/messages")


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiStand]:
    with api_stand(tmp_path_factory.mktemp("api")) as stand:
        stand.api(sync_timeout_s="0.2", api_max_body_bytes="100000")
        yield stand
        stand.kept_secrets()


def bare(stand: ApiStand) -> httpx.Client:
    """A client without a token."""
    return httpx.Client(base_url=stand.apis[0].url, trust_env=False, timeout=30)


def bearer(token: str) -> dict[str, str]:
    """Its header."""
    return {"Authorization": f"Bearer {token}"}


# -- tokens


def test_operations_need_no_token_and_all_else_does(stand: ApiStand) -> None:
    with bare(stand) as http:
        for path in sorted(OPEN):
            assert http.get(path).status_code == 200, path
        for path in ("/v1/jobs", "/v1/nothing", "/", "/healthz/", "/docs/x", "//healthz", "/v1/job-batches"):
            refused = http.get(path)
            assert refused.status_code == 401, path
            assert refused.headers["www-authenticate"] == "Bearer"
            assert "/v1/" not in refused.text


def test_a_token_comes_in_either_header(stand: ApiStand) -> None:
    token = stand.token()
    good: list[dict[str, str]] = [
        bearer(token),
        {"Authorization": f"bearer  {token}"},
        {"X-Api-Key": token},
        {"x-api-key": token, "Authorization": "Basic dTpw"},
    ]
    with bare(stand) as http:
        for headers in good:
            assert http.get("/v1/jobs", headers=headers).status_code == 200, headers


def test_what_is_no_token_is_refused(stand: ApiStand) -> None:
    token = stand.token()
    other = stand.token()
    head, _, _ = token.rpartition(token[-20:])
    wrong = [
        "x",
        token[:-1],
        token + "x",
        token.upper(),
        head + other[-20:],  # half of it right
        f"mq_{'0' * 12}_{'a' * 43}",
        "mq_" + "é" * 12,
        "x" * 10_000,
    ]
    with bare(stand) as http:
        for text in wrong:
            for header in ((b"Authorization", f"Bearer {text}".encode()), (b"X-Api-Key", text.encode())):
                refused = http.get("/v1/jobs", headers=[header])
                assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized"), text
                assert text == "x" or text not in refused.text


def test_a_revoked_token_ends_within_seconds(stand: ApiStand) -> None:
    token = stand.token()
    http = stand.http(token)
    assert http.get("/v1/jobs").status_code == 200
    parts = tokens.split(token)
    assert parts is not None
    tokens.revoke(stand.redis, parts[0])
    wait_for(lambda: http.get("/v1/jobs").status_code == 401, FRESH_S + 5, "a token that is refused")


def test_a_new_token_is_known_at_once(stand: ApiStand) -> None:
    for _ in range(3):
        assert stand.http().get("/v1/jobs").status_code == 200


# -- scopes


def test_scopes_are_kept_apart(stand: ApiStand) -> None:
    submits = stand.token(["submit"])
    parts = tokens.split(submits)
    assert parts is not None
    reads = stand.http(stand.token(["read"], tenant=parts[0]))
    http = stand.http(submits)
    sent = http.post("/v1/jobs", json={"request": ask(), "lane": "interactive"})
    assert sent.status_code == 202
    job, batch = sent.json()["id"], sent.json()["batch_id"]
    for client, method, path, body in (
        (http, "GET", f"/v1/jobs/{job}", None),
        (http, "GET", "/v1/jobs", None),
        (http, "GET", f"/v1/job-batches/{batch}/results", None),
        (http, "POST", "/v1/jobs?wait=1", {"request": ask()}),
        (http, "POST", "/v1/chat/completions", ask()),
        (http, "POST", "/v1/messages", ask_message()),
        (reads, "POST", "/v1/jobs", {"request": ask()}),
        (reads, "POST", "/v1/job-batches", {"requests": [line()]}),
        (reads, "POST", f"/v1/jobs/{job}/cancel", None),
        (reads, "POST", "/v1/chat/completions", ask()),
    ):
        refused = client.request(method, path, json=body)
        assert refused.status_code == 403, (method, path)
        assert "scope" in refused.text
    assert len(reads.get("/v1/jobs").json()["data"]) == 1
    # Who may not read learns of a job's end, but not its answer.
    answer(stand.valkey.url, *claim(stand.valkey.url, job))
    seen = http.post(f"/v1/jobs/{job}/cancel").json()
    assert seen["state"] == "succeeded"
    assert "response" not in seen
    assert reads.get(f"/v1/jobs/{job}").json()["response"]["id"] == "x"


# -- rates


def test_a_token_has_its_requests_a_minute(stand: ApiStand) -> None:
    wait_for(lambda: time.time() % 60 < 50, 15, "a minute that lasts")
    http = stand.http(stand.token(rpm=3))
    assert [http.get("/v1/jobs").status_code for _ in range(3)] == [200] * 3
    for path in ("/v1/jobs", *CALLS):
        refused = http.get(path)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert stand.http(stand.token(rpm=1)).get("/v1/jobs").status_code == 200
    assert http.get("/healthz").status_code == 200


@in_loop
async def test_a_rate_holds_over_all_processes(store_url: str, valkey: Valkey) -> None:
    client = connect(store_url)
    token = tokens.create(client, "t", rpm=10)
    client.close()
    wait_for(lambda: time.time() % 60 < 50, 15, "a minute that lasts")  # the count begins anew with each
    async with (
        core_standing(store_url, api_auth=True) as (_, one),
        core_standing(store_url, api_auth=True) as (_, two),
    ):
        for _ in range(5):
            for http in (one, two):
                assert (await http.get("/v1/jobs", headers=bearer(token))).status_code == 200
        # Each has told the other of its own within two rounds.
        for http in (one, two):
            end = time.monotonic() + 20 * COUNT_S
            while (await http.get("/v1/jobs", headers=bearer(token))).status_code != 429:
                assert time.monotonic() < end


# -- shapes of errors


def test_errors_have_the_shape_of_the_protocol(stand: ApiStand) -> None:
    http = stand.http(stand.token(["read"]))
    with bare(stand) as nobody:
        for client, status, openai_type, anthropic_type in (
            (nobody, 401, "authentication_error", "authentication_error"),
            (http, 403, "permission_error", "permission_error"),
            (stand.http(), 400, "invalid_request_error", "invalid_request_error"),
        ):
            native = client.post("/v1/jobs", content=b"{")
            assert (native.status_code, native.json()["status"]) == (status, status)
            assert native.headers["content-type"] == "application/problem+json"
            assert native.json()["type"].startswith("urn:mimoq:problem:")
            assert native.headers["x-request-id"].startswith("req_")
            chat = client.post(CALLS[0], content=b"{")
            assert (chat.status_code, chat.headers["content-type"]) == (status, "application/json")
            assert chat.json()["error"].keys() == {"message", "type", "param", "code"}
            assert chat.json()["error"]["type"] == openai_type
            messages = client.post(CALLS[1], content=b"{")
            assert messages.status_code == status
            assert (messages.json()["type"], messages.json()["error"]["type"]) == ("error", anthropic_type)
            assert messages.json()["request_id"] == messages.headers["request-id"]


def test_what_is_nowhere_and_methods_that_are_not(stand: ApiStand) -> None:
    http = stand.http()
    gone = http.get("/v1/nothing")
    assert (gone.status_code, gone.json()["code"]) == (404, "not_found")
    wrong = http.delete("/v1/jobs")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"]
    assert http.get(CALLS[0]).json()["error"]["code"] == "method_not_allowed"


# -- what is too large


def test_headers_and_bodies_that_are_too_large(stand: ApiStand) -> None:
    http = stand.http()
    assert http.get("/v1/jobs", headers={"x": "y" * (HEADER_BYTES - 1_000)}).status_code == 200
    for path in ("/healthz", "/v1/jobs", CALLS[0]):
        refused = http.get(path, headers={"x": "y" * HEADER_BYTES})
        assert refused.status_code == 431
        assert str(refused.json())
    for path in ("/v1/jobs", "/v1/job-batches", *CALLS):
        for content in (b" " * 100_001, iter([b" " * 60_000] * 2)):
            too_large = http.post(path, content=content, headers={"content-type": "application/json"})
            assert too_large.status_code == 413, path
    assert http.post("/v1/jobs", content=b" " * 100_000).status_code == 400
    encoded = http.post("/v1/jobs", content=b"x", headers={"content-encoding": "gzip"})
    assert encoded.status_code == 415


# -- tenants


def test_every_route_with_an_id_is_closed_to_other_tenants(stand: ApiStand) -> None:
    """Whatever has an id in its path, now or later: another tenant's answer is that of an id that never was."""
    owner, other = stand.http(), stand.http()
    batch = owner.post("/v1/job-batches", json={"requests": [line(), line()], "lane": "interactive"}).json()["id"]
    answer(stand.valkey.url, *claim(stand.valkey.url, f"{batch}-0"))
    job = owner.post("/v1/jobs", json={"request": ask(), "lane": "interactive"}).json()["id"]
    file = owner.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", lines(line()))}).json()["id"]
    asked = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    files = owner.post("/v1/batches", json=asked).json()["id"]
    wait_for(lambda: owner.get(f"/v1/batches/{files}").json()["status"] == "in_progress", what="a batch of a file")
    messages = [{"custom_id": "a", "params": ask_message()}]
    message = owner.post("/v1/messages/batches", json={"requests": messages}).json()["id"]
    output = f"file-{files.removeprefix('batch_')}-output"
    never = {job: f"{'0' * 24}-0", batch: "0" * 24, f"{batch}-0": f"{'0' * 24}-0"}
    for found in (file, output, files, message):
        never[found] = re.sub("[0-9a-f]{24}", "0" * 24, found)
    tried = 0
    for path, methods in make_app().openapi()["paths"].items():
        names = re.findall(r"\{(\w+)\}", path)
        for method in methods if names else ():
            for pair in never.items():
                answers = []
                for id in pair:
                    url = path.format(**dict.fromkeys(names, id))
                    answers.append(other.request(method, url, params={"wait": 0.1}))
                theirs, nobodys = answers
                assert theirs.status_code == nobodys.status_code == 404, (method, path)
                contents = [re.sub(rb"req_[0-9a-f]+", b"", answer.content) for answer in answers]
                assert contents[0] == contents[1], (method, path)
                tried += 1
    assert tried >= 7 * 20
    for path in ("/v1/jobs", "/v1/job-batches"):
        assert other.get(path).json()["data"] == []
    for params in ({"batch": batch}, {"after": job}, {"after": f"{batch}-0"}):
        unknown = {name: re.sub("[0-9a-f]{24}", "0" * 24, value) for name, value in params.items()}
        theirs, nobodys = (other.get("/v1/jobs", params=told) for told in (params, unknown))
        assert (theirs.status_code, theirs.content) == (404, nobodys.content)
    assert other.get("/v1/job-batches", params={"after": batch}).status_code == 404
    for path in ("/v1/files", "/v1/batches", "/v1/messages/batches"):
        assert other.get(path).json()["data"] == []
    asked = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    assert other.post("/v1/batches", json=asked).status_code == 404
    # None of it has changed anything.
    assert owner.get(f"/v1/files/{file}/content").content
    assert owner.get(f"/v1/batches/{files}").json()["status"] == "in_progress"
    assert owner.get(f"/v1/messages/batches/{message}").json()["processing_status"] == "in_progress"
    assert owner.get(f"/v1/jobs/{job}").json()["state"] == "queued"
    assert owner.get(f"/v1/job-batches/{batch}").json()["counts"]["cancelled"] == 0


def test_no_route_is_missing_in_the_openapi_file() -> None:
    """Which is what the routes tried across tenants are taken from."""
    for router in ROUTERS:
        assert router.routes
        for route in router.routes:
            assert isinstance(route, APIRoute)
            assert route.include_in_schema, route.path


def test_tokens_of_one_tenant_see_the_same(stand: ApiStand) -> None:
    first = stand.token()
    parts = tokens.split(first)
    assert parts is not None
    job = stand.http(first).post("/v1/jobs", json={"request": ask(), "lane": "interactive"}).json()["id"]
    assert stand.http(stand.token(tenant=parts[0])).get(f"/v1/jobs/{job}").status_code == 200


def test_a_call_made_again_by_another_tenant_is_its_own(stand: ApiStand) -> None:
    body = ask()
    jobs = []
    for http in (stand.http(), stand.http()):
        late = http.post(CALLS[0], json=body, headers={"x-stainless-retry-count": "1"})
        assert late.status_code == 504
        jobs.append(late.headers["x-mimoq-job-id"])
    assert jobs[0] != jobs[1]


# -- without tokens


def run(*args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """`mimoq api` until it ends."""
    environment = {f"MIMOQ_{name.upper()}": value for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-P", "-m", "api", *args],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "example.invalid"])
def test_without_auth_it_listens_on_loopback_only(host: str) -> None:
    ended = run("--host", host, "--port", "0", api_auth="false", redis_url="unix:///nowhere")
    assert (ended.returncode, ended.stdout) == (2, "")
    (said,) = ended.stderr.splitlines()
    assert "MIMOQ_API_AUTH is off" in said
    assert host in said


def test_a_port_that_is_taken(stand: ApiStand) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = run("--port", str(taken.getsockname()[1]), redis_url=stand.valkey.url)
    assert ended.returncode == 2
    assert ended.stderr.startswith("mimoq api: can't listen on 127.0.0.1:")


@in_loop
async def test_without_auth_everybody_sees_what_has_no_tenant(store_url: str) -> None:
    async with core_standing(store_url) as (_, http):
        sent = await http.post("/v1/jobs", json={"request": ask()})
        assert sent.status_code == 202
        with_any = await http.get(f"/v1/jobs/{sent.json()['id']}", headers=bearer("whatever"))
        assert with_any.status_code == 200


@in_loop
async def test_without_auth_a_web_page_is_not_taken_for_the_user(store_url: str) -> None:
    body = {"request": ask()}
    pages = [
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "127.0.0.1", "Origin": "http://127.0.0.1:1"},
    ]
    async with core_standing(store_url) as (_, http):
        for headers in pages:
            refused = await http.post("/v1/jobs", json=body, headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (403, "other_host")
            assert (await http.get("/v1/jobs", headers=headers)).status_code == 403
        own = {"Origin": "http://127.0.0.1", "Host": "127.0.0.1"}  # as of /docs
        assert (await http.post("/v1/jobs", json=body, headers=own)).status_code == 202
        assert len((await http.get("/v1/jobs")).json()["data"]) == 1


# -- what is told of a fault of ours


FAULT = """
import sys
from api.core import Core

async def fails(core, single):
    text = single.request.body.decode()
    raise RuntimeError(f"a fault, not a text of {len(text)} characters")

Core.submit = fails
"""


def test_a_fault_of_ours_tells_nothing_but_its_id(stand: ApiStand) -> None:
    api = stand.api(FAULT)
    http = stand.http(api=api)
    for path, body in (("/v1/jobs", {"request": ask()}), (CALLS[0], ask()), (CALLS[1], ask_message())):
        failed = http.post(path, json=body)
        assert failed.status_code == 500
        assert "a fault" not in failed.text
        assert "under the request id" in failed.text
        request_id = failed.headers["request-id" if path == CALLS[1] else "x-request-id"]
        told = [record for record in api.records() if record.get("request_id") == request_id]
        assert [record["event"] for record in told] == ["request_failed"]
        assert "a fault, not a text of" in told[0]["exception"]
    assert [record for record in api.records() if record["level"] == "error"] == [
        record for record in api.records() if record["event"] == "request_failed"
    ]
    stand.kept_secrets()
