"""Finished responses as streams: what joins the events has the stored response again, whatever is in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.replay import (
    DONE,
    KEEP_ALIVE,
    PIECE_CHARS,
    chat_error_event,
    chat_events,
    messages_error_event,
    messages_events,
)
from worker.sse import ChatJoiner, EventParser, Joiner, MessagesJoiner

USAGE = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16, "completion_tokens_details": {"x": 1}}
LONG = "想一想 🤔👩‍👩‍👧 \u2028\u2029\x85\x0b\r\n\n\0 data: x\n\n" * 40


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    choices = [
        {"index": index, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
        for index, message in enumerate(messages)
    ]
    return {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, **more}


def message(*blocks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": list(blocks),
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 5, "output_tokens": 9},
        **more,
    }


def encoded(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def chunks(body: object, include_usage: bool = True) -> list[dict[str, Any]]:
    *events, last = chat_events(encoded(body), include_usage)
    assert last == DONE
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def deltas(body: object) -> list[dict[str, Any]]:
    return [choice["delta"] for chunk in chunks(body) for choice in chunk["choices"]]


def events(body: object) -> list[tuple[str, dict[str, Any]]]:
    return [(name.decode(), json.loads(data)) for name, data in parsed(messages_events(encoded(body)))]


def parsed(stream: Iterator[bytes]) -> list[tuple[bytes, bytes]]:
    """The names and data of a stream whose every element must be one event and nothing more."""
    found = []
    for event in stream:
        assert event.endswith(b"\n\n")
        [one] = EventParser().feed(event)
        found.append(one)
    return found


def joined(joiner: Joiner, stream: Iterator[bytes]) -> Any:
    for event in stream:
        joiner.feed(KEEP_ALIVE + event)
    body = json.loads(joiner.finish())
    assert (joiner.complete, joiner.done, joiner.error, joiner.invalid) == (True, True, None, False)
    return body


CHATS = {
    "a text": chat({"content": "Grüße"}, usage=USAGE),
    "a long text": chat({"content": LONG}, usage=USAGE),
    "thinking": chat({"content": LONG, "reasoning_content": LONG[::-1]}, usage=USAGE),
    "nulls": chat({"content": None, "reasoning_content": None, "refusal": None, "tool_calls": None}, usage=USAGE),
    "empty": chat({"content": "", "reasoning_content": "", "tool_calls": []}, usage=USAGE),
    "a refusal": chat({"content": None, "refusal": "No. " * 200}, usage=USAGE),
    "tool calls": chat(
        {
            "content": "let me look",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": json.dumps({"q": "ü" * 600})}},
                {"id": "b", "type": "function", "function": {"name": "g", "arguments": ""}, "extra": [1]},
                {"id": "c", "type": "custom", "custom": {"name": "h", "input": "whole"}},
            ],
        },
        usage=USAGE,
    ),
    "several choices": chat({"content": "a" * 600}, {"content": "b", "reasoning_content": "c"}, usage=USAGE),
    "unknown fields": chat(
        {"content": "x", "mood": "happy", "audio": {"data": "AA"}, "annotations": [{"type": "t"}], "score": 2},
        system_fingerprint="fp",
        service_tier=None,
        vendor={"region": ["eu"]},
        usage=USAGE,
    ),
}

MESSAGES = {
    "a text": message({"type": "text", "text": "Grüße"}),
    "a long text": message({"type": "text", "text": LONG}),
    "an empty text": message({"type": "text", "text": ""}),
    "no block": message(),
    "thinking": message(
        {"type": "thinking", "thinking": LONG, "signature": "sig" * 300},
        {"type": "redacted_thinking", "data": "opaque" * 100},
        {"type": "text", "text": "so", "citations": [{"type": "char_location", "cited_text": "a"}, {"type": "b"}]},
    ),
    "thinking without a signature": message(
        {"type": "thinking", "thinking": "hm"},
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking", "thinking": "hm", "signature": None},
        {"type": "text", "text": "so", "citations": None},
    ),
    "tools": message(
        {"type": "tool_use", "id": "t", "name": "f", "input": {"q": ["ß" * 600, None, 1.5, {}]}},
        {"type": "tool_use", "id": "u", "name": "g", "input": {}},
        {"type": "tool_use", "id": "v", "name": "g", "input": '{"cut by the token lim'},
        {"type": "server_tool_use", "id": "w", "name": "web_search", "input": {"query": "x"}},
        {"type": "web_search_tool_result", "tool_use_id": "w", "content": [{"type": "web_search_result"}]},
        stop_reason="tool_use",
    ),
    "unknown fields": message(
        {"type": "hologram", "text": "whole", "depth": 3},
        {"type": "text", "text": "x", "mood": "happy"},
        stop_sequence="\n",
        container={"id": "c"},
        stop_details=None,
        vendor={"region": ["eu"]},
        usage={"input_tokens": 5, "output_tokens": 9, "cache_read_input_tokens": 2, "service_tier": "standard"},
    ),
}


@pytest.mark.parametrize("body", CHATS.values(), ids=CHATS)
def test_a_chat_joins_to_what_it_was(body: dict[str, Any]) -> None:
    assert joined(ChatJoiner(), chat_events(encoded(body), include_usage=True)) == body
    body = {name: value for name, value in body.items() if name != "usage"}
    assert joined(ChatJoiner(), chat_events(encoded(body), include_usage=False)) == body


@pytest.mark.parametrize("body", MESSAGES.values(), ids=MESSAGES)
def test_a_message_joins_to_what_it_was(body: dict[str, Any]) -> None:
    assert joined(MessagesJoiner(), messages_events(encoded(body))) == body


def test_chunks_are_openais() -> None:
    body = chat(
        {"content": "ok", "reasoning_content": "hm"}, usage=USAGE, service_tier="t", system_fingerprint="fp", vendor="v"
    )
    body["choices"][0] |= {"native_finish_reason": "eos", "logprobs": {"content": [{"token": "ok"}]}, "matched": 5}
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    head |= {"service_tier": "t", "system_fingerprint": "fp"}
    unended = {"finish_reason": None, "native_finish_reason": None}
    ended = {"finish_reason": "stop", "native_finish_reason": "eos", "logprobs": {"content": [{"token": "ok"}]}}

    def chunk(delta: dict[str, Any], **choice: Any) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, **choice}], "usage": None}

    expected = [
        {**chunk({"role": "assistant"}, matched=5, **unended), "vendor": "v"},
        chunk({"reasoning_content": "hm"}, **unended),
        chunk({"content": "ok"}, **unended),
        chunk({}, **ended),
        {**head, "choices": [], "usage": USAGE},
    ]
    assert chunks(body) == expected
    for one in expected:
        one.pop("usage")
    assert chunks(body, include_usage=False) == expected[:-1]


def test_tool_calls_name_themselves_once() -> None:
    function = {"name": "f", "arguments": "x" * PIECE_CHARS + "y"}
    call = {"index": 7, "id": "a", "type": "function", "function": function}
    assert deltas(chat({"content": None, "tool_calls": [call]})) == [
        {"role": "assistant", "content": None},
        {
            "tool_calls": [
                {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}},
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": "x" * PIECE_CHARS}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "y"}}]},
        {},
    ]


def test_choices_go_by_their_order() -> None:
    body = chat({"content": "a"}, {"content": "b"}, {"content": "c"})
    first, second, third = body["choices"]
    body["choices"] = [third, first, second]
    said = [(choice["index"], choice["delta"].get("content")) for one in chunks(body) for choice in one["choices"]]
    assert [pair for pair in said if pair[1]] == [(0, "a"), (1, "b"), (2, "c")]


def test_events_are_anthropics() -> None:
    thinking = {"type": "thinking", "thinking": "x" * PIECE_CHARS + "y", "signature": "s"}
    tool = {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}
    start = message(stop_reason=None, usage={"input_tokens": 5, "output_tokens": 0})
    found = events(message(thinking, tool, stop_reason="tool_use"))
    assert all(name == event["type"] for name, event in found)
    assert [{field: value for field, value in event.items() if field != "type"} for _, event in found] == [
        {"message": start},
        {"index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
        {"index": 0, "delta": {"type": "thinking_delta", "thinking": "x" * PIECE_CHARS}},
        {"index": 0, "delta": {"type": "thinking_delta", "thinking": "y"}},
        {"index": 0, "delta": {"type": "signature_delta", "signature": "s"}},
        {"index": 0},
        {"index": 1, "content_block": {**tool, "input": {}}},
        {"index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"a":1}'}},
        {"index": 1},
        {"delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": {"input_tokens": 5, "output_tokens": 9}},
        {},
    ]
    assert [name for name, _ in found][-3:] == ["content_block_stop", "message_delta", "message_stop"]


TEXTS = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("\u2028\u2029\x85\r\n🤔\u200d")), max_size=3 * PIECE_CHARS
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(st.characters(codec="utf-8"), max_size=9),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=9), values, max_size=3)
    ),
    max_leaves=5,
)


@given(content=st.none() | TEXTS, reasoning=st.none() | TEXTS, arguments=st.lists(TEXTS, max_size=3), extra=VALUES)
def test_any_chat_joins_to_what_it_was(
    content: str | None, reasoning: str | None, arguments: list[str], extra: object
) -> None:
    calls = [
        {"id": f"call_{index}", "type": "function", "function": {"name": "f", "arguments": text}}
        for index, text in enumerate(arguments)
    ]
    body = chat(
        {"content": content, "reasoning_content": reasoning, "tool_calls": calls}, {"content": content}, vendor=extra
    )
    body["choices"][1]["vendor"] = extra
    stream = list(chat_events(encoded(body), include_usage=False))
    assert joined(ChatJoiner(), iter(stream)) == body
    one_line_each(stream)


@given(texts=st.lists(TEXTS, max_size=3), thinking=TEXTS, value=VALUES, extra=VALUES)
def test_any_message_joins_to_what_it_was(texts: list[str], thinking: str, value: object, extra: object) -> None:
    body = message(
        {"type": "thinking", "thinking": thinking, "signature": thinking},
        *({"type": "text", "text": text} for text in texts),
        {"type": "tool_use", "id": "t", "name": "f", "input": value},
        vendor=extra,
    )
    stream = list(messages_events(encoded(body)))
    assert joined(MessagesJoiner(), iter(stream)) == body
    one_line_each(stream)


def one_line_each(stream: list[bytes]) -> None:
    """Also for a client that cuts lines where Unicode does."""
    for event in stream:
        *names, data, last = event.decode().splitlines()
        assert last == ""
        assert data.startswith("data: ")
        assert len(names) == event.startswith(b"event: ")


def test_half_a_surrogate_pair_is_passed_on() -> None:
    half = json.dumps(chat({"content": "cut \ud83d"})).encode()
    [text] = [
        choice["delta"]["content"]
        for event in list(chat_events(half, include_usage=False))[:-1]
        for choice in json.loads(event.removeprefix(b"data: "))["choices"]
        if "content" in choice["delta"]
    ]
    assert text == "cut \ud83d"
    half = json.dumps(message({"type": "text", "text": "cut \ud83d"}, {"type": "tool_use", "input": "\ud83d"})).encode()
    assert [
        json.loads(data)["delta"] for name, data in parsed(messages_events(half)) if name == b"content_block_delta"
    ] == [
        {"type": "text_delta", "text": "cut \ud83d"},
        {"type": "input_json_delta", "partial_json": '"\\ud83d"'},
    ]


NESTED = b'{"a":' + b"[" * 5000


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"5", b'"x"', b"<html>", b'{"id":"\xff"}', NESTED])
def test_what_is_no_object_makes_an_error(body: bytes) -> None:
    [(name, data)] = parsed(chat_events(body, include_usage=True))
    assert name == b""
    assert "JSON" in json.loads(data)["error"]["message"]
    [(name, data)] = parsed(messages_events(body))
    assert name == b"error"
    assert "JSON" in json.loads(data)["error"]["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, []),
        ({"choices": None, "usage": None}, []),
        ({"choices": 5}, []),
        ({"choices": {"index": 0}}, []),
        ({"choices": ["x", None]}, []),
        ({"choices": [{}]}, [{"role": "assistant"}, {}]),
        ({"choices": [{"message": "x"}]}, [{"role": "assistant"}, {}]),
        (
            {"choices": [{"index": "x", "message": {"content": "a"}}, {"index": [], "message": None}]},
            [{"content": "a"}],
        ),
        ({"choices": [{"message": {"content": [{"type": "text"}]}}]}, [{"content": [{"type": "text"}]}]),
        ({"choices": [{"message": {"tool_calls": 5}}]}, [{"tool_calls": 5}]),
        ({"choices": [{"message": {"tool_calls": [5]}}]}, [{"tool_calls": [5]}]),
        ({"choices": [{"message": {"tool_calls": [{"function": None}]}}]}, [{"tool_calls": [{"function": None}]}]),
        ({"choices": [{"message": {"tool_calls": [{"function": {"arguments": {}}}]}}]}, []),
    ],
)
def test_odd_chats_tell_what_they_can(body: dict[str, Any], said: list[dict[str, Any]]) -> None:
    found = deltas(body)
    for expected in said:
        assert any(covers(delta, expected) for delta in found), (expected, found)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks(body))
    assert [chunk for chunk in chunks(body) if not chunk["choices"]] == ([] if found else chunks(body))


def covers(delta: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return all(name in delta and covers(delta[name], value) for name, value in expected.items())
    if isinstance(expected, list):
        return len(delta) == len(expected) and all(map(covers, delta, expected))
    return bool(delta == expected)


@pytest.mark.parametrize(
    ("content", "started"),
    [
        (None, []),
        (5, []),
        ({"type": "text"}, []),
        ("plain", [{"type": "text", "text": ""}]),
        (["x", None, {"type": "text", "text": "a"}], [{"type": "text", "text": ""}]),
        ([{"type": "text", "text": None}], [{"type": "text", "text": None}]),
        ([{"type": "thinking"}], [{"type": "thinking"}]),
        ([{"type": "tool_use", "id": "t"}], [{"type": "tool_use", "id": "t"}]),
        ([{"text": "no type"}], [{"text": "no type"}]),
        ([{"type": []}], [{"type": []}]),
        ([{"type": "text", "text": "", "citations": 5}], [{"type": "text", "text": "", "citations": 5}]),
    ],
)
@pytest.mark.parametrize("usage", [None, 5, {}])
def test_odd_messages_tell_what_they_can(content: object, started: list[object], usage: object) -> None:
    found = events({"content": content, "usage": usage})
    assert [event["content_block"] for name, event in found if name == "content_block_start"] == started
    assert found[0][1]["message"]["usage"] == {"input_tokens": 0, "output_tokens": 0}
    assert found[-2][1]["usage"] == {"output_tokens": 0}
    assert found[-2][1]["delta"] == {"stop_reason": None, "stop_sequence": None}
    assert found[-1][0] == "message_stop"
    assert events({})[-1][0] == "message_stop"


def test_error_events() -> None:
    joiner: Joiner = ChatJoiner()
    joiner.feed(chat_error_event({"message": "line\n\u2028break", "code": "429"}))
    assert joiner.error is not None
    assert json.loads(joiner.error) == {"error": {"message": "line\n\u2028break", "code": "429"}}
    joiner = MessagesJoiner()
    joiner.feed(messages_error_event({"type": "overloaded_error", "message": "m"}))
    assert joiner.error is not None
    assert json.loads(joiner.error) == {"type": "error", "error": {"type": "overloaded_error", "message": "m"}}


def test_keep_alives_are_no_events() -> None:
    assert EventParser().feed(KEEP_ALIVE * 3) == []
