"""What a response's header and body say, read tolerantly."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from jobs.settings import Settings
from jobs.usage import read_usage
from worker.answers import Answer, UpstreamError, read_answer
from worker.outcome import MAX_RETRY_AFTER_S, Outcome, ResponseHead, Usage
from worker.upstream import Upstream

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"


def head(**headers: str) -> ResponseHead:
    lines = [(name.replace("_", "-").title().encode(), value.encode("latin-1")) for name, value in headers.items()]
    return ResponseHead.read(lines, NOW)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry_after": "7"}, 7.0),
        ({"retry_after": " 1.5 "}, 1.5),
        ({"retry_after": "0"}, 0.0),
        ({"retry_after": "-3"}, 0.0),
        ({"retry_after": "600"}, 600.0),
        ({"retry_after": "nan"}, None),
        ({"retry_after": "inf"}, None),
        ({"retry_after": "soon"}, None),
        ({"retry_after": ""}, None),
        ({"retry_after": "7, 9"}, None),
        ({"retry_after": "Tue, 34 Nov 2023 22:13:50 GMT"}, None),
        ({"retry_after": "Tue, 14 Nov 2023 22:13:50 GMT"}, 30.0),
        ({"retry_after": "Tue, 14 Nov 2023 22:13:50 -0000"}, 30.0),
        ({"retry_after": "Tue, 14 Nov 2023 22:13:00 GMT"}, 0.0),
        ({"retry_after": "Tuesday, 14-Nov-23 22:13:50 GMT"}, 30.0),
        ({"retry_after": "Tue Nov 14 22:13:50 2023"}, 30.0),
        ({"retry_after": "Sun Nov  5 22:13:50 2023"}, 0.0),
        ({"retry_after_ms": "250"}, 0.25),
        ({"retry_after_ms": "250", "retry_after": "9"}, 0.25),
        ({"retry_after_ms": "?", "retry_after": "9"}, 9.0),
        ({"retry_after_ms": "-1"}, 0.0),
        ({"retry_after_ms": "0.5"}, 0.0005),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    read = head(**headers)
    assert (read.retry_after_s, read.retry_after_asked_s) == (seconds, None)


@pytest.mark.parametrize(
    ("headers", "asked"),
    [
        ({"retry_after": "600.5"}, 600.5),
        ({"retry_after": "86400"}, 86_400.0),
        ({"retry_after": "Tue, 14 Nov 2023 22:33:20 GMT"}, 1200.0),
        ({"retry_after": "Tuesday, 14-Nov-23 22:33:20 GMT"}, 1200.0),
        ({"retry_after": "Tue Nov 14 22:33:20 2023"}, 1200.0),
        ({"retry_after_ms": "900000", "retry_after": "9"}, 900.0),
    ],
)
def test_a_retry_after_over_ten_minutes_is_capped_and_told(headers: dict[str, str], asked: float) -> None:
    read = head(**headers)
    assert (read.retry_after_s, read.retry_after_asked_s) == (MAX_RETRY_AFTER_S, asked)


def test_an_outcome_has_the_retry_after_of_its_head() -> None:
    def call(seconds: str) -> Outcome:
        response = httpx.Response(429, headers={"retry-after": seconds})
        upstream = Upstream(
            Settings(_env_file=None, base_url="https://host"), httpx.MockTransport(lambda _: response), lambda: NOW
        )
        return asyncio.run(upstream.call(CHAT, b"{}"))

    for seconds, kept, asked in (("5", 5.0, None), ("3600", MAX_RETRY_AFTER_S, 3600.0)):
        outcome = call(seconds)
        assert (outcome.retry_after_s, outcome.retry_after_asked_s) == (kept, asked)


def test_request_id() -> None:
    assert head(request_id="a", x_request_id="b").request_id == "b"
    assert head(x_request_id="b", request_id="a").request_id == "b"
    assert head(request_id="a").request_id == "a"
    assert head(x_request_id="").request_id is None


def test_content() -> None:
    plain = head(content_type="Application/JSON; charset=utf-8", content_encoding="identity", server="x")
    assert (plain.content_type, plain.encoded) == ("application/json", False)
    assert head(content_encoding="gzip").encoded


def test_rate_limits() -> None:
    assert head(server="x").rate_limits is None
    assert head(
        x_ratelimit_limit_requests="100",
        x_ratelimit_remaining_requests="-1",
        x_ratelimit_reset_requests="1m0.5s",
        x_ratelimit_limit_tokens="many",
        x_ratelimit_remaining_tokens="",
        x_ratelimit_reset_tokens="20ms",
    ).rate_limits == {
        "limit_requests": 100.0,
        "remaining_requests": 0.0,
        "reset_requests": 60.5,
        "reset_tokens": 0.02,
    }
    assert head(
        anthropic_ratelimit_tokens_limit="5",
        anthropic_ratelimit_tokens_reset="2023-11-14T22:13:30Z",
        anthropic_ratelimit_requests_reset="tomorrow",
        x_ratelimit_reset_tokens="",
    ).rate_limits == {"limit_tokens": 5.0, "reset_tokens": 10.0}
    assert head(x_ratelimit_reset_requests="12").rate_limits == {"reset_requests": 12.0}


def test_an_outcome_shows_no_body() -> None:
    outcome = Outcome(started_at=NOW, latency_s=0.25, status=200, body=b"secret", request_id="r")
    assert repr(outcome) == "<Outcome 200, 0.250 s, 6 bytes>"
    assert repr(Outcome(started_at=NOW, error="timeout")) == "<Outcome timeout, 0.000 s, no body>"


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        (None, None),
        ({}, None),
        ([1], None),
        ("many", None),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 20,
                "total_tokens": 31,
                "completion_tokens_details": {"reasoning_tokens": 5},
                "prompt_tokens_details": {"cached_tokens": 4},
            },
            Usage(10, 20, 5, 4, 31),
        ),
        (
            {"input_tokens": 10, "output_tokens": 20, "output_tokens_details": {"reasoning_tokens": 2}},
            Usage(10, 20, 2, 0, 30),
        ),
        (
            {"input_tokens": 10, "output_tokens": 2, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 4},
            Usage(17, 2, 0, 3, 19),
        ),
        (
            {
                "prompt_tokens": "10",
                "completion_tokens": -1,
                "total_tokens": True,
                "completion_tokens_details": None,
                "prompt_tokens_details": {"cached_tokens": 10**30},
            },
            Usage(),
        ),
        ({"prompt_tokens": 2.0, "completion_tokens": None}, Usage(2, 0, 0, 0, 2)),
    ],
)
def test_usage(usage: Any, read: Usage | None) -> None:
    assert read_usage(json.dumps(usage).encode()) == read
    body = {"id": "x", "usage": usage, "choices": [{"message": {"content": "hi"}}]}
    assert read_answer(CHAT, json.dumps(body).encode()).usage == read
    message = {"id": "x", "usage": usage, "content": [{"type": "text", "text": "hi"}]}
    assert read_answer(MESSAGES, json.dumps(message).encode()).usage == read
    assert read_answer(CHAT, json.dumps({"usage": usage}).encode()).usage == read


def test_usage_that_is_not_json() -> None:
    assert read_usage(b"{nonsense") is None
    assert read_usage(b"") is None


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"5", b"<html>", b'{"choices":[]}', b'{"choices":[{}]}', b'{"choices":[{"message":"x"}]}',
        b'{"choices":{}}', b'{"choices":[{"message":{"content":"cut', b'{"choices":[{"message":{"content":"\xff"}}]}',
        b"[" * 10_000, b'{"error":{}}', b'{"error":null}',
    ],
)  # fmt: skip
def test_no_answer(body: bytes) -> None:
    for endpoint in (CHAT, MESSAGES):
        assert read_answer(endpoint, body) == Answer()


@pytest.mark.parametrize(
    ("error", "read"),
    [
        (
            {"code": "429", "message": "Too many requests", "type": "limitation"},
            UpstreamError(429, "Too many requests"),
        ),
        ({"code": 503}, UpstreamError(503, "")),
        ({"code": "busy", "status": 500, "message": 5}, UpstreamError(500, "")),
        ({"code": 200}, UpstreamError(None, "")),
        ({"code": [1], "type": "nonsense"}, UpstreamError(None, "")),
        ({"type": "overloaded_error", "message": "m"}, UpstreamError(529, "m")),
        ("Connection refused", UpstreamError(None, "Connection refused")),
    ],
)
def test_error_objects(error: Any, read: UpstreamError) -> None:
    for endpoint in (CHAT, MESSAGES):
        body = json.dumps({"id": "x", "type": "error", "error": error}).encode()
        assert read_answer(endpoint, body) == Answer(id="x", error=read)


def test_an_answer_beside_an_error_is_an_answer() -> None:
    body = {"id": 5, "error": {"code": 500}, "choices": [{"message": {"content": "hi"}, "finish_reason": None}]}
    assert read_answer(CHAT, json.dumps(body).encode()) == Answer(well_formed=True, has_content=True)
