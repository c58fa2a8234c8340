"""The record of a job's attempts, and the ends made from it."""

from __future__ import annotations

import json

import pytest

from jobs.leases import Job
from jobs.requests import CHAT, Request
from jobs.results import Usage, decode_result
from worker.answers import read_answer
from worker.outcome import Outcome
from worker.run import MESSAGE_CHARS, Run
from worker.verdict import Kind, classify

ANSWER = (
    b'{"choices":[{"message":{"content":"hi"}}],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
)


def run_of(body: bytes = b'{"model":"m"}', attempts: bytes = b"") -> Run:
    return Run.of(Job("b", 4, "t", Request(CHAT, body, "c4"), attempts, 0, None, 60), "default")


def outcome_of(status: int, body: bytes | None) -> Outcome:
    answer = read_answer(CHAT, body or b"") if status == 200 else None
    usage = answer.usage if answer else None
    return Outcome(
        started_at=1.23456, latency_s=0.987654, status=status, body=body, answer=answer, usage=usage, sent=True
    )


@pytest.mark.parametrize(
    ("body", "model", "most"),
    [
        (b'{"model":"m","max_tokens":7}', "m", 7),
        (b'{"max_completion_tokens":8,"max_tokens":7}', "default", 8),
        (b'{"model":""}', "default", None),
        (b'{"model":5}', "default", None),
        (b"not json", "default", None),
        (b'{"model":"\xff"}', "default", None),
    ],
)
def test_what_the_engine_needs_of_a_body(body: bytes, model: str, most: int | None) -> None:
    run = run_of(body)
    assert (run.model, run.most_tokens) == (model, most)


def test_attempts_go_on_where_an_earlier_holder_left_them() -> None:
    run = run_of()
    assert run.attempts_json() == b""
    for status in (429, 401, 500):
        outcome = outcome_of(status, None)
        run.add(outcome, classify(outcome, CHAT), "acct", 1.23456)
    assert run.counted == 1
    again = run_of(attempts=run.attempts_json())
    assert again.attempts == run.attempts
    assert again.counted == 1
    first = json.loads(run.attempts_json())[0]
    assert first["verdict"] == "rate_limited"
    assert (first["at"], first["latency_s"], first["wait_s"], first["status"]) == (1.235, 0.9877, 1.235, 429)


def test_success_sums_the_usage_of_every_call() -> None:
    run = run_of()
    thinking = outcome_of(200, ANSWER.replace(b"content", b"reasoning_content", 1))
    for outcome in (thinking, outcome_of(200, ANSWER)):
        verdict = classify(outcome, CHAT)
        run.add(outcome, verdict, "acct", 0.0)
    assert verdict.kind is Kind.SUCCEEDED
    for compress in (True, False):
        end = run.end(outcome, verdict, compress)
        assert (end.letter, end.calls, end.usage) == ("s", 2, Usage(6, 4, 0, 0, 10))
        stored = decode_result(end.payload)
        assert (stored.status, stored.task_id, bytes(stored.result)) == ("SUCCESS", "b-4", ANSWER)
        assert stored.mimoq is not None
        assert (stored.mimoq.custom_id, stored.mimoq.error) == ("c4", None)


@pytest.mark.parametrize(
    ("status", "body", "message", "kept"),
    [
        (400, b'{"error":{"message":"why"}}', "why", {"error": {"message": "why"}}),
        (400, b'{"error":{"message":"%s"}}' % (b"x" * 900), "x" * MESSAGE_CHARS, None),
        (400, b'{"error":"text"}', "the upstream answered 400", {"error": "text"}),
        (400, b"<html>", "the upstream answered 400", "<html>"),
        (400, b"\xff", "the upstream answered 400", "�"),
        (400, b'{"error":{"message":"\xff"}}', "the upstream answered 400", '{"error":{"message":"�"}}'),
        (400, b"[" * 100_000, "the upstream answered 400", "[" * 100_000),
        (400, b"", "the upstream answered 400", ""),
        (421, b"{}", "the upstream's content filter refused the request or its answer", {}),
    ],
)
def test_failure_keeps_the_body(status: int, body: bytes, message: str, kept: object) -> None:
    run, outcome = run_of(), outcome_of(status, body)
    verdict = classify(outcome, CHAT)
    run.add(outcome, verdict, "acct", 0.0)
    end = run.end(outcome, verdict, True)
    stored = decode_result(end.payload)
    assert (end.letter, stored.status) == ("f", "FAILURE")
    assert stored.mimoq is not None
    error = stored.mimoq.error
    assert error is not None
    assert (error.message, error.status) == (message, status)
    assert error.body is not None
    if kept is not None:
        assert json.loads(bytes(error.body)) == kept


def test_failure_without_a_response() -> None:
    run, outcome = run_of(), Outcome(started_at=0.0, error="connect_error")
    verdict = classify(outcome, CHAT)
    run.add(outcome, verdict, "acct", 0.0)
    about = decode_result(run.end(outcome, verdict, False).payload).mimoq
    assert about is not None
    assert about.error is not None
    assert (about.error.message, about.error.status) == ("no answer: connect_error", None)
    assert bytes(about.error.body) == b"null"


def test_a_run_shows_nothing_of_its_request() -> None:
    assert "secret" not in repr(run_of(b'{"model":"m","messages":"secret"}', b'[{"at":1,"latency_s":1,"verdict":"v"}]'))
