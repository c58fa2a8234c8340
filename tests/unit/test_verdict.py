"""The verdict table, row by row, and the wait before the next attempt."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from jobs.leases import Job
from jobs.requests import CHAT, MESSAGES, Request
from jobs.results import StoredResult, Usage, decode_result
from jobs.settings import load_settings
from worker.answers import read_answer
from worker.outcome import Outcome
from worker.run import Run
from worker.upstream import Upstream
from worker.verdict import DEFAULT, TABLE, Kind, Policy, Verdict, backoff, classify


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
        b'{"id":"m","type":"message","content":[{"type":"text","text":"cut', b'{"content":null}', b'{"content":"hi"}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("endpoint", [CHAT, MESSAGES])
@pytest.mark.parametrize("status", [200, 202])
def test_no_answer_at_all(status: int, endpoint: str, body: bytes) -> None:
    assert classify(outcome(status, body), endpoint) == Verdict(Kind.RETRY, "invalid_response", True)


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


# -- what settings choose


def policy(**overrides: str) -> Policy:
    return Policy.of(load_settings(**overrides))


def test_the_settings_defaults_are_the_policys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert policy() == Policy() == DEFAULT
    monkeypatch.setenv("MIMOQ_RETRY_STATUSES", "418")
    assert policy() == Policy(extra_retryable=frozenset({418}))


@pytest.mark.parametrize("endpoint", [CHAT, MESSAGES])
def test_retry_statuses(endpoint: str) -> None:
    chosen = policy(retry_statuses="404, 421,402,403,302,429,504")
    for status in (404, 421, 402, 403, 302):
        assert classify(outcome(status, {"error": {}}), endpoint, chosen) == Verdict(Kind.RETRY, f"http_{status}")
        assert classify(outcome(status), endpoint).kind is not Kind.RETRY
    # Inside a 2xx answer it is the same, but for the bill.
    inside = outcome(200, {"error": {"type": "billing_error", "message": "slow down"}})
    assert classify(inside, endpoint, chosen) == Verdict(Kind.RETRY, "http_402", True)
    # What they do not touch.
    assert classify(outcome(429), endpoint, chosen) == Verdict(Kind.REFUSED, "rate_limited")
    assert classify(outcome(504), endpoint, chosen) == Verdict(Kind.RETRY, "http_504", True)
    assert classify(outcome(401), endpoint, chosen).kind is Kind.GATE
    assert classify(outcome(413), endpoint, chosen).kind is Kind.FAILED


def test_a_good_answer_is_none_to_retry() -> None:
    assert classify(outcome(200, GOOD_CHATS[0]), CHAT, policy(retry_statuses="200")).kind is Kind.SUCCEEDED


REPEATED = [(CHAT, DEGENERATE_CHATS[0]), (MESSAGES, message(TEXT, stop="repetition_truncation"))]
THOUGHT = [(CHAT, EMPTY_CHATS[0]), (MESSAGES, EMPTY_MESSAGES[1])]
BOTH = [(CHAT, DEGENERATE_CHATS[2]), (MESSAGES, message(THINKING, stop="repetition_truncation"))]


@pytest.mark.parametrize(
    ("bad", "repeated", "thought", "both"),
    [
        ("none", "succeeded", "succeeded", "succeeded"),
        ("empty_answer", "succeeded", "empty_answer", "empty_answer"),
        ("degenerate_answer", "degenerate_answer", "succeeded", "degenerate_answer"),
        ("empty_answer,degenerate_answer", "degenerate_answer", "empty_answer", "degenerate_answer"),
    ],
)
def test_bad_answers(bad: str, repeated: str, thought: str, both: str) -> None:
    chosen = policy(bad_answers=bad)
    for answers, code in ((REPEATED, repeated), (THOUGHT, thought), (BOTH, both)):
        for endpoint, body in answers:
            verdict = classify(outcome(200, body), endpoint, chosen)
            assert verdict.code == code
            assert verdict.maybe_billed is (verdict.kind is Kind.RETRY)


def test_degenerate_finish_reasons() -> None:
    cut = [(CHAT, GOOD_CHATS[1]), (MESSAGES, message(TEXT, stop="max_tokens"))]
    chosen = policy(degenerate_finish_reasons="length,max_tokens")
    for endpoint, body in cut:
        assert classify(outcome(200, body), endpoint, chosen) == Verdict(Kind.RETRY, "degenerate_answer", True)
        assert classify(outcome(200, body), endpoint).kind is Kind.SUCCEEDED
    for endpoint, body in REPEATED:
        assert classify(outcome(200, body), endpoint, chosen).kind is Kind.SUCCEEDED
        assert classify(outcome(200, body), endpoint, policy(degenerate_finish_reasons="none")).kind is Kind.SUCCEEDED


# -- bad answers from the wire to the stored record

TOLD = {
    CHAT: {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    MESSAGES: {"input_tokens": 3, "output_tokens": 4},
}
USAGE = Usage(3, 4, 0, 0, 7)
CHUNKS: dict[str, dict[str, list[object]]] = {
    CHAT: {
        "thinking": [{"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]}],
        "text": [{"id": "r", "choices": [{"index": 0, "delta": {"content": "la"}}]}],
        "told": [{"choices": [], "usage": TOLD[CHAT]}],
        "stopped": [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}],
        "repeated": [{"choices": [{"index": 0, "delta": {}, "finish_reason": "repetition_truncation"}]}],
    },
    MESSAGES: {
        "thinking": [
            {"type": "message_start", "message": {"id": "r", "type": "message", "content": []}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
        ],
        "text": [
            {"type": "message_start", "message": {"id": "r", "type": "message", "content": []}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "la"}},
        ],
        "told": [{"type": "message_delta", "delta": {}, "usage": TOLD[MESSAGES]}],
        "stopped": [{"type": "message_delta", "delta": {"stop_reason": "end_turn"}}],
        "repeated": [{"type": "message_delta", "delta": {"stop_reason": "repetition_truncation"}}],
    },
}
ERROR: list[object] = [{"type": "error", "error": {"type": "api_error", "code": "500", "message": "broke"}}]


def stream(endpoint: str, *names: str) -> bytes:
    chunks = {**CHUNKS[endpoint], "error": ERROR}
    return b"".join(b"data: %s\n\n" % json.dumps(event).encode() for name in names for event in chunks[name])


def ended(endpoint: str, body: bytes, kind: str, chosen: Policy = DEFAULT) -> tuple[Verdict, StoredResult, Run]:
    """The last attempt of a job whose calls are all answered so, as it is stored."""
    response = httpx.Response(200, content=body, headers={"content-type": kind})
    upstream = Upstream(load_settings(base_url="https://host"), httpx.MockTransport(lambda _: response))
    seen = asyncio.run(upstream.call(endpoint, b'{"stream":true}'))
    verdict = classify(seen, endpoint, chosen)
    run = Run.of(Job("b", 0, "t", Request(endpoint, b"{}", None), b"", 0, None, 60), "m")
    for _ in range(2):
        run.add(seen, verdict, "acct", 0.0)
    return verdict, decode_result(run.end(seen, verdict, compress=False).payload), run


@pytest.mark.parametrize("endpoint", [CHAT, MESSAGES])
@pytest.mark.parametrize(
    ("events", "code", "used", "kept"),
    [
        (("thinking", "told", "stopped"), "empty_answer", True, b"hm"),
        (("text", "told", "repeated"), "degenerate_answer", True, b"la"),
        (("thinking", "told", "repeated"), "degenerate_answer", True, b"hm"),
        (("text", "told"), "stream_cut", True, b"la"),
        (("text",), "stream_cut", False, b"la"),
        ((), "stream_cut", False, b"{"),
        (("text", "error"), "http_500", False, b"broke"),
        (("text", "told", "error"), "http_500", True, b"broke"),
        (("error",), "http_500", False, b"broke"),
    ],
)
def test_a_bad_stream(endpoint: str, events: tuple[str, ...], code: str, used: bool, kept: bytes) -> None:
    verdict, stored, run = ended(endpoint, stream(endpoint, *events), "text/event-stream")
    assert verdict == Verdict(Kind.RETRY, code, True)
    assert stored.mimoq is not None
    assert stored.mimoq.error is not None
    assert stored.mimoq.error.code == code
    assert kept in bytes(stored.mimoq.error.body)
    assert stored.mimoq.usage == (USAGE + USAGE if used else Usage())
    assert [(attempt.verdict, attempt.maybe_billed, attempt.counted) for attempt in run.attempts] == [
        (code, True, True)
    ] * 2


@pytest.mark.parametrize("endpoint", [CHAT, MESSAGES])
def test_a_stream_of_nonsense(endpoint: str) -> None:
    verdict, stored, _ = ended(
        endpoint, stream(endpoint, "text", "told") + b"data: <html>\n\ndata: 1\n\n", "text/event-stream"
    )
    assert verdict == Verdict(Kind.RETRY, "invalid_response", True)
    assert stored.mimoq is not None
    assert stored.mimoq.usage == USAGE + USAGE


@pytest.mark.parametrize(
    ("endpoint", "body", "code"),
    [
        (CHAT, {**EMPTY_CHATS[0], "usage": TOLD[CHAT]}, "empty_answer"),
        (CHAT, {**DEGENERATE_CHATS[0], "usage": TOLD[CHAT]}, "degenerate_answer"),
        (CHAT, {"choices": [], "usage": TOLD[CHAT]}, "invalid_response"),
        (CHAT, {"error": {"message": "x"}, "usage": TOLD[CHAT]}, "upstream_error"),
        (MESSAGES, {**message(THINKING), "usage": TOLD[MESSAGES]}, "empty_answer"),
        (MESSAGES, {**message(TEXT, stop="repetition_truncation"), "usage": TOLD[MESSAGES]}, "degenerate_answer"),
        (MESSAGES, {"content": None, "usage": TOLD[MESSAGES]}, "invalid_response"),
        (MESSAGES, {"error": {"message": "x"}, "usage": TOLD[MESSAGES]}, "upstream_error"),
    ],
)
def test_a_bad_answer_in_one_piece(endpoint: str, body: dict[str, Any], code: str) -> None:
    raw = json.dumps(body).encode()
    verdict, stored, run = ended(endpoint, raw, "application/json")
    assert verdict == Verdict(Kind.RETRY, code, True)
    assert stored.mimoq is not None
    assert stored.mimoq.error is not None
    assert bytes(stored.mimoq.error.body) == raw
    assert stored.mimoq.usage == USAGE + USAGE
    assert all(attempt.usage == USAGE and attempt.maybe_billed for attempt in run.attempts)


@pytest.mark.parametrize("endpoint", [CHAT, MESSAGES])
def test_truncated_json_is_kept_as_text(endpoint: str) -> None:
    whole = json.dumps(GOOD_CHATS[0] if endpoint == CHAT else GOOD_MESSAGES[0])
    verdict, stored, _ = ended(endpoint, whole[:-9].encode(), "application/json")
    assert verdict == Verdict(Kind.RETRY, "invalid_response", True)
    assert stored.mimoq is not None
    assert stored.mimoq.error is not None
    assert json.loads(bytes(stored.mimoq.error.body)) == whole[:-9]


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
