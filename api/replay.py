"""Finished responses as streams: a stored body in, the server-sent events that a streamed call would have given out.

No I/O. Who asked for `stream: true` waits, with `KEEP_ALIVE` in between, until the job ends; then all of the stream
comes at once. What joins its events gets the stored response back: fields nobody here knows travel whole, in the first
event that can hold them. Odd bodies never raise: what can be told is told, and a body that is no JSON object makes the
protocol's error event, which the official SDKs raise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which every reader of server-sent events passes over; may stand before and between events."""

DONE = b"data: [DONE]\n\n"

# Long enough that the frame of an event weighs little, short enough to be drawn as a stream.
PIECE_CHARS = 256

# Repeated in every chunk, as the SDK's accumulator takes the last one's; all else of a response comes once.
_HEAD = ("id", "object", "created", "model", "service_tier", "system_fingerprint")
# Strings of a message that come in pieces, in the order in which a model makes them.
_TEXTS = ("reasoning_content", "content", "refusal")
# Null until the last chunk of a choice.
_REASONS = ("finish_reason", "native_finish_reason", "stop_reason")
# The SDK's accumulator adds the log-probabilities of a later choice's first chunk twice, those of a last chunk once.
_LAST = (*_REASONS, "logprobs")

_ENDS = ("stop_reason", "stop_sequence")
# Newer ends of a message, which not every upstream knows.
_OPTIONAL_ENDS = ("stop_details", "container")

_NOT_JSON = (msgspec.MsgspecError, ValueError, RecursionError)

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


def chat_events(body: bytes, include_usage: bool) -> Iterator[bytes]:
    """The events of `chat.completion.chunk` for a stored `chat.completion`, the last one `[DONE]`.

    `include_usage` is the request's `stream_options.include_usage`: the usage then comes in a chunk of its own, without
    choices; otherwise it is left out, as OpenAI does. Choices come one after the other, numbered by their order.
    """
    return _guarded(lambda: _chat(_read(body), include_usage), chat_error_event)


def messages_events(body: bytes) -> Iterator[bytes]:
    """The events of Anthropic's stream for a stored `message`, from `message_start` to `message_stop`.

    The whole usage comes in `message_delta`; `message_start` has it without the output tokens. Both are there even
    where the response has none, as the SDK can't do without.
    """
    return _guarded(lambda: _messages(_read(body)), messages_error_event)


def chat_error_event(error: Mapping[str, object]) -> bytes:
    """An error inside a stream of chat chunks, its last event: `error` is OpenAI's `{message, type, param, code}`.

    The official SDK raises `APIError` with it as `body`; an empty one would go unnoticed.
    """
    return _data({"error": error})


def messages_error_event(error: Mapping[str, object]) -> bytes:
    """An error inside a stream of a message, its last event: `error` is Anthropic's `{type, message}`.

    The official SDK raises `APIStatusError` with the whole event as `body`.
    """
    return _event("error", error=error)


def _guarded(
    events: Callable[[], Iterator[bytes]], error_event: Callable[[Mapping[str, object]], bytes]
) -> Iterator[bytes]:
    try:
        yield from events()
    except _NOT_JSON:
        yield error_event({"type": "api_error", "message": "the stored response can't be read as a JSON object"})


def _read(body: bytes) -> dict[str, Any]:
    """Raises one of `_NOT_JSON`."""
    try:
        response = _decode(body)
    except msgspec.DecodeError:
        # Half of a surrogate pair, which an answer cut at its token limit may end in: Python's reader keeps it.
        response = json.loads(body)
    if not isinstance(response, dict):
        raise ValueError("not an object")
    return response


def _chat(response: dict[str, Any], include_usage: bool) -> Iterator[bytes]:
    response["object"] = "chat.completion.chunk"
    usage = response.pop("usage", None)
    choices = _objects(response.pop("choices", None))
    if all(type(choice.get("index")) is int for choice in choices):
        choices.sort(key=lambda choice: choice["index"])
    head = {name: response[name] for name in _HEAD if name in response}
    no_usage = {"usage": None} if include_usage else {}

    first = {**head, **response}
    if not choices:
        yield _data({**first, "choices": [], **no_usage})
    for index, choice in enumerate(choices):
        for part in _parts(choice):
            yield _data({**first, "choices": [{"index": index, **part}], **no_usage})
            first = head
    if include_usage and usage is not None:
        yield _data({**head, "choices": [], "usage": usage})
    yield DONE


def _parts(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A choice in fragments: who speaks and what nobody here knows, its texts, its tool calls, why it ended."""
    message = choice.pop("message", None)
    message = message if isinstance(message, dict) else {}
    choice.pop("index", None)
    last = {"finish_reason": None, **{name: choice.pop(name) for name in _LAST if name in choice}}
    unended = {name: None for name in _REASONS if name in last}

    # Empty texts stay in the first fragment: they are no null, and there are no pieces to tell that.
    texts = {name: message.pop(name) for name in _TEXTS if isinstance(message.get(name), str) and message[name]}
    calls = _objects(message.get("tool_calls"))
    if calls:
        del message["tool_calls"]

    yield {**choice, "delta": {"role": "assistant", **message}, **unended}
    for name, text in texts.items():
        for piece in _pieces(text):
            yield {"delta": {name: piece}, **unended}
    for index, call in enumerate(calls):
        for fragment in _fragments(call):
            yield {"delta": {"tool_calls": [{**fragment, "index": index}]}, **unended}
    yield {"delta": {}, **last}


def _fragments(call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A tool call: its name first, then its arguments in pieces; whole where it is no function's."""
    match call:
        case {"function": {"arguments": str(arguments)}}:
            yield {**call, "function": {**call["function"], "arguments": ""}}
            for piece in _pieces(arguments):
                yield {"function": {"arguments": piece}}
        case _:
            yield call


def _messages(response: dict[str, Any]) -> Iterator[bytes]:
    usage = response.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    ends = {name: response.get(name) for name in _ENDS}
    ends |= {name: response[name] for name in _OPTIONAL_ENDS if name in response}
    content = response.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else _objects(content)

    start = {**response, **dict.fromkeys(ends), "content": []}
    start["usage"] = {"input_tokens": 0, **usage, "output_tokens": 0}
    yield _event("message_start", message=start)
    for index, block in enumerate(blocks):
        empty, deltas = _emptied(block)
        yield _event("content_block_start", index=index, content_block=empty)
        for delta in deltas:
            yield _event("content_block_delta", index=index, delta=delta)
        yield _event("content_block_stop", index=index)
    yield _event("message_delta", delta=ends, usage={"output_tokens": 0, **usage})
    yield _event("message_stop")


def _emptied(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A content block as it starts, and the deltas that fill it; blocks of other types start whole."""
    deltas: list[dict[str, Any]]
    match block:
        case {"type": "text", "text": str(text)}:
            empty = {**block, "text": ""}
            deltas = [{"type": "text_delta", "text": piece} for piece in _pieces(text)]
            if citations := _objects(block.get("citations")):
                empty["citations"] = []
                deltas += [{"type": "citations_delta", "citation": citation} for citation in citations]
        case {"type": "thinking", "thinking": str(thinking)}:
            empty = {**block, "thinking": ""}
            deltas = [{"type": "thinking_delta", "thinking": piece} for piece in _pieces(thinking)]
            if isinstance(signature := block.get("signature"), str):
                empty["signature"] = ""
                deltas.append({"type": "signature_delta", "signature": signature})  # whole: the SDK keeps the last one
        case {"type": "tool_use" | "server_tool_use", "input": value}:
            # An input that the token limit cut is stored as a string, and goes as one: half of an object is no JSON.
            empty = {**block, "input": {}}
            text = _json(value).decode()
            deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in _pieces(text)]
        case _:
            return block, []
    return empty, deltas


def _objects(value: object) -> list[dict[str, Any]]:
    """The objects of a list; nothing of what is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _pieces(text: str) -> Iterator[str]:
    """Cut between characters, so that no piece ends in half of a UTF-8 sequence or of a surrogate pair."""
    return (text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS))


def _event(kind: str, **fields: object) -> bytes:
    return b"event: %b\n" % kind.encode() + _data({"type": kind, **fields})


def _data(value: object) -> bytes:
    # Many clients cut lines where Unicode does, and would break an event at these; in JSON they stand in strings alone.
    text = _json(value).replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    return b"data: %b\n\n" % text.replace(b"\xc2\x85", b"\\u0085")


def _json(value: object) -> bytes:
    try:
        return _encode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(value).encode()
