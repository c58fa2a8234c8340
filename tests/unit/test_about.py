"""What is stored beside an answer: short where one call did it, and told in full again to whoever reads it."""

from __future__ import annotations

import json
import time
import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.about import SUCCEEDED, About, Attempt, Failure, decode_about, encode_about, with_account
from jobs.requests import CHAT, MESSAGES
from jobs.results import GZIP, decode_result, split, success_payload
from jobs.usage import Usage

USAGE = Usage(146, 237, 92, 0, 383)
CALL = Attempt(1795692080.606, 0.0824, SUCCEEDED, "a3cf7bd4c2f40e42", 200, "r-7", 0.0, USAGE)
PLAIN = About(None, CHAT, USAGE, [CALL], 200, "r-7", model="m")
#: As values were written that said everything.
WHOLE = (
    b'{"custom_id":null,"endpoint":"/v1/chat/completions","usage":{"prompt_tokens":146,"completion_tokens":237,'
    b'"reasoning_tokens":92,"cached_tokens":0,"total_tokens":383},"attempts":[{"at":1795692080.606,"latency_s":0.0824,'
    b'"verdict":"succeeded","account":"a3cf7bd4c2f40e42","status":200,"request_id":"r-7","wait_s":0.0,"usage":'
    b'{"prompt_tokens":146,"completion_tokens":237,"reasoning_tokens":92,"cached_tokens":0,"total_tokens":383}}],'
    b'"status":200,"request_id":"r-7","model":"m"}'
)
counts = st.integers(0, 10**9)
texts = st.text(max_size=20)
usages = st.builds(Usage, counts, counts, counts, counts, counts)


def encode(about: About, late_s: float = 0.01) -> tuple[str, bytes]:
    """Encoded so long after its last call."""
    last = about.attempts[-1] if about.attempts else CALL
    return encode_about(about, last.at + last.latency_s + late_s)


def there_and_back(about: About) -> About:
    ended, raw = encode(about)
    return decode_about(raw, ended)


#: An answer that tells the same.
TOLD = (
    b'{"id":"c","model":"m","usage":{"prompt_tokens":146,"completion_tokens":237,"total_tokens":383,'
    b'"completion_tokens_details":{"reasoning_tokens":92}}}'
)


def test_of_one_call_that_succeeded_what_goes_without_saying_is_left_out() -> None:
    ended, raw = encode_about(PLAIN, CALL.at + 0.1, TOLD, CALL.account)
    assert ended == "2026-11-26T11:21:20.688400"
    assert json.loads(raw) == {"request_id": "r-7", "latency_s": 0.0824}
    found = decode_about(raw, ended, TOLD)
    assert found.attempts == [msgspec.structs.replace(CALL, account="")]
    assert with_account(found, "") == found
    assert with_account(found, CALL.account) == PLAIN == decode_about(WHOLE, ended)


@pytest.mark.parametrize(
    "body", [b"", b"null", b"{}", b"no", b'{"usage":5,"model":5}', b'{"usage":{"prompt_tokens":1},"model":"x"}']
)
def test_what_nothing_else_tells_is_written(body: bytes) -> None:
    ended, raw = encode_about(PLAIN, CALL.at + 0.1, body, "another")
    assert json.loads(raw) == {
        "usage": json.loads(msgspec.json.encode(USAGE)),
        "request_id": "r-7",
        "model": "m",
        "latency_s": 0.0824,
        "account": "a3cf7bd4c2f40e42",
    }
    assert with_account(decode_about(raw, ended, body), "another") == PLAIN
    assert there_and_back(PLAIN) == PLAIN


def test_what_the_body_told_is_no_ones_guess_once_it_is_gone() -> None:
    ended, raw = encode_about(PLAIN, CALL.at + 0.1, TOLD)
    with pytest.raises(ValueError, match="usage"):
        decode_about(raw, ended, b"{}")


@given(
    st.integers(0, 4 * 10**12), st.integers(0, 10**8), st.integers(0, 10**7), usages,
    st.none() | texts, st.sampled_from([CHAT, MESSAGES]), texts, st.none() | texts, texts,
)  # fmt: skip
def test_nothing_of_it_is_lost(
    at_ms: int, latency: int, wait_ms: int, usage: Usage, name: str | None, endpoint: str, account: str,
    request_id: str | None, model: str,
) -> None:  # fmt: skip
    call = Attempt(at_ms / 1000, latency / 10_000, SUCCEEDED, account, 200, request_id, round(wait_ms / 1000, 3), usage)
    about = About(name, endpoint, usage, [call], 200, request_id, None, model)
    ended, raw = encode(about)
    assert "attempts" not in json.loads(raw)
    assert decode_about(raw, ended) == about
    body = json.dumps({"model": model, "usage": {"input_tokens": usage.prompt_tokens, "output_tokens": 3}}).encode()
    ended, raw = encode_about(about, call.at + call.latency_s, body, account)
    assert with_account(decode_about(raw, ended, body), account) == about


@pytest.mark.parametrize("wait_s", [0.0, 0.25])
def test_an_attempt_is_shown_as_it_was_when_it_said_everything(wait_s: float) -> None:
    told = WHOLE.replace(b'"wait_s":0.0', b'"wait_s":%.2f' % wait_s)
    before = decode_about(told, None)
    after = there_and_back(before)
    assert after == before
    assert msgspec.json.encode(after.attempts) == msgspec.json.encode(before.attempts)
    assert b'"wait_s":%g' % wait_s in msgspec.json.encode(after.attempts)


@pytest.mark.parametrize(
    "other",
    [
        {"verdict": "late"}, {"status": 201}, {"status": None}, {"request_id": "another"}, {"usage": None},
        {"usage": Usage(1)}, {"maybe_billed": True}, {"counted": False}, {"times": 2}, {"at": 1795692080.60649},
    ],
)  # fmt: skip
def test_a_call_that_is_otherwise_is_told_whole(other: dict[str, Any]) -> None:
    about = msgspec.structs.replace(PLAIN, attempts=[msgspec.structs.replace(CALL, **other)])
    assert json.loads(encode(about)[1])["attempts"]
    assert there_and_back(about) == about


@pytest.mark.parametrize(
    "other",
    [
        {"attempts": []}, {"attempts": [CALL, CALL]}, {"status": None}, {"status": 201}, {"request_id": None},
        {"usage": Usage(1)}, {"error": Failure("bad_request", "no", 200)},
    ],
)  # fmt: skip
def test_a_job_that_ended_otherwise_is_told_whole(other: dict[str, Any]) -> None:
    about = msgspec.structs.replace(PLAIN, **other)
    assert "attempts" in json.loads(encode(about)[1])
    assert there_and_back(about) == about


@pytest.mark.parametrize("late_s", [60.0, -60.0])
def test_an_end_long_after_the_call_has_a_time_of_its_own(late_s: float) -> None:
    ended, raw = encode(PLAIN, late_s)
    assert ended == ("2026-11-26T11:22:20.688400" if late_s > 0 else "2026-11-26T11:20:20.688400")
    assert json.loads(raw)["attempts"][0]["at"] == CALL.at
    assert decode_about(raw, ended) == PLAIN


def test_no_status_is_made_up_of_what_a_value_left_out() -> None:
    told = decode_about(WHOLE.replace(b',"status":200,"request_id":"r-7","model":"m"', b""), None)
    assert (told.status, told.request_id, told.model, told.attempts) == (None, None, "", [CALL])


@pytest.mark.parametrize("raw", [b"{}", b'{"usage":{}}', b'{"usage":{},"attempts":1}', b'{"attempts":[]}', b"1"])
def test_what_is_not_ours_is_an_error(raw: bytes) -> None:
    with pytest.raises((ValueError, msgspec.MsgspecError)):
        decode_about(raw, None)


def test_a_value_of_an_earlier_day_is_read_as_ever() -> None:
    value = (
        b'{"status":"SUCCESS","result":{"id":1},"traceback":null,"children":[],"date_done":"2026-11-26T11:21:21",'
        b'"task_id":"b-7","mimoq":%s}' % WHOLE
    )
    packed = GZIP + zlib.compress(value, 6)
    stored = decode_result(packed)
    assert (stored.status, stored.task_id, bytes(stored.result)) == ("SUCCESS", "b-7", b'{"id":1}')
    assert (stored.mimoq, stored.date_done, split(packed).about) == (PLAIN, "2026-11-26T11:21:21", WHOLE)


def test_an_answer_costs_little_more_than_its_body() -> None:
    usage = b'{"prompt_tokens":146,"completion_tokens":237,"total_tokens":383,"details":{"reasoning_tokens":92}}'
    text = (
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness"
    )
    body = b'{"id":"c-1","model":"m","choices":[{"message":{"content":"%s"}}],"usage":%s}' % (text.encode(), usage)
    call = msgspec.structs.replace(CALL, at=round(time.time() - CALL.latency_s, 3))
    about = msgspec.structs.replace(PLAIN, attempts=[call])
    packed = success_payload("4e1f6606dcd1d0309f8387b6-12345", body, about, compress=True)
    assert decode_result(packed).mimoq == about
    assert len(packed) - len(zlib.compress(body, 6)) < 230
