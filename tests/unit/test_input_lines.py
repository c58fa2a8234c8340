"""Input files of OpenAI batches: exactly the bad lines are told, in their order and in words that repeat nothing."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import BatchError

from api.openai import lines as input_lines
from api.openai.lines import InputLines, InvalidInput, LineError
from jobs.requests import CHAT, MESSAGES, Request

SECRET = "a prompt nobody may see"
BODY = {"model": "m", "messages": [{"role": "user", "content": SECRET}]}
MISSING = "missing_required_parameter"


def line(custom_id: Any = "c", **more: Any) -> dict[str, Any]:
    """A line; a member that is `...` is left out."""
    members = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": BODY, **more}
    return {name: value for name, value in members.items() if value is not ...}


def body(**more: Any) -> dict[str, Any]:
    return line(body={name: value for name, value in {**BODY, **more}.items() if value is not ...})


def file(*items: Any) -> io.BytesIO:
    """JSON lines; bytes are lines as they are."""
    return io.BytesIO(b"\n".join(item if isinstance(item, bytes) else json.dumps(item).encode() for item in items))


def reader(endpoint: str = CHAT, **more: Any) -> InputLines:
    return InputLines(endpoint, **{"model": "default", "max_requests": 100, "max_line_bytes": 10_000, **more})


def judge(*items: Any, **more: Any) -> tuple[list[Request], list[LineError]]:
    """What is handed out, and what is wrong."""
    found, error = taken(reader(**more), file(*items))
    if error is None:
        return found, []
    assert SECRET not in str(error)
    assert SECRET not in repr(error.errors)
    return found, error.errors


def taken(lines: InputLines, stream: io.BytesIO) -> tuple[list[Request], InvalidInput | None]:
    """What is handed out until the end, or until it raises."""
    found: list[Request] = []
    try:
        found.extend(lines.requests(stream))
    except InvalidInput as error:
        return found, error
    return found, None


def test_good_lines_are_handed_out_byte_for_byte() -> None:
    raw = b'{"messages": [{"role":"user","content":"\\u00e9"}], "top_p":1.0e-1,"model":"m","new": 12345678901234567890}'
    outer = b'\xef\xbb\xbf{"body":%s,"url":"/v1/chat/completions","custom_id":"a","method":"POST"}\r' % raw
    lines = reader()
    assert lines.model == ""
    found = list(lines.requests(file(outer, b"", line("b"), b"  ", b"")))
    assert [(request.custom_id, request.endpoint) for request in found] == [("a", CHAT), ("b", CHAT)]
    assert found[0].body == raw
    assert lines.model == "m"


def test_a_model_is_filled_in() -> None:
    lines = reader()
    (request,) = lines.requests(file(body(model=...)))
    assert json.loads(request.body)["model"] == lines.model == "default"
    lines = reader(model=None)
    (request,) = lines.requests(file(body(model=...)))
    assert "model" not in json.loads(request.body)
    assert lines.model == ""


def test_messages_have_rules_of_their_own() -> None:
    items = [line(url=MESSAGES, body={**BODY, "max_tokens": 9}), line("d", url=MESSAGES)]
    found, errors = judge(*items, endpoint=MESSAGES)
    assert [request.endpoint for request in found] == [MESSAGES]
    assert [(error.line, error.code, error.param) for error in errors] == [(2, MISSING, "body.max_tokens")]


@pytest.mark.parametrize(
    ("item", "code", "param", "says"),
    [
        (b"{", "invalid_json_line", None, "is not JSON"),
        (b"null", "invalid_json_line", None, "is not a JSON object"),
        (b'["' + SECRET.encode() + b'"]', "invalid_json_line", None, "is not a JSON object"),
        (b'{"custom_id":"c"} x', "invalid_json_line", None, "is not JSON (character 19)"),
        (b'{"custom_id":"c\x00"}', "invalid_json_line", None, "NUL"),
        (b"[" * 5000, "invalid_json_line", None, "is not a JSON object"),
        (b'{"a":' + b"[" * 4000 + b"]" * 4000 + b"}", "invalid_json_line", None, "nested too deeply"),
        (line(...), MISSING, "custom_id", "is missing"),
        (line(None), MISSING, "custom_id", "is missing"),
        (line(5), "invalid_custom_id", "custom_id", "must be a string"),
        (line(""), "invalid_custom_id", "custom_id", "has 0 characters"),
        (line("x" * 513), "invalid_custom_id", "custom_id", "has 513 characters"),
        (line("a\u2028b"), "invalid_custom_id", "custom_id", "control characters or line breaks"),
        (json.dumps(line("QQ")).encode().replace(b"QQ", b"\xff"), "invalid_custom_id", "custom_id", "a string"),
        (line(method=...), MISSING, "method", "is missing"),
        (line(method="GET"), "invalid_method", "method", "must be POST"),
        (line(method=None), "invalid_method", "method", "must be POST"),
        (line(method=[SECRET]), "invalid_method", "method", "must be POST"),
        (line(url=...), MISSING, "url", "is missing"),
        (line(url=MESSAGES), "invalid_url", "url", f"must be {CHAT}, the endpoint of the batch"),
        (line(url=SECRET), "invalid_url", "url", f"must be {CHAT}"),
        (line(body=...), MISSING, "body", "is missing"),
        (line(body=None), "invalid_request", "body", "must be an object"),
        (line(body=[BODY]), "invalid_request", "body", "must be an object"),
        (line(body=SECRET), "invalid_request", "body", "must be an object"),
        (body(stream=True), "streaming_unsupported", "body.stream", "not supported in a batch"),
        (body(stream=SECRET), "invalid_request", "body.stream", "true or false"),
        (body(messages=...), MISSING, "body.messages", "is missing"),
        (body(messages=[]), "invalid_request", "body.messages", "is empty"),
        (body(messages=[{"content": SECRET}]), MISSING, "body.messages[0].role", "is missing"),
        (
            body(messages=[{"role": SECRET, "content": ""}]),
            "invalid_request",
            "body.messages[0].role",
            "must be one of",
        ),
        (body(temperature=1.9), "invalid_request", "body.temperature", "1.9 is over 1.5"),
        (body(model=""), "invalid_request", "body.model", "is empty"),
        (body(model=5), "invalid_request", "body.model", "must be a string"),
        (
            json.dumps(body(user="QQ")).encode().replace(b"QQ", b"\xff"),
            "invalid_json_line",
            "body",
            "is not UTF-8",
        ),
        (body(x=json.loads("[" * 200 + "]" * 200)), "invalid_json_line", "body", "nested too deeply"),
        (line(metadata={}), "invalid_request", "metadata", "stands beside custom_id, method, url and body"),
        (line(**{SECRET: 1}), "invalid_request", None, "stands beside"),
        (line(messages=[{"content": SECRET}]), "invalid_request", "messages", "stands beside"),
        (line(body={**BODY, "name": "x" * 20_000}), "line_too_long", None, "is longer than 10,000 bytes"),
    ],
)
def test_a_bad_line(item: Any, code: str, param: str | None, says: str) -> None:
    found, errors = judge(line("first"), item, line("last"))
    assert [request.custom_id for request in found] == ["first"]
    (error,) = errors
    assert (error.code, error.line, error.param) == (code, 2, param)
    assert error.message is not None
    assert says in error.message
    BatchError.model_validate({name: getattr(error, name) for name in LineError.__struct_fields__}, strict=True)


def test_a_line_has_one_error_that_says_all() -> None:
    item = line(..., method="PUT", url="/", body={"messages": [], "stream": True, "temperature": 9}, more=1)
    _, errors = judge(item)
    assert errors == [
        LineError(
            MISSING,
            1,
            "custom_id: is missing; method: must be POST; url: must be /v1/chat/completions, the endpoint of the batch; "
            "body.stream: is not supported in a batch; body.messages: is empty; body.temperature: 9 is over 1.5; "
            "more: stands beside custom_id, method, url and body",
            "custom_id",
        )
    ]


def test_an_id_that_stands_twice_is_told_at_the_later_lines() -> None:
    _, errors = judge(line("a"), line("b"), line("a"), line("b"), line("a"))
    assert [(error.line, error.code, error.param) for error in errors] == [
        (number, "duplicate_custom_id", "custom_id") for number in (3, 4, 5)
    ]


def test_a_bad_line_keeps_its_id() -> None:
    _, errors = judge(line("a", method="GET"), line("a"))
    assert [error.code for error in errors] == ["invalid_method", "duplicate_custom_id"]


def test_one_model_a_file() -> None:
    found, errors = judge(body(model="a"), line("d"), line("e", body={**BODY, "model": "b", "stream": True}))
    assert len(found) == 1
    assert [(error.line, error.code, error.param) for error in errors] == [
        (2, "mismatched_model", "body.model"),
        (3, "streaming_unsupported", "body.stream"),
    ]
    assert "body.model" in str(errors[1].message)


@pytest.mark.parametrize("bad", [body(model="a", top_p=9), line(method="GET", body={**BODY, "model": "a"})])
def test_the_model_of_a_bad_line_is_nobodys(bad: dict[str, Any]) -> None:
    _, errors = judge(bad, line("d"), line("e"))
    assert [error.line for error in errors] == [1]


def test_a_bad_body_is_held_to_the_model_and_may_not_stream_either() -> None:
    _, errors = judge(line("a"), line("d", body={"model": "other", "stream": True}))
    assert (errors[0].code, errors[0].line) == ("streaming_unsupported", 2)
    for name in ("body.stream", "body.model", "body.messages"):
        assert name in str(errors[0].message)


def test_after_a_bad_line_nothing_is_handed_out_and_all_is_judged() -> None:
    items = [line(f"c{number}") for number in range(50)]
    bad = {7: line("x", method="GET"), 8: b"{", 30: line("c1"), 50: line(body={})}
    for number, item in bad.items():
        items[number - 1] = item  # type: ignore[call-overload]
    found, errors = judge(*items)
    assert [request.custom_id for request in found] == [f"c{number}" for number in range(6)]
    assert [error.line for error in errors] == list(bad)


def test_blank_lines_count_as_lines_and_not_as_requests() -> None:
    _, errors = judge(b"", b"\t", line("a"), b"", b"{", max_requests=2)
    assert [error.line for error in errors] == [5]


def test_too_many_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_lines, "MOST_ERRORS", 3)
    _, errors = judge(*[b"{"] * 3)
    assert [error.line for error in errors] == [1, 2, 3]
    _, errors = judge(*[b"{"] * 5)
    assert [error.line for error in errors] == [1, 2, 3, None]
    assert errors[3] == LineError("too_many_errors", None, "and 2 more lines that break a rule", None)


def test_too_many_requests_stop_the_reading() -> None:
    assert len(judge(line("a"), line("b"), max_requests=2)[0]) == 2
    stream = file(line("a"), line("b"), *[line(f"c{number}" + "x" * 400) for number in range(5_000)])
    lines = reader(max_requests=2)
    with pytest.raises(InvalidInput, match=r"^has more than 2 requests$") as caught:
        list(lines.requests(stream))
    assert caught.value.errors == [LineError("too_many_requests", None, "has more than 2 requests", None)]
    assert len(stream.read()) > 1_000_000
    # What is bad among those that may be is told too.
    _, errors = judge(b"{", line("b"), b"{", max_requests=2)
    assert [(error.line, error.code) for error in errors] == [(1, "invalid_json_line"), (None, "too_many_requests")]


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b"\xef\xbb\xbf"])
def test_an_empty_file(content: bytes) -> None:
    with pytest.raises(InvalidInput) as caught:
        list(reader().requests(io.BytesIO(content)))
    assert caught.value.errors == [LineError("empty_file", None, "has no request", None)]


def test_what_came_inline_needs_no_address() -> None:
    short = {"method": ..., "url": ...}
    found, errors = judge(line("a", **short), line("b"), line("c", **short, body=...), line("d", url="/"), lenient=True)
    assert [request.custom_id for request in found] == ["a", "b"]
    assert [(error.line, error.code) for error in errors] == [(3, MISSING), (4, "invalid_url")]


def test_what_is_numbered_already() -> None:
    pretty = json.dumps(line("a"), indent=1).encode()
    lines = reader()
    (request,) = lines.judged([(0, pretty)])
    assert json.loads(request.body) == BODY
    with pytest.raises(InvalidInput) as caught:
        list(reader().judged([(0, pretty), (1, None)]))
    assert [(error.line, error.code) for error in caught.value.errors] == [(1, "line_too_long")]


def test_an_error_is_one_line_for_a_person() -> None:
    with pytest.raises(InvalidInput, match=r"^line 1: is not JSON, it ends too early; and more$"):
        list(reader().requests(file(b"{", b"{")))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MEMBERS = st.sampled_from(["custom_id", "method", "url", "body", "other"])


@given(
    st.lists(
        st.binary(max_size=60)
        | st.dictionaries(MEMBERS, VALUES | st.just(BODY), max_size=5).map(lambda made: json.dumps(made).encode())
        | st.builds(lambda member, value: json.dumps(line(**{member: value})).encode(), MEMBERS, VALUES),
        max_size=6,
    )
)
def test_whatever_comes_is_handed_out_or_told(items: list[bytes]) -> None:
    found, error = taken(reader(max_line_bytes=200), file(*items))
    told = error.errors if error is not None else []
    assert bool(told) is (error is not None)
    assert "\n" not in str(error)
    numbers = [error.line for error in told if error.line is not None]
    assert numbers == sorted(set(numbers))
    if not told:
        assert {request.custom_id for request in found} == {
            json.loads(raw)["custom_id"] for raw in items if raw.strip()
        }
