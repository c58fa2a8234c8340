"""Answers in the provider's shapes: one JSON object, or the server-sent events that join to the same object."""

from __future__ import annotations

from typing import Any

import msgspec

from ops.simulator.answers import Answer

encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def error_body(status: int, message: str, kind: str) -> bytes:
    """The provider's error; its `code` is a string."""
    return encode({"error": {"code": str(status), "message": message, "type": kind}})


def error_event(status: int, message: str, kind: str) -> bytes:
    """The same error among the events of a stream."""
    return b"data:" + error_body(status, message, kind) + b"\n\n"


def whole(answer: Answer) -> bytes:
    """The response to a request that is not streamed."""
    return encode(_chat(answer) if answer.endpoint == "chat" else _message(answer, _blocks(answer)))


def events(answer: Answer, pieces: int, *, include_usage: bool) -> list[bytes]:
    """The events of the streamed response, its texts cut into about `pieces`; the last chat one is `[DONE]`."""
    return _chat_events(answer, pieces, include_usage) if answer.endpoint == "chat" else _message_events(answer, pieces)


def _chat(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.tool_call is not None:
        message["tool_calls"] = [_tool_call(answer, encode(answer.tool_call.arguments).decode())]
    finish = {"finish_reason": answer.finish, "native_finish_reason": answer.finish}
    return {
        "id": answer.id,
        "choices": [{"index": 0, "message": message, **finish}],
        "created": answer.created,
        "model": answer.model,
        "object": "chat.completion",
        "usage": _usage(answer),
    }


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.total_tokens,
        "completion_tokens_details": {
            "accepted_prediction_tokens": 0,
            "audio_tokens": 0,
            "image_tokens": 0,
            "reasoning_tokens": answer.reasoning_tokens,
            "rejected_prediction_tokens": 0,
        },
        "prompt_tokens_details": {"audio_tokens": 0, "cached_tokens": 0, "image_tokens": 0},
    }


def _tool_call(answer: Answer, arguments: str) -> dict[str, Any]:
    assert answer.tool_call is not None
    return {
        "id": answer.tool_call.id,
        "type": "function",
        "function": {"name": answer.tool_call.name, "arguments": arguments},
    }


def _chat_events(answer: Answer, pieces: int, include_usage: bool) -> list[bytes]:
    head = {"id": answer.id, "object": "chat.completion.chunk", "created": answer.created, "model": answer.model}
    no_usage = {"usage": None} if include_usage else {}

    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        ends = {"finish_reason": finish, "native_finish_reason": finish}
        return _data({**head, "choices": [{"index": 0, "delta": delta, **ends}], **no_usage})

    out = [chunk({"role": "assistant", "content": ""})]
    for field, part in _pieces(answer, pieces):
        out.append(chunk({"content" if field == "text" else "reasoning_content": part}))
    if answer.tool_call is not None:
        out.append(chunk({"tool_calls": [{"index": 0, **_tool_call(answer, "")}]}))
        parts = _cut(encode(answer.tool_call.arguments).decode(), pieces)
        out += [chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]}) for part in parts]
    out.append(chunk({}, answer.finish))
    if include_usage:
        out.append(_data({**head, "choices": [], "usage": _usage(answer)}))
    out.append(DONE)
    return out


def _blocks(answer: Answer) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if answer.content:
        blocks.append({"type": "text", "text": answer.content})
    if answer.reasoning:
        blocks.append({"type": "thinking", "signature": "", "thinking": answer.reasoning})
    if (call := answer.tool_call) is not None:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments})
    return blocks


def _message(answer: Answer, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": answer.id,
        "type": "message",
        "role": "assistant",
        "content": blocks,
        "model": answer.model,
        "usage": {"input_tokens": answer.prompt_tokens, "output_tokens": answer.completion_tokens},
        "stop_reason": STOP_REASONS.get(answer.finish, answer.finish),
    }


def _message_events(answer: Answer, pieces: int) -> list[bytes]:
    start = _message(answer, [])
    start["stop_reason"] = None
    start["usage"] = {"input_tokens": answer.prompt_tokens, "output_tokens": 0}
    out = [_event({"type": "message_start", "message": start}), _event({"type": "ping"})]
    texts = _pieces(answer, pieces)
    for index, block in enumerate(_blocks(answer)):
        deltas: list[dict[str, Any]]
        match block["type"]:
            case "text":
                empty = {**block, "text": ""}
                deltas = [{"type": "text_delta", "text": part} for kind, part in texts if kind == "text"]
            case "thinking":
                empty = {**block, "thinking": ""}
                deltas = [{"type": "thinking_delta", "thinking": part} for kind, part in texts if kind == "thinking"]
                deltas.append({"type": "signature_delta", "signature": ""})
            case _:
                empty = {**block, "input": {}}
                parts = _cut(encode(block["input"]).decode(), pieces)
                deltas = [{"type": "input_json_delta", "partial_json": part} for part in parts]
        out.append(_event({"type": "content_block_start", "index": index, "content_block": empty}))
        out += [_event({"type": "content_block_delta", "index": index, "delta": delta}) for delta in deltas]
        out.append(_event({"type": "content_block_stop", "index": index}))
    end = {"stop_reason": STOP_REASONS.get(answer.finish, answer.finish)}
    out.append(_event({"type": "message_delta", "delta": end, "usage": {"output_tokens": answer.completion_tokens}}))
    out.append(_event({"type": "message_stop"}))
    return out


def _pieces(answer: Answer, pieces: int) -> list[tuple[str, str]]:
    """`("thinking" | "text", piece)`, the thinking first, about `pieces` in all."""
    letters = len(answer.reasoning) + len(answer.content) or 1
    thinking = round(pieces * len(answer.reasoning) / letters)
    return [
        *(("thinking", part) for part in _cut(answer.reasoning, thinking)),
        *(("text", part) for part in _cut(answer.content, pieces - thinking)),
    ]


def _cut(text: str, pieces: int) -> list[str]:
    step = -(-len(text) // max(1, pieces)) or 1
    return [text[i : i + step] for i in range(0, len(text), step)]


def _data(value: object) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"event: %b\n" % str(value["type"]).encode() + _data(value)
