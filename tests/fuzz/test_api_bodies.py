"""Bodies, heads and addresses that nobody should send: each is refused in the shape of its protocol, and leaves no trace.

One API process takes all of it. At the end it still serves, has logged no failure, and holds no more memory than before.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import uvicorn
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from api.wire import Wire
from tests.integration.api_stand import PROMPT, ApiStand, api_stand, ask, ask_message, line, lines
from tests.integration.engine_stand import in_loop, until
from tests.waiting import wait_for

JSON = "application/json"
LINES = "application/jsonl"
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
#: Every route that takes a body: address, type, and a body that is good.
ROUTES: dict[str, tuple[str, str, Any]] = {
    "job": ("/v1/jobs", JSON, {"request": ask(), "custom_id": "a", "metadata": {"k": "v"}, "deadline_s": 60.0}),
    "batch": ("/v1/job-batches", JSON, {"requests": [line(), ask(), {"prompt": PROMPT}], "metadata": {"k": "v"}}),
    "lines": ("/v1/job-batches", LINES, line()),
    "chat": (CHAT, JSON, ask(temperature=0.5, stop=["a"], stream=False, tools=[], stream_options={})),
    "messages": (MESSAGES, JSON, ask_message(system=[{"type": "text", "text": "s"}], stop_sequences=["a"])),
}
DEPTH = 100_000
SURROGATE = rb'"\ud800"'
#: Not JSON, or JSON that no request can be; `%s` stands for a good body.
BAD: dict[str, bytes] = {
    "nothing": b"",
    "space": b" \n\t ",
    "half": b'{"requ',
    "a comma too many": b'{"a":1,}',
    "a list": b"[]",
    "a text": b'"x"',
    "null": b"null",
    "a number": b"1",
    "1e999": b"1e999",
    "a long number": b"1" * 5_000,
    "NaN": b"NaN",
    "brackets": b"[" * DEPTH,
    "closed brackets": b"[" * DEPTH + b"]" * DEPTH,
    "braces": b'{"a":' * DEPTH + b"1" + b"}" * DEPTH,
    "NUL": b"\0",
    "NULs": b"\0" * 100_000,
    "NUL behind": b"%s\0",
    "NUL before": b"\0%s",
    "two values": b"%s%s",
    "not UTF-8": b'{"request":"\xff\xfe"}',
    "a mark of bytes": b"\xef\xbb\xbf%s",
    "half a pair": b'{"request":' + SURROGATE + b"}",
    "half a pair as a key": b"{" + SURROGATE + b":1}",
    "half a pair in UTF-8": b'{"request":"\xed\xa0\x80"}',
    "a raw line break": b'{"request":"a\nb"}',
    "something binary": bytes(range(256)) * 8,
}
BODY_BYTES = 4_000_000
HUGE_BYTES = 100_000_000
#: What memory may grow by while something without end is sent: a body within its bound, copied, and some slack.
GROWTH_BYTES = 4 * BODY_BYTES + 32_000_000


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiStand]:
    with api_stand(tmp_path_factory.mktemp("fuzz")) as stand:
        stand.api(api_max_body_bytes=str(BODY_BYTES))
        stand.work("interactive", max_attempts="1")
        yield stand
        api = stand.apis[0]
        assert httpx.get(f"{api.url}/healthz", trust_env=False).status_code == 200
        assert api.end() == 0
        for said in (
            "Traceback",
            "request_failed",
            "answer_cut",
            "api_task_died",
            '"level": "error"',
            '"level":"error"',
        ):
            assert said not in api.text
        stand.kept_secrets()


@pytest.fixture
def client(stand: ApiStand) -> httpx.Client:
    """A client of a new tenant."""
    return stand.http()


def refused(path: str, response: httpx.Response | Answer, *statuses: int) -> None:
    """Raises AssertionError unless this is a refusal in the shape of the path's protocol, and one that tells why."""
    status = response.status_code
    assert 400 <= status < 500, (status, response.content[:300])
    assert not statuses or status in statuses, (status, response.content[:300])
    told = json.loads(response.content)
    if path == CHAT:
        assert response.headers["x-request-id"].startswith("req_")
        assert told["error"].keys() >= {"message", "type", "param", "code"}
        why = told["error"]["message"]
    elif path == MESSAGES:
        assert told["type"] == "error"
        assert told["request_id"] == response.headers["request-id"]
        why = told["error"]["message"]
        assert told["error"]["type"]
    else:
        assert response.headers["content-type"] == "application/problem+json"
        assert (told["status"], told["type"]) == (status, f"urn:mimoq:problem:{told['code']}")
        assert told["title"] not in ("", "Error"), status
        why = told["detail"]
    assert 5 < len(why) <= 1_000
    assert PROMPT not in response.text


# -- bodies


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bad", BAD)
def test_a_body_that_is_no_request(client: httpx.Client, route: str, bad: str) -> None:
    path, kind, good = ROUTES[route]
    body = BAD[bad].replace(b"%s", json.dumps(good).encode())
    response = client.post(path, content=body, headers={"Content-Type": kind})
    if kind == LINES and bad == "a mark of bytes":  # a file may begin with one
        assert response.status_code == 202
    else:
        refused(path, response, 400, 422)


def values() -> st.SearchStrategy[Any]:
    """Any JSON, with what decoders stumble over."""
    odd = [10**400, -(10**400), 2**63, 2**64, 1e308, -0.0, "", "\0", "\ufeff", "a" * 5_000, "\U0010ffff", [], {}, None]
    leaves = st.one_of(
        st.sampled_from(odd), st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=20)
    )
    keys = st.one_of(st.sampled_from(["role", "content", "type", "text", "body", "url", "method"]), st.text(max_size=5))
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=5
    )


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside a value, and to the value itself."""
    yield here
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*here, key))


def put(value: Any, way: tuple[Any, ...], other: Any) -> Any:
    """A copy with another value at that place."""
    if not way:
        return other
    copy = value.copy()
    copy[way[0]] = put(value[way[0]], way[1:], other)
    return copy


@pytest.mark.parametrize("route", ROUTES)
def test_a_body_with_a_value_that_should_be_another(stand: ApiStand, route: str) -> None:
    path, kind, good = ROUTES[route]
    ways = list(places(good))
    client = stand.http()

    @settings(max_examples=60, derandomize=True, database=None)
    @given(st.sampled_from(ways), values(), st.text(max_size=5))
    def tried(way: tuple[Any, ...], other: Any, name: str) -> None:
        for body in (put(good, way, other), {**good, name: other}):
            headers = {"Content-Type": kind}
            response = client.post(path, content=json.dumps(body).encode(), headers=headers)
            if response.status_code not in (200, 202):
                refused(path, response)

    tried()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "number", ["1e999", "-1e999", "1" + "0" * 5_000, "1e-999", "0." + "1" * 5_000, "1E+400", "-0", "1.5e3"]
)
def test_numbers_beyond_all_bounds(client: httpx.Client, route: str, number: str) -> None:
    path, kind, good = ROUTES[route]
    for way in (way for way in places(good) if way and not isinstance(way[-1], int)):
        body = json.dumps(put(good, way, "@")).replace('"@"', number)
        response = client.post(path, content=body, headers={"Content-Type": kind})
        if response.status_code not in (200, 202):
            refused(path, response)


@pytest.mark.parametrize("route", ROUTES)
def test_keys_that_come_twice(client: httpx.Client, route: str) -> None:
    path, kind, good = ROUTES[route]
    body = json.dumps(good)
    for name in good:
        twice = f'{body[:-1]}, "{name}": {{"a": [1]}}}}'
        response = client.post(path, content=twice, headers={"Content-Type": kind})
        if response.status_code not in (200, 202):
            refused(path, response)


@pytest.mark.parametrize("route", ROUTES)
def test_bodies_that_are_encoded_or_of_another_type(client: httpx.Client, route: str) -> None:
    path, kind, good = ROUTES[route]
    body = json.dumps(good).encode()
    for encoding in ("gzip", "deflate", "br", "zstd", "identity, gzip", "x" * 1_000):
        headers = {"Content-Type": kind, "Content-Encoding": encoding}
        refused(path, client.post(path, content=zlib.compress(body), headers=headers), 415)
    for other in (
        "",
        ";",
        "text/html",
        "application/json; charset=utf-16",
        "multipart/form-data",
        "\xff",
        "a/" + "b" * 9_000,
    ):
        headers = {"Content-Type": other.encode("latin-1")}  # type: ignore[dict-item]  # httpx takes bytes
        response = client.post(path, content=body, headers=headers)
        if response.status_code not in (200, 202):
            refused(path, response, 415, 422)


def test_headers_of_our_own_that_make_no_sense(client: httpx.Client) -> None:
    for path, _, good in ROUTES.values():
        for value in ("", "x" * 256, "x" * 20_000, "\xff\xfe"):
            headers = {"Idempotency-Key": value.encode("latin-1")}
            response = client.post(path, json=good, headers=headers)  # type: ignore[arg-type]  # httpx takes bytes
            if response.status_code not in (200, 202, 409):
                refused(path, response)
    for value in ("9" * 5_000, "-1", "1e9", "\xb2", "x", ""):
        headers = {"x-stainless-retry-count": value.encode("latin-1")}
        assert client.post(CHAT, json=ask(), headers=headers).status_code == 200  # type: ignore[arg-type]


# -- addresses

IDS = {
    "NUL": "%00",
    "up": "..%2f..%2f",
    "up in the clear": "../../healthz",
    "long": "a" * 10_000,
    "long number": "b-" + "9" * 10_000,
    "number": "b-99999999999999999999",
    "minus": "b--1",
    "hyphen": "-",
    "not UTF-8": "%ff%fe",
    "half an escape": "%e",
    "a line break": "%0d%0aX-Evil:%201",
    "a star": "*",
    "a key": "mimoq:{q}:b",
    "a brace": "%7b%7d",
    "another script": "%D8%A7%F0%9F%98%80",
}
AT_IDS = (
    ("GET", "/v1/jobs/%s"),
    ("POST", "/v1/jobs/%s/cancel"),
    ("GET", "/v1/job-batches/%s"),
    ("POST", "/v1/job-batches/%s/cancel"),
    ("POST", "/v1/job-batches/%s/pause"),
    ("POST", "/v1/job-batches/%s/resume"),
    ("GET", "/v1/job-batches/%s/results"),
    ("GET", "/v1/job-batches/%s/events"),
    ("POST", "/v1/webhook-deliveries/%s/retry"),
    ("GET", "/v1/%s"),
)


@pytest.mark.parametrize("name", IDS)
def test_ids_that_are_none(stand: ApiStand, name: str) -> None:
    token = stand.token()
    for method, path in AT_IDS:
        path = path.replace("%s", IDS[name])
        with talking(stand) as talk:
            talk.send(head(method, path, token, "Content-Length: 0"))
            refused(path, talk.answer(), 404, 405)


QUERIES = (
    "limit=1e999", "limit=" + "9" * 5_000, "limit=-1", "limit=0", "limit=", "limit=%00", "limit=1&limit=x",
    "after=" + "x" * 10_000, "after=%00", "after=%ff", "after=b-" + "9" * 150, "after=-", "batch=%00", "batch=..%2f",
    "batch=" + "b" * 99, "state=%00", "state=QUEUED", "wait=nan", "wait=inf", "wait=-1", "wait=1e999", "wait=601", "wait=x",
    "%", "&&&==", "a" * 20_000, "a=" * 5_000, "a&" * 5_000, "metadata=%7b", "metadata=" + "[" * 10_000, "deadline_s=1e400",
    "lane=%ff", "callback_url=" + "x" * 3_000, "max_attempts=1e2", "follow=x", "endpoint=/",
)  # fmt: skip


def test_queries_that_make_no_sense(stand: ApiStand) -> None:
    token = stand.token()
    client = stand.http(token)
    job = client.post("/v1/jobs", json={"request": ask()}).json()
    batch = client.post("/v1/job-batches", json={"requests": [ask()]}).json()
    client.post(f"/v1/job-batches/{batch['id']}/cancel").raise_for_status()
    reads = ("/v1/jobs", "/v1/job-batches", f"/v1/jobs/{job['id']}", f"/v1/job-batches/{batch['id']}/results")
    asked = [("GET", path, b"") for path in (*reads, "/v1/webhook-deliveries", "/healthz")]
    asked += [("POST", "/v1/jobs", b"{}"), ("POST", "/v1/job-batches", lines(ask()))]
    with talking(stand) as talk:
        for method, path, body in asked:
            for query in QUERIES:
                talk.send(
                    head(method, f"{path}?{query}", token, f"Content-Type: {LINES}", f"Content-Length: {len(body)}")
                )
                talk.send(body)
                answer = talk.answer()
                if answer.status_code not in (200, 202):
                    refused(path, answer, 400, 404, 422)


# -- the wire


class Answer(NamedTuple):
    """One that came over a bare socket."""

    status_code: int
    headers: dict[str, str]
    content: bytes

    @property
    def text(self) -> str:
        """Its body."""
        return self.content.decode()


class Talk:
    """A connection on which anything can be sent."""

    def __init__(self, connection: socket.socket, said: BinaryIO) -> None:
        self._connection = connection
        self._said = said

    def send(self, *parts: bytes) -> bool:
        """Whether all of it was taken."""
        try:
            for part in parts:
                self._connection.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def answer(self, method: str = "GET") -> Answer:
        """The next answer."""
        status = self._said.readline().split()
        assert status[:1] == [b"HTTP/1.1"], status
        headers = {}
        while line := self._said.readline().strip():
            name, _, value = line.decode("latin-1").partition(": ")
            headers[name.lower()] = value
        length = 0 if method == "HEAD" else int(headers["content-length"]) if "content-length" in headers else None
        return Answer(int(status[1]), headers, self._chunks() if length is None else self._said.read(length))

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self._said.readline(), 16):
            body += self._said.read(size)
            self._said.readline()
        self._said.readline()
        return body

    def over(self) -> bytes:
        """What comes until the connection is closed."""
        said = b""
        try:
            while chunk := self._said.read(65_536):
                said += chunk
        except ConnectionResetError:
            pass
        return said


@contextmanager
def talking(stand: ApiStand) -> Iterator[Talk]:
    port = urlsplit(stand.apis[0].url).port
    with (
        socket.create_connection(("127.0.0.1", port or 0), timeout=30.0) as connection,
        connection.makefile("rb") as said,
    ):
        yield Talk(connection, said)


def head(method: str, path: str, token: str, *headers: str) -> bytes:
    """The head of a request."""
    told = "".join(f"{header}\r\n" for header in headers)
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n{told}\r\n".encode("latin-1")


@contextmanager
def flat(stand: ApiStand) -> Iterator[Any]:
    """Gives a function that raises AssertionError once the API's memory has grown too much; it is called at the end too."""
    process = psutil.Process(stand.apis[0].process.pid)
    before = process.memory_info().rss

    def look() -> None:
        grown = process.memory_info().rss - before
        assert grown < GROWTH_BYTES, f"{grown / 1e6:.0f} MB more"

    yield look
    look()


def chunked(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Parts of a body as chunks on the wire."""
    for part in parts:
        yield b"%x\r\n%s\r\n" % (len(part), part)
    yield b"0\r\n\r\n"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("declared", [True, False])
def test_a_body_of_100_mb(stand: ApiStand, route: str, declared: bool) -> None:
    path, kind, _ = ROUTES[route]
    block = b'{"a":"' + b"x" * 999_994
    length = f"Content-Length: {HUGE_BYTES}" if declared else "Transfer-Encoding: chunked"
    with flat(stand) as look, talking(stand) as talk:
        talk.send(head("POST", path, stand.token(), f"Content-Type: {kind}", length))
        blocks: Iterable[bytes] = (block for _ in range(HUGE_BYTES // len(block)))
        for part in blocks if declared else chunked(blocks):
            if not talk.send(part):
                break
            look()
        refused(path, talk.answer(), *((413,) if kind == JSON else (422,)))


@pytest.mark.parametrize("route", ROUTES)
def test_a_body_that_ends_too_early_submits_nothing(stand: ApiStand, route: str) -> None:
    path, kind, good = ROUTES[route]
    token = stand.token()
    body = json.dumps(good).encode()
    with talking(stand) as talk:
        talk.send(head("POST", path, token, f"Content-Type: {kind}", f"Content-Length: {len(body) + 1}"), body)
    with talking(stand) as talk:
        talk.send(head("POST", path, token, f"Content-Type: {kind}", "Transfer-Encoding: chunked"))
        talk.send(b"%x\r\n%s\r\n" % (len(body), body), b"zz\r\n")
        refused(path, talk.answer(), 400)
    client = stand.http(token)
    for what in ("/v1/jobs", "/v1/job-batches"):
        assert client.get(what).json()["data"] == []


ENDLESS = {
    "address": (b"GET /", b"a" * 65_536),
    "method": (b"", b"A" * 65_536),
    "header": (b"GET / HTTP/1.1\r\nX: ", b"a" * 65_536),
    "name": (b"GET / HTTP/1.1\r\n", b"a" * 65_536),
    "headers": (b"POST /v1/messages HTTP/1.1\r\n", b"X-A: b\r\n" * 8_192),
    "line breaks": (b"", b"\r\n" * 32_768),
    "trailer": (b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"a" * 65_536),
    "trailers": (b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: a\r\n" * 10_000),
    "extension": (b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;a=", b"a" * 65_536),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_head_without_end(stand: ApiStand, kind: str) -> None:
    begin, more = ENDLESS[kind]
    with flat(stand) as look, talking(stand) as talk:
        taken = talk.send(begin)
        for _ in range(1_000):
            if not (taken := taken and talk.send(more)):
                break
            look()
        assert not taken, "64 MB were taken"
    if kind in ("header", "headers", "address"):  # and one that listens is told why
        path = "/v1/messages" if kind == "headers" else "/"
        with talking(stand) as talk:
            talk.send(begin, more, more)
            refused(path, talk.answer(), 431)
            assert talk.over() == b""


@pytest.mark.parametrize("route", ROUTES)
def test_a_head_of_a_megabyte(stand: ApiStand, route: str) -> None:
    path, kind, good = ROUTES[route]
    for size, statuses in ((1_000_000, (431,)), (40_000, (431,)), (20_000, (200, 202))):
        body = json.dumps(good).encode()
        with talking(stand) as talk:
            told = (f"Content-Type: {kind}", f"Content-Length: {len(body)}", "X-Long: " + "a" * size)
            talk.send(head("POST", path, stand.token(), *told), body)
            answer = talk.answer()
            if statuses == (431,):
                refused(path, answer, 431)
            else:
                assert answer.status_code in statuses


@pytest.mark.parametrize(
    "raw",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nA b: c\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\0c\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_bytes_that_are_no_http(stand: ApiStand, raw: bytes) -> None:
    with talking(stand) as talk:
        talk.send(raw)
        refused("", talk.answer(), 400)
        assert talk.over() == b""


def test_methods_and_upgrades_that_are_not_served(stand: ApiStand) -> None:
    token = stand.token()
    for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND"):
        for path in ("/v1/jobs", "/v1/jobs/x", CHAT, MESSAGES, "/healthz", "/nothing"):
            with talking(stand) as talk:
                talk.send(head(method, path, token))
                answer = talk.answer(method)
                if method == "HEAD":
                    assert 400 <= answer.status_code < 500
                else:
                    refused(path, answer, 404, 405)
    for upgrade in ("websocket", "h2c", "nonsense"):
        with talking(stand) as talk:
            talk.send(head("GET", "/v1/jobs", token, "Connection: Upgrade", f"Upgrade: {upgrade}"))
            assert talk.answer().status_code == 200


def test_requests_that_come_before_the_answers_to_those_before_them(stand: ApiStand) -> None:
    token = stand.token()
    body = b'{"request":1}'
    with talking(stand) as talk:
        for number in range(20):
            talk.send(head("GET", f"/v1/jobs?limit={number + 1}", token))
            talk.send(head("POST", "/v1/jobs", token, f"Content-Length: {len(body)}"), body)
        for _ in range(20):
            assert talk.answer().status_code == 200
            refused("/v1/jobs", talk.answer(), 422)


def test_a_flood_of_requests_whose_answers_nobody_reads(stand: ApiStand) -> None:
    block = b"GET /healthz HTTP/1.1\r\n\r\n" * 10_000
    with flat(stand) as look:
        for _ in range(3):
            with talking(stand) as talk:
                for _ in range(200):
                    if not talk.send(block):
                        break
                    look()
                else:
                    raise AssertionError("two million requests were taken")


def test_a_refused_connection_spoils_no_answer_that_is_due(stand: ApiStand) -> None:
    """What follows a request that waits is no HTTP: nobody may take its refusal for the answer."""
    token = stand.token()
    stand.simulator.configure(hold=True)
    try:
        body = json.dumps(ask()).encode()
        with talking(stand) as talk:
            talk.send(head("POST", CHAT, token, f"Content-Length: {len(body)}"), body)
            stand.simulator.wait_until(lambda totals: totals.in_flight == 1)
            talk.send(b"\0\0\0")
            assert talk.over() == b""
    finally:
        stand.simulator.configure(hold=False)
    client = stand.http(token)
    wait_for(lambda: client.get("/v1/jobs?state=succeeded").json()["data"], what="the job's end")


@in_loop
async def test_a_head_that_never_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.wire.HEAD_S", 0.05)
    config, state = uvicorn.Config(FastAPI(), log_config=None, timeout_keep_alive=3_600), ServerState()
    server = await asyncio.get_running_loop().create_server(lambda: Wire(config, state, {}), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        good = b"GET / HTTP/1.1\r\n\r\n"
        asked: tuple[tuple[bytes, list[bytes]], ...] = (
            (b"", []),
            (b"\r\n", []),
            (b"GET / HT", [b"408"]),
            (good + b"GET", [b"404", b"408"]),
        )
        for sent, statuses in asked:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            answer = await asyncio.wait_for(reader.read(), 30.0)
            assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == statuses
            writer.close()
            await writer.wait_closed()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(good)
        await reader.readuntil(b"}")
        writer.write(b"\r\n")
        assert await asyncio.wait_for(reader.read(), 30.0) == b""
        writer.close()
        await writer.wait_closed()
        await until(lambda: not state.connections, "the end of all connections")
