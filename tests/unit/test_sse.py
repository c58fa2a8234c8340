"""Streams joined: however the bytes are cut, the body is what a non-stream call would have given."""

from __future__ import annotations

import json
from typing import Any

import pytest

from worker.sse import ChatJoiner, EventParser, Joiner, MessagesJoiner

HEAD = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1700000000,
    "model": "MaaS_Mimo_V2.5_20260423",
}
USAGE = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16, "cost": 0.25}


def data(value: object, end: str = "\n\n") -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + end.encode()


def chunk(delta: dict[str, Any], index: int = 0, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {**HEAD, "choices": [{"index": index, "delta": delta, "finish_reason": finish, **more}]}


def chat(*choices: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**HEAD, "object": "chat.completion", "choices": list(choices), **more}


def choice(message: dict[str, Any], index: int = 0, finish: str | None = "stop", **more: Any) -> dict[str, Any]:
    return {"index": index, "message": {"role": "assistant", **message}, "finish_reason": finish, **more}


def event(name: str, **fields: Any) -> bytes:
    return f"event: {name}\n".encode() + data({"type": name, **fields})


DONE = b"data: [DONE]\n\n"

CHATS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "thinking, then multi-byte text, usage at the end": (
        data(chunk({"role": "assistant", "content": "", "reasoning_content": None}, native_finish_reason=None))
        + data(chunk({"content": None, "reasoning_content": "想一想"}))
        + data(chunk({"content": None, "reasoning_content": " 🤔."}))
        + data(chunk({"content": "Zwölf Grüße, 世界"}))
        + data(chunk({"content": " 🎉"}))
        + data(chunk({}, finish="stop", native_finish_reason="eos"))
        + data({**HEAD, "choices": [], "usage": USAGE})
        + DONE,
        chat(
            choice(
                {"content": "Zwölf Grüße, 世界 🎉", "reasoning_content": "想一想 🤔."},
                native_finish_reason="eos",
            ),
            usage=USAGE,
        ),
    ),
    "tool calls by index, arguments in fragments": (
        data(
            chunk(
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "index": 0,
                            "id": "call_a",
                            "type": "function",
                            "function": {"name": "weather", "arguments": ""},
                        }
                    ],
                }
            )
        )
        + data(
            chunk({"tool_calls": [{"index": 0, "id": "call_a", "type": "function", "function": {"arguments": '{"ci'}}]})
        )
        + data(
            chunk(
                {
                    "tool_calls": [
                        {"index": 1, "id": "call_b", "type": "function", "function": {"name": "ti", "arguments": "{"}},
                        {"index": 0, "function": {"arguments": 'ty":"Köln"}'}},
                    ]
                }
            )
        )
        + data(chunk({"tool_calls": [{"index": 1, "id": "", "function": {"name": "me", "arguments": "}"}}]}))
        + data(chunk({}, finish="tool_calls"))
        + DONE,
        chat(
            choice(
                {
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "call_a",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city":"Köln"}'},
                        },
                        {"id": "call_b", "type": "function", "function": {"name": "time", "arguments": "{}"}},
                    ],
                },
                finish="tool_calls",
            )
        ),
    ),
    "tool calls without an index": (
        data(chunk({"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "1"}}]}))
        + data(chunk({"tool_calls": [{"function": {"arguments": "2"}}]}))
        + data(chunk({"tool_calls": [{"id": "b", "function": {"name": "g", "arguments": "3"}}]}, finish="tool_calls")),
        chat(
            choice(
                {
                    "content": None,
                    "tool_calls": [
                        {"id": "a", "function": {"name": "f", "arguments": "12"}},
                        {"id": "b", "function": {"name": "g", "arguments": "3"}},
                    ],
                },
                finish="tool_calls",
            )
        ),
    ),
    "several choices, CRLF, comments, a missing [DONE]": (
        b"\xef\xbb\xbf: ping\r\n\r\n"
        + data(chunk({"role": "assistant", "content": "b"}, index=1), "\r\n\r\n")
        + b": keep-alive\r\n\r\nid: 5\r\nretry: 100\r\n"
        + data(chunk({"role": "assistant", "content": "a"}), "\r\n\r\n")
        + data(chunk({"content": "é"}, finish="length"), "\r\n\r\n")
        + data(chunk({"content": "ü"}, index=1, finish="stop"), "\r\n\r\n"),
        chat(choice({"content": "aé"}, finish="length"), choice({"content": "bü"}, index=1)),
    ),
    "lone CR, no blank before the data, data on several lines, no last blank line": (
        b'data:{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,\r'
        + b'data:"model":"MaaS_Mimo_V2.5_20260423","choices":[\rdata:{"delta":{"content":"ok"}}]}\r\r'
        + b"data\r\rdata: \r\r"
        + data(chunk({}, finish="stop"), "\r"),
        chat(choice({"content": "ok"})),
    ),
    "unknown fields are kept": (
        data({**chunk({"content": "x", "mood": "ha", "audio": {"data": "AA"}, "notes": [1], "score": 1}), "tier": None})
        + data(
            {
                **chunk({"mood": "ppy", "audio": {"data": "BB"}, "notes": [2], "score": 2}, logprobs={"content": [1]}),
                "tier": "x",
            }
        )
        + data(chunk({"refusal": "no", "mood": None, "score": None}, logprobs={"content": [2]}, matched_stop=None))
        + data(chunk({"refusal": "pe"}, finish="stop"))
        + DONE,
        chat(
            choice(
                {
                    "content": "x",
                    "mood": "happy",
                    "audio": {"data": "AABB"},
                    "notes": [1, 2],
                    "score": 2,
                    "refusal": "nope",
                },
                logprobs={"content": [1, 2]},
                matched_stop=None,
            ),
            tier="x",
        ),
    ),
}

MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "model": "MaaS_Mimo_V2.5_20260423"}

MESSAGES: dict[str, tuple[bytes, dict[str, Any]]] = {
    "text, thinking, signature, a tool's input": (
        event(
            "message_start",
            message={
                **MESSAGE,
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {"input_tokens": 5, "output_tokens": 1, "cache_read_input_tokens": 2},
            },
        )
        + event("content_block_start", index=0, content_block={"type": "thinking", "thinking": "", "signature": ""})
        + event("ping")
        + event("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "考え"})
        + event("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "る 🤔"})
        + event("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "c2ln"})
        + event("content_block_stop", index=0)
        + event("content_block_start", index=1, content_block={"type": "text", "text": "Gr"})
        + event("content_block_delta", index=1, delta={"type": "text_delta", "text": "üße"})
        + event("content_block_delta", index=1, delta={"type": "citations_delta", "citation": {"title": "a"}})
        + event("content_block_delta", index=1, delta={"type": "citations_delta", "citation": {"title": "b"}})
        + event("content_block_stop", index=1)
        + event(
            "content_block_start", index=2, content_block={"type": "tool_use", "id": "tu", "name": "f", "input": {}}
        )
        + event("content_block_delta", index=2, delta={"type": "input_json_delta", "partial_json": ""})
        + event("content_block_delta", index=2, delta={"type": "input_json_delta", "partial_json": '{"a": [1,'})
        + event("content_block_delta", index=2, delta={"type": "input_json_delta", "partial_json": ' "ß"]}'})
        + event(
            "content_block_start", index=3, content_block={"type": "tool_use", "id": "tv", "name": "g", "input": {}}
        )
        + event("content_block_delta", index=3, delta={"type": "input_json_delta", "partial_json": ""})
        + event("content_block_start", index=4, content_block={"type": "redacted_thinking", "data": "opaque"})
        + event("message_delta", delta={"stop_reason": "tool_use", "stop_sequence": None}, usage={"output_tokens": 40})
        + event("message_stop"),
        {
            **MESSAGE,
            "content": [
                {"type": "thinking", "thinking": "考える 🤔", "signature": "c2ln"},
                {"type": "text", "text": "Grüße", "citations": [{"title": "a"}, {"title": "b"}]},
                {"type": "tool_use", "id": "tu", "name": "f", "input": {"a": [1, "ß"]}},
                {"type": "tool_use", "id": "tv", "name": "g", "input": {}},
                {"type": "redacted_thinking", "data": "opaque"},
            ],
            "stop_reason": "tool_use",
            "stop_sequence": None,
            "usage": {"input_tokens": 5, "output_tokens": 40, "cache_read_input_tokens": 2},
        },
    ),
    "no message_stop, CRLF, input cut by the token limit, types by event name alone": (
        (
            b"event: message_start\n"
            + data({"message": {**MESSAGE, "content": []}})
            + b"event: content_block_start\n"
            + data({"index": 0, "content_block": {"type": "tool_use", "input": {}}})
            + b"event:content_block_delta\n"
            + data({"index": 0, "delta": {"partial_json": '{"a'}})
            + event("message_delta", delta={"stop_reason": "max_tokens"})
        ).replace(b"\n", b"\r\n"),
        {
            **MESSAGE,
            "content": [{"type": "tool_use", "input": '{"a'}],
            "stop_reason": "max_tokens",
            "usage": {},
        },
    ),
}

STREAMS = [pytest.param(ChatJoiner, *case, id=name) for name, case in CHATS.items()] + [
    pytest.param(MessagesJoiner, *case, id=name) for name, case in MESSAGES.items()
]


def join(joiner: Joiner, *chunks: bytes) -> Any:
    for part in chunks:
        joiner.feed(part)
    return json.loads(joiner.finish())


@pytest.mark.parametrize(("kind", "stream", "body"), STREAMS)
def test_cut_anywhere(kind: type[Joiner], stream: bytes, body: dict[str, Any]) -> None:
    for cut in range(len(stream) + 1):
        joiner = kind()
        assert join(joiner, stream[:cut], stream[cut:]) == body, cut
        assert joiner.complete
        assert (joiner.invalid, joiner.too_large, joiner.error) == (False, False, None)


@pytest.mark.parametrize(("kind", "stream", "body"), STREAMS)
@pytest.mark.parametrize("size", [1, 7])
def test_byte_by_byte(kind: type[Joiner], stream: bytes, body: dict[str, Any], size: int) -> None:
    joiner = kind()
    assert join(joiner, *(stream[at : at + size] for at in range(0, len(stream), size))) == body
    assert joiner.complete


@pytest.mark.parametrize(("kind", "stream", "body"), STREAMS)
def test_ended_early_is_incomplete_and_never_raises(kind: type[Joiner], stream: bytes, body: dict[str, Any]) -> None:
    whole = []
    for cut in range(len(stream)):
        joiner = kind()
        partial = join(joiner, stream[:cut])
        assert not joiner.invalid
        assert isinstance(partial, dict)
        whole.append(joiner.complete)
    # Once the reason for the end has come, and only then, the answer is whole.
    assert whole == sorted(whole)
    assert not whole[len(stream) // 2]


def test_key_order_is_that_of_a_plain_answer() -> None:
    stream, _ = CHATS["thinking, then multi-byte text, usage at the end"]
    body = join(ChatJoiner(), stream)
    assert list(body) == ["id", "object", "created", "model", "choices", "usage"]


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (b'data:{"error":{"code":"400","message":"m"}}\n\n', {"error": {"code": "400", "message": "m"}}),
        (b'event: error\ndata: {"code":"429"}\n\n', {"error": {"code": "429"}}),
        (b"event: error\ndata: overloaded\n\n", {"error": {"message": "overloaded"}}),
        (b'event: error\ndata: {"error":"down"}', {"error": "down"}),
    ],
)
def test_error_inside_the_stream(stream: bytes, error: dict[str, Any]) -> None:
    begin = data(chunk({"content": "half"}))
    for cut in range(len(stream)):
        joiner = ChatJoiner()
        joiner.feed(begin + stream[:cut])
        joiner.feed(stream[cut:] + data(chunk({"content": "more"}, finish="stop")) * stream.endswith(b"\n"))
        joiner.finish()
        assert joiner.error is not None
        assert json.loads(joiner.error) == error
        assert joiner.stopped
        assert not joiner.complete


def test_error_of_anthropics() -> None:
    joiner = MessagesJoiner()
    joiner.feed(event("message_start", message=MESSAGE) + event("error", error={"type": "overloaded_error"}))
    assert joiner.error is not None
    assert json.loads(joiner.error)["error"] == {"type": "overloaded_error"}


def test_what_follows_a_complete_answer_is_ignored() -> None:
    for after in (b'data: {"error":{"code":500}}\n\n', b"data: nonsense\n\n", DONE + b"data: nonsense\n\n"):
        joiner = ChatJoiner()
        body = join(joiner, data(chunk({"content": "paid"}, finish="stop")) + after)
        assert body == chat(choice({"content": "paid"}))
        assert (joiner.complete, joiner.error, joiner.invalid) == (True, None, False)


@pytest.mark.parametrize(
    "nonsense",
    [
        "<html>",
        "[]",
        "5",
        "null",
        '{"choices":5}',
        '{"choices":[5]}',
        '{"choices":[{"index":"0"}]}',
        '{"choices":{"a":1}}',
        '{"choices":[{"delta":"x"}]}',
        '{"choices":[{"delta":{"tool_calls":["x"]}}]}',
        '{"a":' + "[" * 5000,
        '{"a":"\\ud83d"}',
    ],
)
def test_nonsense_is_invalid(nonsense: str) -> None:
    joiner = ChatJoiner()
    joiner.feed(f"data: {nonsense}\n\n".encode())
    assert joiner.invalid
    assert joiner.stopped
    json.loads(joiner.finish())


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "content_block_delta", "index": 3, "delta": {"text": "x"}},
        {"type": "content_block_start", "index": "0", "content_block": {}},
        {"type": "content_block_start", "index": 0, "content_block": 5},
        {"type": "message_start", "message": 5},
        {"type": "message_start"},
        {"type": "message_delta", "delta": {}, "usage": 5},
    ],
)
def test_nonsense_in_messages_is_invalid(fields: dict[str, Any]) -> None:
    joiner = MessagesJoiner()
    joiner.feed(data(fields))
    assert joiner.invalid
    json.loads(joiner.finish())


def test_invalid_utf8_is_invalid() -> None:
    joiner = ChatJoiner()
    joiner.feed(b'data: {"id":"\xff"}\n\n')
    assert joiner.invalid


def test_nesting_beyond_reason_does_not_raise() -> None:
    joiner = ChatJoiner()
    deep: Any = 1
    for _ in range(700):
        deep = {"a": deep}
    joiner.feed(data({"deep": deep, **chunk({"content": "x", "deep": deep}, finish="stop")}))
    json.loads(joiner.finish())


def test_an_event_without_end_is_too_large() -> None:
    joiner = ChatJoiner(limit=1000)
    for _ in range(101):
        joiner.feed(b"data: xxxx")
    assert joiner.too_large
    assert joiner.stopped


def test_a_stream_without_end_is_too_large() -> None:
    joiner = ChatJoiner(limit=1000)
    while not joiner.stopped:
        joiner.feed(b": ping\n\n" + data(chunk({"content": ""})))
    assert joiner.too_large


def test_a_joined_body_over_the_limit_is_too_large() -> None:
    joiner = ChatJoiner(limit=1000)
    for _ in range(10):
        joiner.feed(data(chunk({"content": "x" * 200})))
    joiner.feed(DONE)
    assert not joiner.too_large
    joiner.finish()
    assert joiner.too_large


def test_no_chunks_at_all() -> None:
    assert EventParser().feed(b"") == []
    joiner = ChatJoiner()
    assert join(joiner) == {"object": "chat.completion", "choices": []}
    assert not joiner.complete
    assert join(MessagesJoiner()) == {}
