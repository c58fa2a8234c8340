"""The quick way to an output line against the slow one: the same line, or none."""

from __future__ import annotations

import json
import time
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.lines import answer_line
from jobs.requests import CHAT, MESSAGES
from jobs.results import (
    ZLIB,
    About,
    Attempt,
    Failure,
    Usage,
    decode_result,
    failure_payload,
    output_line,
    success_payload,
    unpack,
)

JOB = "0123456789ab-7"
TEXT = st.text(max_size=8) | st.just('a\u2028b\u2029\x85\r\n\\"')
BODIES = st.dictionaries(TEXT, TEXT | st.integers() | st.none(), max_size=3)
USAGE = Usage(3, 4, 0, 0, 7)


def about(custom_id: str | None, request_id: str | None, status: int | None, new: bool = False, **more: Any) -> About:
    """With one call: of old, or one that has just ended, of which less is stored if its status is 200."""
    began_at = round(time.time() - 0.5, 3) if new else 1_700_000_000.25
    call = Attempt(began_at, 0.5, "succeeded", "account", status, request_id, usage=USAGE)
    return About(custom_id, more.pop("endpoint", CHAT), USAGE, [call], status, request_id, **more)


@settings(deadline=None)
@given(
    BODIES,
    st.none() | TEXT,
    st.none() | TEXT,
    st.sampled_from([None, 200, 201]),
    st.sampled_from([CHAT, MESSAGES]),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.booleans(),
)
def test_the_line_of_an_answer_is_the_same(
    body: dict[str, Any],
    custom_id: str | None,
    request_id: str | None,
    status: int | None,
    endpoint: str,
    compress: bool,
    indent: int | None,
    ascii_only: bool,
    new: bool,
) -> None:
    raw = json.dumps(body, indent=indent, ensure_ascii=ascii_only).encode()
    packed = success_payload(JOB, raw, about(custom_id, request_id, status, new, endpoint=endpoint), compress)
    assert (b'"attempts"' in unpack(packed)) is not (new and status == 200)
    assert answer_line(JOB, packed) == output_line(JOB, custom_id, decode_result(packed))


def test_what_an_earlier_version_stored_is_the_same() -> None:
    beside: dict[str, Any] = {
        "custom_id": None,
        "endpoint": CHAT,
        "usage": {},
        "attempts": [],
        "status": 202,
        "request_id": "r",
    }
    value: dict[str, Any] = {
        "status": "SUCCESS",
        "result": {"x": 1},
        "traceback": None,
        "children": [],
        "date_done": None,
    }
    packed = json.dumps({**value, "task_id": JOB, "mimoq": beside}).encode()
    line = answer_line(JOB, packed)
    assert line == output_line(JOB, None, decode_result(packed))
    assert line is not None
    assert json.loads(line)["response"]["status_code"] == 202


FAILED = failure_payload(JOB, about("a", None, 400, error=Failure("refused", "no", 400)), compress=True)
ANSWER = success_payload(JOB, b"{}", about("a", None, 200), compress=True)


@pytest.mark.parametrize(
    "packed",
    [
        None,
        b"",
        b"null",
        ZLIB + b"spoilt",
        ANSWER[:-5],
        ZLIB + zlib.compress(unpack(ANSWER)[:-1]),
        FAILED,
        b'{"status":"SUCCESS","result":{},"task_id":"x"}',
        b'{"status":"REVOKED","result":{},"task_id":"x","mimoq":{"custom_id":"a"}}',
        b'{"status":"SUCCESS","result":{},"task_id":"x","mimoq":{"custom_id":5}}',
    ],
)
def test_what_is_no_answer_is_left_to_the_slow_way(packed: bytes | None) -> None:
    assert answer_line(JOB, packed) is None
