"""The verdict table, row by row, and the wait before the next attempt."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from worker.answers import read_answer
from worker.outcome import Outcome
from worker.verdict import TABLE, Kind, Policy, Verdict, backoff, classify

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"


def outcome(status: int | None, body: object = None, error: str | None = None, sent: bool = True) -> Outcome:
    raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    return Outcome(started_at=0.0, status=status, body=raw, error=error, sent=sent)


def chat(message: dict[str, Any], finish: str | None = "stop", **more: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "message": message, "finish_reason": finish, **more}], "usage": {}}


def message(*blocks: dict[str, Any], stop: str | None = "end_turn") -> dict[str, Any]:
    return {"id": "m", "type": "message", "content": list(blocks), "stop_reason": stop}


TOOL = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]

GOOD_CHATS = [
    chat({"content": "hi"}),
    chat({"content": "hi", "reasoning_content": "hm"}, "length"),
    chat({"content": "hi"}, None),
    chat({"content": "cut by the filter"}, "content_filter"),
    chat({"content": None, "tool_calls": TOOL}, "tool_calls"),
    chat({"content": "", "function_call": {"name": "f"}}),
    chat({"content": None, "refusal": "I will not."}),
    chat({"content": [{"type": "text", "text": "hi"}]}),
    chat({"content": "\n"}),
    chat({"content": " " * 300, "reasoning_content": "long enough to be no accident"}),
    {"choices": [{"message": {"content": "only what is needed"}}]},
]
EMPTY_CHATS = [
    chat({"content": "", "reasoning_content": "hm"}),
    chat({"content": None, "reasoning_content": "hm"}),
    chat({"content": "\n\n", "reasoning_content": "hm"}),
    chat({"reasoning_content": "hm"}, "length"),
    chat({"content": "", "tool_calls": []}, "length"),
    chat({}),
]
FILTERED_CHATS = [chat({"content": ""}, "content_filter"), chat({}, "stop", native_finish_reason="content_filter")]
DEGENERATE_CHATS = [
    chat({"content": "la la la"}, "repetition_truncation"),
    chat({"content": "la la la"}, "stop", native_finish_reason="repetition_truncation"),
    chat({"content": "", "reasoning_content": "la la"}, "repetition_truncation"),
]
TEXT = {"type": "text", "text": "hi"}
THINKING = {"type": "thinking", "thinking": "hm", "signature": "s"}
GOOD_MESSAGES = [
    message(TEXT),
    message(TEXT, THINKING),
    message(THINKING, {"type": "tool_use", "id": "t", "name": "f", "input": {}}, stop="tool_use"),
]
EMPTY_MESSAGES = [
    message(),
    message(THINKING),
    message({"type": "text", "text": " \n"}, THINKING),
    message({"type": "redacted_thinking", "data": "x"}, {"type": "text"}),
    message({"type": "text", "text": ""}, stop="max_tokens"),
]

ANSWERS = [
    *((CHAT, body, Verdict(Kind.SUCCEEDED, "succeeded")) for body in GOOD_CHATS),
    *((CHAT, body, Verdict(Kind.RETRY, "empty_answer", True)) for body in EMPTY_CHATS),
    *((CHAT, body, Verdict(Kind.FAILED, "content_filter", True)) for body in FILTERED_CHATS),
    *((CHAT, body, Verdict(Kind.RETRY, "degenerate_answer", True)) for body in DEGENERATE_CHATS),
    *((MESSAGES, body, Verdict(Kind.SUCCEEDED, "succeeded")) for body in GOOD_MESSAGES),
    *((MESSAGES, body, Verdict(Kind.RETRY, "empty_answer", True)) for body in EMPTY_MESSAGES),
    (MESSAGES, message(stop="refusal"), Verdict(Kind.FAILED, "content_filter", True)),
    (MESSAGES, message(TEXT, stop="repetition_truncation"), Verdict(Kind.RETRY, "degenerate_answer", True)),
    (MESSAGES, GOOD_CHATS[0], Verdict(Kind.RETRY, "invalid_response", True)),
    (CHAT, GOOD_MESSAGES[0], Verdict(Kind.RETRY, "invalid_response", True)),
]


@pytest.mark.parametrize(("endpoint", "body", "verdict"), ANSWERS)
def test_answers(endpoint: str, body: dict[str, Any], verdict: Verdict) -> None:
    seen = outcome(200, body)
    assert classify(seen, endpoint) == verdict
    seen.answer = read_answer(endpoint, seen.body or b"")
    assert classify(seen, endpoint) == verdict


@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html>ok</html>", b'{"id":"c","choices":[{"message":{"content":"cut', b"null", b"[]", b'{"choices":[]}',
        b'{"choices":[{"message":null}]}', b'{"choices":[{"message":{"content":"\xff"}}]}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [200, 202])
def test_no_answer_at_all(status: int, body: bytes) -> None:
    assert classify(outcome(status, body), CHAT) == Verdict(Kind.RETRY, "invalid_response", True)


def test_no_content() -> None:
    assert classify(outcome(204), CHAT) == Verdict(Kind.RETRY, "invalid_response", True)


REFUSED = {"error": {"code": "400", "message": "finishConnect(..) failed: Connection refused"}}

STATUSES = [
    (301, None, Kind.FAILED, "http_301", False),
    (302, None, Kind.FAILED, "http_302", False),
    (400, None, Kind.FAILED, "http_400", False),
    (400, {"error": {"message": "temperature is over 1.5"}}, Kind.FAILED, "http_400", False),
    (400, REFUSED, Kind.RETRY, "backend_refused", False),
    (400, b"CONNECTION REFUSED", Kind.RETRY, "backend_refused", False),
    (400, b"finishConnect", Kind.RETRY, "backend_refused", False),
    (401, None, Kind.GATE, "key_refused", False),
    (402, {"error": {"message": "Insufficient account funds"}}, Kind.GATE, "payment_required", False),
    (403, None, Kind.GATE, "forbidden", False),
    (404, REFUSED, Kind.FAILED, "http_404", False),
    (408, None, Kind.RETRY, "http_408", False),
    (409, None, Kind.RETRY, "http_409", False),
    (413, None, Kind.FAILED, "http_413", False),
    (421, None, Kind.FAILED, "content_filter", False),
    (422, None, Kind.FAILED, "http_422", False),
    (425, None, Kind.RETRY, "http_425", False),
    (429, {"error": {"code": "429"}}, Kind.REFUSED, "rate_limited", False),
    (500, None, Kind.RETRY, "http_500", False),
    (502, b"<html>", Kind.RETRY, "http_502", False),
    (503, None, Kind.RETRY, "http_503", False),
    (504, None, Kind.RETRY, "http_504", True),
    (524, None, Kind.RETRY, "http_524", True),
    (529, None, Kind.RETRY, "http_529", False),
]


@pytest.mark.parametrize(("status", "body", "kind", "code", "maybe_billed"), STATUSES)
@pytest.mark.parametrize("endpoint", [CHAT, MESSAGES])
def test_statuses(status: int, body: object, kind: Kind, code: str, maybe_billed: bool, endpoint: str) -> None:
    assert classify(outcome(status, body), endpoint) == Verdict(kind, code, maybe_billed)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        ({"code": "429", "message": "Too many requests"}, Kind.REFUSED, "rate_limited"),
        ({"code": "400", "message": "bad"}, Kind.FAILED, "http_400"),
        (REFUSED["error"], Kind.RETRY, "backend_refused"),
        ({"code": 401}, Kind.GATE, "key_refused"),
        ({"type": "billing_error"}, Kind.GATE, "payment_required"),
        ({"code": 421}, Kind.FAILED, "content_filter"),
        ({"code": "500"}, Kind.RETRY, "http_500"),
        ({"type": "overloaded_error"}, Kind.RETRY, "http_529"),
        ({"code": "busy"}, Kind.RETRY, "upstream_error"),
        ("Connection refused", Kind.RETRY, "upstream_error"),
    ],
)
def test_an_error_object_inside_200(error: object, kind: Kind, code: str) -> None:
    body = {"error": error}
    assert classify(outcome(200, body), CHAT) == Verdict(kind, code, True)
    assert classify(outcome(200, body), MESSAGES) == Verdict(kind, code, True)


@pytest.mark.parametrize(
    "error", ["connect_error", "connect_timeout", "timeout", "idle_timeout", "connection_lost", "stream_cut", "aborted"]
)
def test_no_whole_response(error: str) -> None:
    assert classify(outcome(None, error=error, sent=False), CHAT) == Verdict(Kind.RETRY, error, False)
    assert classify(outcome(None, error=error), CHAT) == Verdict(Kind.RETRY, error, True)
    # What had come before the cut, however good it looks, is no answer.
    assert classify(outcome(200, GOOD_CHATS[0], error), CHAT) == Verdict(Kind.RETRY, error, True)


def test_an_answer_without_end_is_not_bought_again() -> None:
    assert classify(outcome(200, error="too_large"), CHAT) == Verdict(Kind.FAILED, "too_large", True)


def test_policy() -> None:
    lenient = Policy(extra_retryable=frozenset({404, 403, 429}), bad_answers=frozenset())
    assert classify(outcome(404), CHAT, lenient) == Verdict(Kind.RETRY, "http_404")
    assert classify(outcome(403), CHAT, lenient) == Verdict(Kind.RETRY, "http_403")
    assert classify(outcome(429), CHAT, lenient).kind is Kind.REFUSED
    for body in (*EMPTY_CHATS, *DEGENERATE_CHATS):
        assert classify(outcome(200, body), CHAT, lenient).kind is Kind.SUCCEEDED
    strict = Policy(degenerate_finish=frozenset({"length"}))
    assert classify(outcome(200, GOOD_CHATS[1]), CHAT, strict).code == "degenerate_answer"


def test_every_row_of_the_table_is_met_above() -> None:
    answers = {(verdict.kind, verdict.code) for _, _, verdict in ANSWERS}
    statuses = {(kind, code) for _, _, kind, code, _ in STATUSES}
    others = {
        (Kind.FAILED, "{error}"),
        (Kind.RETRY, "{error}"),
        (Kind.RETRY, "upstream_error"),
    }
    met = answers | statuses | others
    for row in TABLE:
        assert any(
            kind is row.kind and code in (row.code, row.code.format(error="", status=code[5:])) for kind, code in met
        )


def test_backoff_is_full_jitter() -> None:
    assert [backoff(n, lambda: 1.0) for n in (1, 2, 3, 8, 9, 10_000)] == [0.5, 1.0, 2.0, 60.0, 60.0, 60.0]
    assert backoff(5, lambda: 0.0) == 0.0
    assert backoff(3, lambda: 0.5, None, base_s=1.0, cap_s=3.0) == 1.5
    assert backoff(0, lambda: 1.0) == 0.5


def test_backoff_never_undercuts_a_retry_after() -> None:
    rng = random.Random(1)
    waits = [backoff(attempt, rng.random, 30.0) for attempt in range(1, 50)]
    assert min(waits) >= 30.0
    assert max(waits) <= 90.0
    assert len(set(waits)) == len(waits)
