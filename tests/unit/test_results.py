"""Stored results and the output lines that are made of them."""

from __future__ import annotations

import json
import zlib
from typing import Any

import msgspec
import pytest
from anthropic.types.messages import MessageBatchIndividualResponse

from jobs.requests import CHAT
from jobs.results import (
    GZIP,
    ZLIB,
    About,
    Attempt,
    Failure,
    StoredResult,
    Usage,
    decode_result,
    error_line,
    failure_payload,
    message_line,
    nameless,
    one_line,
    output_line,
    split,
    success_payload,
    upstream_error,
)
from jobs.states import JobState

USAGE = Usage(3, 2, 1, 0, 5)
BODY = b'{\n "id": "1",\r\n "n": 1.50, "text": "a\\nb"}'
REVOKED = b"""{"status":"REVOKED","result":{"exc_type":"TaskRevokedError","exc_message":["%s"],
"exc_module":"celery.exceptions"},"traceback":null,"children":[],"date_done":null,"task_id":"b-0"}"""


def about(failure: Failure | None = None, status: int | None = 200) -> About:
    attempt = Attempt(at=1.0, latency_s=0.5, verdict="ok", account="a", status=status, usage=USAGE, maybe_billed=True)
    return About("c0", CHAT, USAGE, [attempt], status, "req-1", failure)


def line(stored: StoredResult | None) -> Any:
    raw = output_line("b-0", "c0", stored)
    assert raw.endswith(b"\n")
    assert raw.count(b"\n") == 1
    return json.loads(raw)


def failed(failure: Failure) -> StoredResult:
    return decode_result(failure_payload("b-0", about(failure, failure.status), True))


def test_usage_adds_up() -> None:
    assert USAGE + USAGE + Usage() == Usage(6, 4, 2, 0, 10)


@pytest.mark.parametrize("compress", [True, False])
def test_parts_are_found_whatever_answers_and_errors_hold(compress: bool) -> None:
    trap = b'{"a":1,"traceback":null,"children":[],"date_done":"x","task_id":"y","mimoq":{}}'
    good = split(success_payload("b-0", trap, about(), compress))
    assert (good.status, good.result, msgspec.json.decode(good.about, type=About)) == ("SUCCESS", trap, about())
    beside = msgspec.structs.replace(about(), error=Failure("bad_request", "no", 400, msgspec.Raw(trap)))
    payload = failure_payload("b-0", beside, compress)
    bad = split(payload)
    stored = decode_result(payload)
    assert (bad.status, bad.result, bad.date_done) == ("FAILURE", bytes(stored.result), stored.date_done)
    assert msgspec.json.decode(bad.about, type=About) == stored.mimoq
    for spoilt in (b"", b"{}", payload[:40], ZLIB + b"no"):
        with pytest.raises(ValueError, match="not one of ours"):
            split(spoilt)


@pytest.mark.parametrize("compress", [True, False])
def test_a_success_comes_back_as_it_came(compress: bool) -> None:
    payload = success_payload("b-0", BODY, about(), compress)
    assert payload.startswith(ZLIB) is compress
    stored = decode_result(payload)
    assert (stored.status, stored.task_id, bytes(stored.result), stored.mimoq) == ("SUCCESS", "b-0", BODY, about())
    assert repr(stored) == "StoredResult('b-0', SUCCESS)"


def test_a_failure_is_an_exception_that_every_reader_has() -> None:
    failure = Failure("content_filter", "no", 421, msgspec.Raw(b'{"error":1}'))
    stored = failed(failure)
    assert json.loads(bytes(stored.result)) == {
        "exc_type": "RuntimeError",
        "exc_message": ["content_filter", 421, "no"],
        "exc_module": "builtins",
    }
    assert stored.mimoq is not None
    assert stored.mimoq.error is not None
    assert bytes(stored.mimoq.error.body) == b'{"error":1}'


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"junk",
        GZIP + b"junk",
        ZLIB + b"junk",
        ZLIB + zlib.compress(b"[]"),
        b'{"status":"\xff"}',
        b"[" * 100_000,
        b'{"result":' + b"[" * 100_000,
    ],
)
def test_what_is_not_ours_is_one_error_that_shows_nothing(payload: bytes) -> None:
    with pytest.raises(ValueError, match=r"^a stored result can't be read: \w+$"):
        decode_result(payload)


def test_the_line_of_an_answer() -> None:
    found = line(decode_result(success_payload("b-0", BODY, about(), False)))
    assert found == {
        "id": "batch_req_b-0",
        "custom_id": "c0",
        "response": {"status_code": 200, "request_id": "req-1", "body": {"id": "1", "n": 1.5, "text": "a\nb"}},
        "error": None,
    }
    assert b'"n": 1.50' in output_line("b-0", None, decode_result(success_payload("b-0", BODY, about(), False)))


def test_the_line_of_an_answer_that_another_wrote() -> None:
    stored = decode_result(b'{"status":"SUCCESS","result":{"x":1},"task_id":"b-0"}')
    assert line(stored)["response"] == {"status_code": 200, "request_id": None, "body": {"x": 1}}


def test_an_error_of_the_upstream_speaks_for_itself() -> None:
    found = line(failed(Failure("bad_request", "no", 400, msgspec.Raw(b'{"error":\n{"message":"no"}}'))))
    error = {"message": "no", "type": None, "param": None, "code": None}
    assert found["response"] == {"status_code": 400, "request_id": "req-1", "body": {"error": error}}
    assert found["error"] is None
    whole = {"message": "no", "type": "t", "param": "p", "code": "c", "more": 1}
    body = json.dumps({"error": whole, "n": 12345678901234567890}).encode()
    told = output_line("b-0", "c0", failed(Failure("bad_request", "no", 400, msgspec.Raw(body))))
    assert body in told


@pytest.mark.parametrize("body", ['"<html>"', "[1]", "5"])
def test_a_body_is_an_object_in_any_case(body: str) -> None:
    found = line(failed(Failure("bad_request", "no", 400, msgspec.Raw(body.encode()))))
    error = {"message": "no", "type": "upstream_error", "param": None, "code": "bad_request"}
    assert (found["response"]["body"], found["error"]) == ({"error": error}, None)
    found = line(failed(Failure("invalid_response", "no JSON", 200, msgspec.Raw(body.encode()))))
    assert (found["response"], found["error"]["code"]) == (None, "invalid_response")


def test_a_bad_answer_has_both() -> None:
    found = line(failed(Failure("empty_answer", "nothing in it", 200, msgspec.Raw(b'{"id":"1"}'))))
    assert found["response"]["body"] == {"id": "1"}
    assert found["error"] == {"code": "empty_answer", "message": "nothing in it"}


def test_a_status_without_a_body_is_told_by_its_error() -> None:
    found = line(failed(Failure("server_error", "the upstream answered 502", 502)))
    assert found["response"] is None
    assert found["error"]["code"] == "server_error"


def test_no_answer_has_no_response() -> None:
    found = line(failed(Failure("timeout", "no answer: timeout")))
    assert (found["response"], found["error"]) == (None, {"code": "timeout", "message": "no answer: timeout"})


@pytest.mark.parametrize(
    ("why", "code", "text"),
    [
        ("cancelled", "batch_cancelled", "This request was not executed because the batch was cancelled."),
        ("expired", "batch_expired", "This request could not be executed before the completion window expired."),
    ],
)
def test_the_line_of_a_revoked_job(why: str, code: str, text: str) -> None:
    stored = decode_result(REVOKED % why.encode())
    assert stored.status == "REVOKED"
    assert (line(stored)["response"], line(stored)["error"]) == (None, {"code": code, "message": text})
    # Where results are elsewhere, its state is known before its result is there.
    early = output_line("b-0", "c0", None, JobState(why))
    assert early == output_line("b-0", "c0", stored)
    assert (nameless(stored), nameless(None), nameless(failed(Failure("x", "y")))) == (True, True, False)


def test_the_line_of_a_result_that_is_no_longer_kept() -> None:
    found = line(None)
    assert (found["response"], found["error"]["code"]) == (None, "result_expired")
    assert output_line("b-0", "c0", None) == output_line("b-0", "c0", None, JobState.SUCCEEDED)


def test_the_line_of_something_that_was_never_a_job() -> None:
    assert json.loads(error_line("7", "c", "invalid_request", "no")) == {
        "id": "batch_req_7",
        "custom_id": "c",
        "response": None,
        "error": {"code": "invalid_request", "message": "no"},
    }


# -- message batches

MESSAGE = (
    b'{"id":"msg_1","type":"message","role":"assistant","model":"m","content":[{"type":"text","text":"hi"}],'
    b'"stop_reason":"end_turn","stop_sequence":null,"usage":{"input_tokens":3,"output_tokens":2},"more":1.50}'
)


def message_result(stored: StoredResult | None, state: JobState | None = None) -> Any:
    """The result of a line, which Anthropic's SDK can read."""
    raw = message_line("c0", stored, state)
    assert raw.endswith(b"\n")
    assert len(raw.decode().splitlines()) == 1
    found = json.loads(raw)
    assert list(found) == ["custom_id", "result"]
    assert found["custom_id"] == "c0"
    MessageBatchIndividualResponse.model_validate_json(raw, strict=True)
    return found["result"]


def errored(failure: Failure) -> tuple[str, str]:
    """Type and message of a failure's error."""
    found = message_result(failed(failure))
    error = found["error"].pop("error")
    assert found == {"type": "errored", "error": {"type": "error", "request_id": "req-1"}}
    return error["type"], error["message"]


def test_a_message_is_passed_on_as_it_came() -> None:
    stored = decode_result(success_payload("b-0", MESSAGE, about(), True))
    assert message_result(stored) == {"type": "succeeded", "message": json.loads(MESSAGE)}
    assert message_line("c0", stored) == b'{"custom_id":"c0","result":{"type":"succeeded","message":%s}}\n' % MESSAGE


def test_an_error_of_anthropics_is_passed_on_without_what_its_type_does_not_name() -> None:
    error = {"type": "rate_limit_error", "message": "no", "more": 1}
    for body in ({"type": "error", "error": error, "request_id": "theirs"}, {"error": error}):
        found = message_result(failed(Failure("rate_limited", "ours", 429, msgspec.Raw(json.dumps(body).encode()))))
        assert found["error"] == {
            "type": "error",
            "error": {"type": "rate_limit_error", "message": "no"},
            "request_id": "req-1",
        }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (402, "billing_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "invalid_request_error"),
        (421, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "api_error"),
        (504, "timeout_error"),
        (529, "overloaded_error"),
    ],
)
def test_any_other_error_has_a_type_by_its_status(status: int, kind: str) -> None:
    body = b'{"error":{"code":"%d","message":"their words","type":"server_busy","param":""}}' % status
    assert errored(Failure("a_code", "ours", status, msgspec.Raw(body))) == (kind, "their words")
    assert errored(Failure("a_code", "ours", status)) == (kind, "a_code: ours")


@pytest.mark.parametrize(
    "body",
    [b"null", b"5", b'"<html>"', b"[]", b'{"error":"no"}', b'{"error":{"type":"api_error","message":[1]}}', b"{}"],
)
def test_an_error_that_says_nothing_readable_is_told_in_our_words(body: bytes) -> None:
    assert errored(Failure("bad_request", "ours", 400, msgspec.Raw(body))) == (
        "invalid_request_error",
        "bad_request: ours",
    )


def test_an_error_whose_type_is_no_text() -> None:
    failure = Failure("x", "ours", 400, msgspec.Raw(b'{"error":{"type":[],"message":"theirs"}}'))
    assert errored(failure) == ("invalid_request_error", "theirs")


def test_no_answer_and_a_bad_answer_are_errors_of_the_api() -> None:
    assert errored(Failure("timeout", "no answer")) == ("api_error", "timeout: no answer")
    body = msgspec.Raw(b'{"error":{"type":"rate_limit_error","message":"in an answer"}}')
    assert errored(Failure("empty_answer", "nothing in it", 200, body)) == ("api_error", "empty_answer: nothing in it")


@pytest.mark.parametrize(("why", "kind"), [("cancelled", "canceled"), ("expired", "expired")])
def test_a_message_that_was_never_asked_for(why: str, kind: str) -> None:
    assert message_result(decode_result(REVOKED % why.encode())) == {"type": kind}
    assert message_result(None, JobState(why)) == {"type": kind}


def test_a_message_that_is_no_longer_kept() -> None:
    found = message_result(None, JobState.SUCCEEDED)
    assert found["error"]["error"]["type"] == "api_error"
    assert "no longer kept" in found["error"]["error"]["message"]
    assert found["error"]["request_id"] is None
    assert message_result(None) == found


def test_an_upstreams_error_object() -> None:
    body = msgspec.Raw(b'{"error":{"message":"no"},"more":1}')
    assert upstream_error(Failure("x", "y", 400, body)) == {"message": "no"}
    for failure in (Failure("x", "y", 200, body), Failure("x", "y", None, body), Failure("x", "y", 400)):
        assert upstream_error(failure) is None


# -- one line


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1}',
        b'{"a":\n1}',
        b'{\r\n"a"\r:"x\\n\\r"\n}',
        '{"\u2028":"a\u2028b\u2029c\u0085d",\n"e":"\u00e2\u00a8\u0105\u2027\u202a"}'.encode(),
    ],
)
def test_json_in_one_line_means_the_same(raw: bytes) -> None:
    found = one_line(raw)
    assert len(found.decode().splitlines()) == 1
    assert json.loads(found) == json.loads(raw)


def test_every_text_of_a_line_is_on_one_line() -> None:
    breaks = "a\u2028b\u2029c\u0085d\ne\rf\x0bg\x0ch\x1ci\x1dj\x1ek"
    body = msgspec.Raw(json.dumps({"error": {"message": breaks}}, ensure_ascii=False, indent=1).encode())
    for raw in (
        output_line("b-0", breaks, decode_result(success_payload("b-0", bytes(body), about(), True))),
        output_line("b-0", breaks, failed(Failure("code", breaks, 400, body))),
        output_line("b-0", breaks, failed(Failure("code", breaks))),
        message_line(breaks, decode_result(success_payload("b-0", bytes(body), about(), True))),
        message_line(breaks, failed(Failure("code", breaks, 400, body))),
        message_line(breaks, failed(Failure("code", breaks))),
        error_line("b-0", breaks, "code", breaks),
    ):
        assert raw.decode().splitlines() == [raw.decode().removesuffix("\n")]
        assert json.loads(raw)["custom_id"] == breaks
