"""What a response body says, read once and tolerantly: answer or error, its usage, its id.

Only what verdicts and accounting need is decoded; the body itself stays as it came. Nothing here raises: a body that
is not what it should be gives an `Answer` that says so.
"""

from __future__ import annotations

from typing import Any

import msgspec

from jobs.usage import Usage, read_usage

MESSAGES = "/v1/messages"

# Anthropic's error types, which stand in for a status inside a stream.
_STATUS_OF_TYPE = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}

NOT_JSON = (msgspec.MsgspecError, ValueError, RecursionError)
"""Everything msgspec raises for bytes it can't decode; bad UTF-8 is a plain ValueError."""

_NOTHING = frozenset((b"", b"null", b'""', b"[]", b"{}", b"false"))


class UpstreamError(msgspec.Struct, frozen=True):
    """The error object of a body: the HTTP status it stands for, where it names one, and its text."""

    status: int | None
    text: str


class Answer(msgspec.Struct, frozen=True):
    """What one whole body of a 2xx response holds."""

    id: str | None = None
    usage: Usage | None = None
    well_formed: bool = False
    """A chat completion with a message, or an Anthropic message with content blocks."""
    has_content: bool = False
    """There is text, a tool call or a refusal: more than thinking."""
    finish: tuple[str, ...] = ()
    """The reasons given for its end; a gateway's own word and the model's native one may differ."""
    error: UpstreamError | None = None


class _Message(msgspec.Struct):
    content: msgspec.Raw = msgspec.Raw()
    reasoning_content: msgspec.Raw = msgspec.Raw()
    tool_calls: msgspec.Raw = msgspec.Raw()
    function_call: msgspec.Raw = msgspec.Raw()
    refusal: msgspec.Raw = msgspec.Raw()


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: Any = None
    native_finish_reason: Any = None


class _Chat(msgspec.Struct):
    choices: list[_Choice]
    id: Any = None
    usage: msgspec.Raw = msgspec.Raw()
    error: msgspec.Raw = msgspec.Raw()


class _Block(msgspec.Struct):
    type: str
    text: msgspec.Raw = msgspec.Raw()


class _Messages(msgspec.Struct):
    content: list[_Block]
    id: Any = None
    stop_reason: Any = None
    usage: msgspec.Raw = msgspec.Raw()
    error: msgspec.Raw = msgspec.Raw()


class _Head(msgspec.Struct):
    id: Any = None
    usage: msgspec.Raw = msgspec.Raw()
    error: msgspec.Raw = msgspec.Raw()


_chat = msgspec.json.Decoder(_Chat)
_messages = msgspec.json.Decoder(_Messages)
_head = msgspec.json.Decoder(_Head)
_any = msgspec.json.Decoder()


def read_answer(endpoint: str, body: bytes) -> Answer:
    """What the body of a 2xx response of this endpoint holds."""
    try:
        str(body, "utf-8")  # fields that are skipped are not checked by the decoder
        return _read_messages(body) if endpoint == MESSAGES else _read_chat(body)
    except NOT_JSON:
        return _read_other(body)


def _read_chat(body: bytes) -> Answer:
    chat = _chat.decode(body)
    if not chat.choices:
        return _read_other(body)
    choice = chat.choices[0]
    message = choice.message
    thought = _filled(message.reasoning_content)
    return Answer(
        id=_text(chat.id),
        usage=read_usage(chat.usage),
        well_formed=True,
        # After thinking, a line feed is all that some models add; without thinking it may be what was asked for.
        has_content=(_visible(message.content) if thought else _filled(message.content))
        or _filled(message.tool_calls)
        or _filled(message.function_call)
        or _filled(message.refusal),
        finish=_reasons(choice.finish_reason, choice.native_finish_reason),
    )


def _read_messages(body: bytes) -> Answer:
    message = _messages.decode(body)
    return Answer(
        id=_text(message.id),
        usage=read_usage(message.usage),
        well_formed=True,
        has_content=any(map(_speaks, message.content)),
        finish=_reasons(message.stop_reason),
    )


def _speaks(block: _Block) -> bool:
    if block.type == "text":
        return _visible(block.text)
    return block.type not in ("thinking", "redacted_thinking")


def _read_other(body: bytes) -> Answer:
    """A body without an answer: an error object, or nothing we know."""
    try:
        head = _head.decode(body)
        error = _read_error(_any.decode(head.error)) if _filled(head.error) else None
    except NOT_JSON:
        return Answer()
    return Answer(id=_text(head.id), usage=read_usage(head.usage), error=error)


def _read_error(error: object) -> UpstreamError:
    if not isinstance(error, dict):
        return UpstreamError(status=None, text=str(error))
    text = error.get("message")
    for name in ("code", "status"):
        try:
            status = int(error.get(name, ""))
        except (TypeError, ValueError):
            continue
        if 400 <= status <= 599:
            break
    else:
        status = _STATUS_OF_TYPE.get(str(error.get("type")), 0)
    return UpstreamError(status=status or None, text=text if isinstance(text, str) else "")


def _filled(raw: msgspec.Raw | bytes) -> bool:
    view = memoryview(raw)
    return len(view) > 5 or bytes(view) not in _NOTHING


def _visible(raw: msgspec.Raw | bytes) -> bool:
    """Whether a JSON value holds more than white space."""
    if not _filled(raw):
        return False
    if len(memoryview(raw)) > 256:
        return True
    value = _any.decode(raw)
    return not isinstance(value, str) or bool(value.strip())


def _reasons(*values: object) -> tuple[str, ...]:
    return tuple(value for value in values if isinstance(value, str))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
