"""Stored results and the output lines that are made of them."""

from __future__ import annotations

import json
import zlib
from typing import Any

import msgspec
import pytest

from jobs.requests import CHAT
from jobs.results import (
    GZIP,
    About,
    Attempt,
    Failure,
    StoredResult,
    Usage,
    decode_result,
    error_line,
    failure_payload,
    one_line,
    output_line,
    success_payload,
)

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
def test_a_success_comes_back_as_it_came(compress: bool) -> None:
    payload = success_payload("b-0", BODY, about(), compress)
    assert payload.startswith(GZIP) is compress
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
        GZIP + zlib.compress(b"[]"),
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
    assert found["response"] == {"status_code": 400, "request_id": "req-1", "body": {"error": {"message": "no"}}}
    assert found["error"] is None


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
    [("cancelled", "batch_cancelled", "was cancelled"), ("expired", "batch_expired", "before the batch expired")],
)
def test_the_line_of_a_revoked_job(why: str, code: str, text: str) -> None:
    stored = decode_result(REVOKED % why.encode())
    assert stored.status == "REVOKED"
    found = line(stored)
    assert found["response"] is None
    assert found["error"]["code"] == code
    assert text in found["error"]["message"]


def test_the_line_of_a_result_that_is_no_longer_kept() -> None:
    found = line(None)
    assert (found["response"], found["error"]["code"]) == (None, "result_expired")


def test_the_line_of_something_that_was_never_a_job() -> None:
    assert json.loads(error_line("7", "c", "invalid_request", "no")) == {
        "id": "batch_req_7",
        "custom_id": "c",
        "response": None,
        "error": {"code": "invalid_request", "message": "no"},
    }


@pytest.mark.parametrize("raw", [b'{"a":1}', b'{"a":\n1}', b'{\r\n"a"\r:"x\\n\\r"\n}'])
def test_json_in_one_line_means_the_same(raw: bytes) -> None:
    found = one_line(raw)
    assert not {b"\n"[0], b"\r"[0]} & set(found)
    assert json.loads(found) == json.loads(raw)
