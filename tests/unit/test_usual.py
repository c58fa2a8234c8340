"""The quick way to judge a request against the slow one: it may leave a body to the schema, never say otherwise."""

from __future__ import annotations

import collections
import enum
import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import requests, usual
from jobs.errors import InvalidRequest
from jobs.requests import CHAT, ENDPOINTS, MESSAGES, Request, check, make_request, parse, parse_again

TEXT = st.text(max_size=5) | st.just('\u2028\x7f\x00"\\/')
NUMBERS = st.sampled_from([0, 1, 2, -2, 1.0, 0.5, 1.5, 1e-7, 131_072, 131_073, 10**30, 1.50001, True, -0.0])
ODD: st.SearchStrategy[Any] = st.sampled_from(
    [None, "", [], {}, "text", ["a"], ["a"] * 5, [1], {"type": "enabled"}, {"type": "x"}, {"a": [[]]}]
)
PARTS = st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"])}, optional={"text": TEXT, "x": ODD})
CONTENT = TEXT | st.lists(PARTS, max_size=2) | ODD
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "other"]), "content": CONTENT},
    optional={"name": TEXT | ODD, "tool_call_id": TEXT | ODD, "x": ODD},
)
FIELDS = sorted(
    {name for shape in usual.SHAPES.values() for name in shape.__struct_fields__} | {"tools", "metadata", "seed"}
)
BODIES = st.builds(
    lambda turns, fields, plain: {**({"messages": turns, "max_tokens": 5} if plain else {"messages": turns}), **fields},
    st.lists(TURNS, max_size=2),
    st.dictionaries(st.sampled_from(FIELDS).filter(lambda name: name != "messages"), NUMBERS | TEXT | ODD, max_size=2),
    st.booleans(),
)
LINES = st.builds(
    lambda body, fields, bare: {**body, **fields} if bare else {"body": body, **fields},
    BODIES,
    st.fixed_dictionaries(
        {},
        optional={
            "custom_id": st.sampled_from(["a", "", "\n", "x" * 600, None, 5]),
            "method": st.sampled_from(["POST", "GET", None]),
            "url": st.sampled_from([*ENDPOINTS, "/v1/other", None]),
            "prompt": TEXT | ODD,
            "beside": ODD,
        },
    ),
    st.booleans(),
)


VALUES: list[Any] = [
    *(None, True, "", "x", [], {}, ["a"], ["a"] * 4, ["a"] * 5, [1], [{}], [{"type": "text", "text": "x"}]),
    *({"type": "enabled"}, {"type": "disabled"}, {"type": "text"}, {"type": "other"}, {"type": "enabled", "x": 1}),
    *(-2.01, -2, -1, -0.01, 0, 0.01, 1, 1.0, 1.01, 1.5, 1.51, 2, 2.01, 3, 131_072, 131_073, 10**30, 0.5),
]


@pytest.fixture(scope="module")
def slow() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def slowly(patch: pytest.MonkeyPatch, work: Any) -> Any:
    """What `work` gives where nothing is usual."""
    with patch.context() as inner:
        for name in ("judge", "take_apart", "encode"):
            inner.setattr(usual, name, lambda *_: None)
        return work()


def came(work: Any) -> Any:
    try:
        return work()
    except InvalidRequest as error:
        return str(error)


def shown(request: Request | str) -> Any:
    return request if isinstance(request, str) else (request.endpoint, request.body, request.custom_id)


@settings(deadline=None)
@given(st.sampled_from(ENDPOINTS), BODIES)
def test_what_is_usual_keeps_every_rule(endpoint: str, body: dict[str, Any]) -> None:
    found = usual.judge(endpoint, json.dumps(body).encode())
    if found is not None:
        assert check(endpoint, body) == []
        assert requests.unknown_fields(endpoint, body) == []
        assert (found.model is not msgspec.UNSET) == ("model" in body)


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_of_every_field_all_that_is_usual_keeps_its_rule(endpoint: str) -> None:
    usually = set()
    for field in usual.SHAPES[endpoint].__struct_fields__:
        for value in VALUES:
            body = {"messages": [USER], "max_tokens": 9} if endpoint == MESSAGES else {"messages": [USER]}
            body[field] = value
            if usual.judge(endpoint, json.dumps(body).encode()) is not None:
                usually.add(field)
                assert check(endpoint, body) == [], body
    assert usually == set(usual.SHAPES[endpoint].__struct_fields__) - {"messages"}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_of_every_message_all_that_is_usual_keeps_its_rule(endpoint: str) -> None:
    for role in ("developer", "system", "user", "assistant", "tool", "other", "", None):
        for content in [*VALUES, [{"type": "text"}], [{"type": "text", "text": "x", "y": 1}], [{"type": "image_url"}]]:
            more: dict[str, Any]
            for more in ({}, {"name": None}, {"name": 1}, {"tool_call_id": "x"}, {"tool_calls": []}):
                body = {"messages": [{"role": role, "content": content, **more}], "max_tokens": 9}
                if endpoint == CHAT:
                    del body["max_tokens"]
                if usual.judge(endpoint, json.dumps(body).encode()) is not None:
                    assert check(endpoint, body) == [], body


@settings(deadline=None)
@given(LINES, st.sampled_from(ENDPOINTS), st.sampled_from([None, "m"]))
def test_a_line_is_read_as_by_the_slow_way(
    slow: pytest.MonkeyPatch, fields: dict[str, Any], endpoint: str, model: str | None
) -> None:
    line = json.dumps(fields, ensure_ascii=False).encode()

    def work() -> Any:
        found = parse(line, endpoint=endpoint, model=model)
        again = parse_again(line, endpoint=endpoint, model=model)
        return shown(found.request), found.unknown, found.ignored, shown(again)

    quick = came(work)
    assert quick == came(lambda: slowly(slow, work))
    assert isinstance(quick, str) or quick[0] == quick[3]


@settings(deadline=None)
@given(LINES, st.sampled_from([*ENDPOINTS, None]), st.sampled_from([None, "m"]), st.sampled_from([None, "mine", ""]))
def test_a_request_from_python_is_made_as_by_the_slow_way(
    slow: pytest.MonkeyPatch, fields: dict[str, Any], endpoint: str | None, model: str | None, custom_id: str | None
) -> None:
    def work() -> Any:
        return shown(came(lambda: make_request(fields, endpoint=endpoint, model=model, custom_id=custom_id)))

    assert work() == slowly(slow, work)


class Word(str):
    """One of a caller's own."""


class Role(enum.StrEnum):
    USER = "user"


class Most(enum.IntEnum):
    SIX = 6


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": (USER,)},
        {"messages": [collections.OrderedDict(USER)]},
        {"messages": [{"role": Role.USER, "content": Word("x")}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": b"x"}]},
        {"messages": [{"role": "user", "content": set()}]},
        {"messages": [{"role": "user", "content": frozenset()}]},
        {"messages": [{"role": "user", "content": ({"type": "text", "text": "x"},)}]},
        {"messages": [USER], "stop": {"a"}},
        {"messages": [USER], "stop": ("a", "b")},
        {"messages": [USER], "temperature": Decimal("0.5")},
        {"messages": [USER], "temperature": float("nan")},
        {"messages": [USER], "temperature": 1e-5},
        {"messages": [USER], "max_completion_tokens": Most.SIX},
        {"messages": [USER], "model": Word("m")},
        {"messages": [USER], 5: "x"},
        {"messages": [USER], "custom_id": Word("a")},
        {"messages": [USER], "body": {"messages": [USER]}},
        {"url": Word(MESSAGES), "body": {"messages": [USER], "max_tokens": 5}},
        {"url": [], "body": {"messages": [USER]}},
        {"prompt": Word("x")},
        {"prompt": "x", "messages": [USER]},
        {"prompt": ["x"]},
        {"prompt": []},
        {"prompt": [{"type": "text", "text": "x"}]},
        {"prompt": "x", "custom_id": "a", "top_p": 1},
    ],
)
def test_odd_values_from_python_are_taken_and_refused_as_ever(slow: pytest.MonkeyPatch, fields: Any) -> None:
    def work() -> Any:
        return shown(came(lambda: make_request(fields, model="m")))

    assert work() == slowly(slow, work)


def test_the_usual_ways_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing here would be tested, and all would be slow."""
    monkeypatch.setattr(requests, "check", None)  # the schema's way
    body = {"messages": [USER], "temperature": 0.2, "max_completion_tokens": 9, "stream": None, "stop": ["a"]}
    turn = {"messages": [USER], "max_tokens": 9, "system": [{"type": "text", "text": "x"}]}
    for endpoint, fields in ((CHAT, body), (MESSAGES, turn)):
        assert usual.encode(endpoint, fields) is not None
        assert parse(json.dumps(fields).encode(), endpoint=endpoint).request.endpoint == endpoint
        line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": fields}
        assert usual.take_apart(json.dumps(line).encode()) is not None
        assert make_request(line, model=None).endpoint == endpoint
    assert parse(b'{"prompt":"x"}').request.body == make_request("x", model=None).body
