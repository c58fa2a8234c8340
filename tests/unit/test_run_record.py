"""The record of a job's attempts, and the ends made from it."""

from __future__ import annotations

import json

import msgspec
import pytest

from jobs.leases import Job
from jobs.requests import CHAT, Request
from jobs.results import Usage, decode_result
from worker.answers import read_answer
from worker.outcome import Outcome
from worker.run import MESSAGE_CHARS, MOST_RECORDS, Run, calls_of
from worker.verdict import Kind, Verdict, classify

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
    assert run.back(0.0).attempts == b""
    for status in (429, 401, 500):
        outcome = outcome_of(status, None)
        run.add(outcome, classify(outcome, CHAT), "acct", 1.23456)
    assert run.counted == 1
    again = run_of(attempts=run.back(0.0).attempts)
    assert again.attempts == run.attempts
    assert again.counted == 1
    first = json.loads(run.back(0.0).attempts)[0]
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


@pytest.mark.parametrize(("usage", "marked"), [(b',"usage":{"total_tokens":5}', False), (b"", True)])
def test_a_success_that_does_not_tell_its_usage_is_marked(usage: bytes, marked: bool) -> None:
    run = run_of()
    outcome = outcome_of(200, b'{"choices":[{"message":{"content":"hi"}}]%s}' % usage)
    run.add(outcome, classify(outcome, CHAT), "acct", 0.0)
    assert [attempt.maybe_billed for attempt in run.attempts] == [marked]


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


def test_an_answer_that_broke_off_says_so() -> None:
    run, outcome = run_of(), Outcome(started_at=0.0, status=200, error="idle_timeout", body=b'{"choices":[]}')
    about = decode_result(run.end(outcome, classify(outcome, CHAT), False).payload).mimoq
    assert about is not None
    assert about.error is not None
    assert (about.error.message, about.error.status) == ("no whole answer: idle_timeout", 200)


def test_failure_without_a_response() -> None:
    run, outcome = run_of(), Outcome(started_at=0.0, error="connect_error")
    verdict = classify(outcome, CHAT)
    run.add(outcome, verdict, "acct", 0.0)
    about = decode_result(run.end(outcome, verdict, False).payload).mimoq
    assert about is not None
    assert about.error is not None
    assert (about.error.message, about.error.status) == ("no answer: connect_error", None)
    assert bytes(about.error.body) == b"null"


# -- refusals, and records of jobs that wait for hours


def attempt(status: int, usage: Usage | None = None, maybe_billed: bool = False) -> tuple[Outcome, Verdict]:
    outcome = Outcome(started_at=1.0, status=status, usage=usage)
    return outcome, msgspec.structs.replace(classify(outcome, CHAT), maybe_billed=maybe_billed)


def tried(*statuses: int) -> Run:
    run = run_of()
    for status in statuses:
        run.add(*attempt(status), "acct", 0.0)
    return run


@pytest.mark.parametrize(
    ("statuses", "refusals"),
    [((), 0), ((500,), 0), ((429,), 1), ((429, 429, 500), 0), ((429, 500, 429, 429), 2), ((429, 401), 0)],
)
def test_refusals_in_a_row(statuses: tuple[int, ...], refusals: int) -> None:
    run = tried(*statuses)
    assert run.refusals == refusals
    assert run_of(attempts=run.back(0.0).attempts).refusals == refusals


def test_refusals_for_hours_are_folded_and_still_counted() -> None:
    run = tried(503, 402, *[429] * 250)
    assert len(run.attempts) == MOST_RECORDS
    assert [(a.verdict, a.times) for a in run.attempts[:4]] == [
        ("http_503", 1), ("payment_required", 1), ("rate_limited", 153), ("rate_limited", 1),
    ]  # fmt: skip
    assert (run.refusals, run.counted, calls_of(run.attempts)) == (250, 1, 252)
    # As much after a way back, and with the end.
    again = run_of(attempts=run.back(0.0).attempts)
    again.add(*attempt(429), "acct", 0.0)
    assert (len(again.attempts), again.refusals, again.counted) == (MOST_RECORDS, 251, 1)
    outcome = outcome_of(200, ANSWER)
    verdict = classify(outcome, CHAT)
    again.add(outcome, verdict, "acct", 0.0)
    assert again.end(outcome, verdict, True).calls == 2, "those before were told with the way back"
    assert again.refusals == 0


def test_a_folded_record_has_the_firsts_figures_and_the_usage_of_all() -> None:
    run = run_of()
    for at in range(MOST_RECORDS + 3):
        outcome, verdict = attempt(429, Usage(1, 2, 0, 0, 3) if at in (1, 2) else None, at == 2)
        outcome.started_at = float(at)
        run.add(outcome, verdict, f"a{at}", at / 4)
    first, second, *_ = json.loads(run.back(0.0).attempts)
    assert first == {
        "at": 0.0, "latency_s": 0.0, "verdict": "rate_limited", "account": "a0", "status": 429, "times": 4,
        "usage": {"prompt_tokens": 2, "completion_tokens": 4, "reasoning_tokens": 0, "cached_tokens": 0,
                  "total_tokens": 6},
        "wait_s": 0.0, "maybe_billed": True, "counted": False,
    }  # fmt: skip
    assert (second["account"], second["wait_s"]) == ("a4", 1.0)
    assert "times" not in second
    assert run.end(outcome, verdict, False).usage == Usage(2, 4, 0, 0, 6)


def test_only_what_is_alike_and_does_not_count_is_folded() -> None:
    run = tried(500, 500, 429, 402, 402, *[500] * 96)
    assert [(a.verdict, a.times) for a in run.attempts[:5]] == [
        ("http_500", 1), ("http_500", 1), ("rate_limited", 1), ("payment_required", 2), ("http_500", 1),
    ]  # fmt: skip
    run = tried(*[500] * (MOST_RECORDS + 5))
    assert len(run.attempts) == MOST_RECORDS + 5
    run.add(*attempt(429), "acct", 0.0)
    run.add(*attempt(402), "acct", 0.0)
    assert (len(run.attempts), calls_of(run.attempts)) == (MOST_RECORDS + 7, MOST_RECORDS + 7)


def test_refusals_that_take_turns_with_others_are_folded_too() -> None:
    run = tried(*[429, 402, 503, 401] * 4, *[429, 402, 401] * 300, 429, 429)
    assert len(run.attempts) == MOST_RECORDS
    assert (calls_of(run.attempts), run.counted, run.refusals) == (16 + 900 + 2, 4, 2)
    run = tried(429, *[500] * MOST_RECORDS, 429)
    assert run.refusals == 1
    run.add(*attempt(429), "acct", 0.0)
    assert (run.refusals, len(run.attempts)) == (2, MOST_RECORDS + 2)
    run.add(*attempt(402), "acct", 0.0)
    assert (run.attempts[0].times, run.refusals, len(run.attempts)) == (3, 0, MOST_RECORDS + 2)


def test_a_run_shows_nothing_of_its_request() -> None:
    assert "secret" not in repr(run_of(b'{"model":"m","messages":"secret"}', b'[{"at":1,"latency_s":1,"verdict":"v"}]'))
