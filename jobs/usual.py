"""The usual bodies, judged while they are decoded: far quicker than by the schemas, which only say what is wrong.

What these shapes take keeps every rule of its endpoint's schema (`jobs.chat`, `jobs.messages`), has no field that this does
not name, and is not nested deeply. What they don't take may be wrong or only rare (tools, images, fields of a new kind): the
schema decides. So nothing here may allow what a schema refuses; a test holds one against the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

CHAT: Final = "/v1/chat/completions"
MESSAGES: Final = "/v1/messages"

MAX_TOKENS: Final = 131_072

Tokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Temperature = Annotated[float, Meta(ge=0, le=1.5)]
TopP = Annotated[float, Meta(gt=0, le=1)]
Model = Annotated[str, Meta(min_length=1)]


class _Shape(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One that is dropped as soon as it has been made: the garbage collector need not look at it."""


class _TextPart(_Shape):
    type: Literal["text"]
    text: str


class _Thinking(_Shape):
    type: Literal["enabled", "disabled"]


class _Message(_Shape):
    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[_TextPart]
    name: str | None = None
    tool_call_id: str | None = None


class _Turn(_Shape):
    role: Literal["user", "assistant"]
    content: str | list[_TextPart]


class ChatBody(_Shape):
    messages: Annotated[list[_Message], Meta(min_length=1)]
    model: Model | UnsetType = UNSET
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    max_completion_tokens: Tokens | None = None
    stop: str | Annotated[list[str], Meta(max_length=4)] | None = None
    stream: bool | None = None
    temperature: Temperature | UnsetType = UNSET
    thinking: _Thinking | UnsetType = UNSET
    top_p: TopP | UnsetType = UNSET


class MessagesBody(_Shape):
    messages: Annotated[list[_Turn], Meta(min_length=1)]
    max_tokens: Tokens
    model: Model | UnsetType = UNSET
    stop_sequences: list[str] | UnsetType = UNSET
    stream: bool | None = None
    system: str | list[_TextPart] | UnsetType = UNSET
    temperature: Temperature | UnsetType = UNSET
    top_k: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    top_p: TopP | UnsetType = UNSET


class _Line(_Shape):
    """A line of the OpenAI batch form."""

    body: msgspec.Raw
    custom_id: str | None = None
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions", "/v1/messages"] | UnsetType = UNSET


SHAPES: Final[Mapping[str, type[ChatBody] | type[MessagesBody]]] = {CHAT: ChatBody, MESSAGES: MessagesBody}

_decoders = {endpoint: msgspec.json.Decoder(shape) for endpoint, shape in SHAPES.items()}
_decode_line = msgspec.json.Decoder(_Line).decode
_encode = msgspec.json.Encoder().encode
# As JSON has them, and as both encoders write them; no `Decimal`, nothing of a class of somebody's own.
_PLAIN: Final = frozenset({str, int, bool, list, dict, type(None)})
_CONTENT: Final = frozenset({str, list, tuple})


def take_apart(line: bytes) -> tuple[str | None, str | None, bytes] | None:
    """Custom id, endpoint and body of a line of the batch form, not judged; None for a line that is none, or not usual."""
    if b'"body"' not in line:
        return None
    try:
        found = _decode_line(line)
    except (ValueError, RecursionError):
        return None
    return found.custom_id, None if found.url is UNSET else found.url, bytes(found.body)


def judge(endpoint: str, body: bytes) -> ChatBody | MessagesBody | None:
    """The body if it is a usual one, and so keeps every rule of this endpoint; None if that is for the schema to say."""
    if b'"messages"' not in body:
        return None
    try:
        return _decoders[endpoint].decode(body)
    except (ValueError, RecursionError, KeyError):
        return None


def encode(endpoint: str, body: Any) -> tuple[bytes, ChatBody | MessagesBody] | None:
    """A usual body from Python as `json.dumps` would write it, and what `judge` says of it; None for any other."""
    if type(body) is not dict or not all(map(_plain, body.values())):
        return None
    try:
        judged = msgspec.convert(body, SHAPES[endpoint])
        # It takes sets for lists, which JSON has not.
        if not all(type(message.get("content")) in _CONTENT for message in body["messages"]):
            return None
        return _encode(body), judged
    except (ValueError, TypeError, RecursionError, KeyError):
        return None


def _plain(value: object) -> bool:
    # Two encoders write the exponent of a number in two ways.
    kind = type(value)
    return kind in _PLAIN or (kind is float and "e" not in repr(value))
