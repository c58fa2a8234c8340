"""One request: which endpoint it is for, the exact JSON that is sent, and the rules that it must keep.

A request comes as a line of the OpenAI batch form `{"custom_id", "method", "url", "body"}`, as a bare body
`{"messages": [...]}`, or as `{"prompt": "..."}`; the last two may carry a `custom_id`, which is not sent. Values are
never decoded and written again: numbers and texts reach the upstream as they were given. No message about a refused
request repeats a text of it, but for a short `url` or `method`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import msgspec

from jobs.errors import InvalidRequest

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from jobs.chat import Shape

CHAT: Final = "/v1/chat/completions"
MESSAGES: Final = "/v1/messages"
ENDPOINTS: Final[tuple[str, ...]] = (CHAT, MESSAGES)

MAX_DEPTH: Final = 100
MAX_CUSTOM_ID: Final = 512
# What a prompt alone gets on /v1/messages, where max_tokens must be given: the default of chat completions.
PROMPT_MAX_TOKENS: Final = 32_768

_SHOWN_PROBLEMS = 10
_TOO_DEEP = f"is nested too deeply, {MAX_DEPTH} levels are allowed"
_HALF_PAIR = "holds half of a surrogate pair (\\ud800 to \\udfff), which no UTF-8 can hold"
# Control characters, line separators and surrogates: an id is one word or phrase on one line.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,40}")

T = TypeVar("T")
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_value = msgspec.json.Decoder()


class Request(msgspec.Struct, frozen=True):
    """A request that keeps every rule; `body` is one JSON object in UTF-8, sent upstream as it is."""

    endpoint: str
    body: bytes
    custom_id: str | None = None

    def __repr__(self) -> str:
        return f"Request({self.endpoint}, body of {len(self.body)} bytes, custom_id={self.custom_id!r})"


class Problem(NamedTuple):
    """A rule that is broken; `field` is empty where it is about the whole request."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class InvalidLine(InvalidRequest):
    """A request that breaks rules; `custom_id` is its own where that much of it could be read."""

    def __init__(self, problems: Sequence[Problem], custom_id: str | None = None) -> None:
        told = [str(problem) for problem in problems[:_SHOWN_PROBLEMS]]
        if len(problems) > len(told):
            told.append(f"and {len(problems) - len(told)} more")
        super().__init__("; ".join(told))
        self.problems = tuple(problems)
        self.custom_id = custom_id


class Parsed(NamedTuple):
    """What a line holds: its request, and the names of fields that are worth a warning."""

    request: Request
    unknown: list[str]
    """Fields of the body that its schema does not name; they are sent."""
    ignored: list[str]
    """Fields beside the `body` of a batch line; they are not sent."""


def check(endpoint: str, body: Mapping[str, Any]) -> list[Problem]:
    """Every rule of the endpoint's schema that a decoded body breaks; of a list, up to its first bad element."""
    from pydantic import ValidationError

    try:
        _schema(endpoint).model_validate(body if type(body) is dict else dict(body))
    except ValidationError as error:
        return [Problem(_place(item["loc"]), _message(item)) for item in error.errors(include_url=False)]
    return []


def unknown_fields(endpoint: str, body: Mapping[str, Any]) -> list[str]:
    """The body's top-level fields that the endpoint's schema does not name."""
    named = _schema(endpoint).model_fields
    return [name for name in body if name not in named]


def parse(line: bytes, *, endpoint: str = CHAT, model: str | None = None) -> Parsed:
    """Read one line of JSON; `endpoint` and `model` are for requests that name none.

    Raises `InvalidLine`, and nothing else whatever the bytes.
    """
    fields = _decode(_fields, line)
    given_id = fields.pop("custom_id", None)
    custom_id = None if given_id is None else _decode(_value, given_id)
    problems = _custom_id(custom_id)
    if problems:
        custom_id = None
    ignored: list[str] = []
    try:
        if not fields.keys().isdisjoint(("body", "url", "method")):
            endpoint, sent = _unwrap(fields, endpoint)
            ignored = list(fields)
        elif "prompt" in fields:
            sent = msgspec.json.encode(_with_messages(fields, endpoint))
        else:
            sent = line.strip() if given_id is None else msgspec.json.encode(fields)
        body = _judged(endpoint, sent)
    except InvalidLine as error:
        raise InvalidLine([*problems, *error.problems], custom_id) from None
    if problems:
        raise InvalidLine(problems)
    return Parsed(Request(endpoint, _with_model(sent, body, model), custom_id), unknown_fields(endpoint, body), ignored)


def parse_body(body: bytes, endpoint: str, *, model: str | None = None, custom_id: str | None = None) -> Request:
    """Read a bare body, whatever its fields are called; `model` is for one that names none.

    Raises `InvalidLine`, and nothing else whatever the bytes.
    """
    sent = body.strip()
    return Request(endpoint, _with_model(sent, _judged(endpoint, sent), model), custom_id)


def members(line: bytes) -> dict[str, msgspec.Raw]:
    """The members of one JSON object, not decoded. Raises `InvalidLine`, and nothing else whatever the bytes."""
    return _decode(_fields, line)


def plain(name: str) -> str:
    """The name of an unknown member where it may be repeated: what looks like a name holds no prompt. Else ''."""
    return name if _PLAIN.fullmatch(name) else ""


def check_custom_id(custom_id: str) -> None:
    """Raises `InvalidLine` where it breaks a rule."""
    if problems := _custom_id(custom_id):
        raise InvalidLine(problems)


def _with_model(sent: bytes, body: dict[str, Any], model: str | None) -> bytes:
    if model is None or "model" in body:
        return sent
    return b'{"model":' + msgspec.json.encode(model) + b"," + sent[1:]


def make_request(
    request: Mapping[str, Any] | str,
    *,
    endpoint: str | None = None,
    model: str | None,
    custom_id: str | None = None,
) -> Request:
    """A request from Python: the fields of any form that a line may have, or a prompt.

    `endpoint` (chat completions unless given) and `model` are for a request that names none; `custom_id` goes before
    the request's own. Raises `InvalidRequest` with one line of all that is wrong.
    """
    fields = {"prompt": request} if isinstance(request, str) else dict(request)
    if custom_id is not None:
        fields["custom_id"] = custom_id
    try:
        line = json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise InvalidLine([Problem("", _HALF_PAIR)]) from None
    except RecursionError:
        raise InvalidLine([Problem("", _TOO_DEEP)]) from None
    except (TypeError, ValueError):
        raise InvalidLine([Problem("", "holds a value that JSON has not")]) from None
    return parse(line, endpoint=CHAT if endpoint is None else endpoint, model=model).request


@cache
def _schema(endpoint: str) -> type[Shape]:
    # Building the models takes longer than most commands have.
    if endpoint == CHAT:
        from jobs.chat import ChatBody

        return ChatBody
    if endpoint == MESSAGES:
        from jobs.messages import MessagesBody

        return MessagesBody
    raise InvalidRequest(f"endpoint: {_unsupported(endpoint, *ENDPOINTS)}")


def _decode(decoder: msgspec.json.Decoder[T], data: bytes | msgspec.Raw) -> T:
    try:
        return decoder.decode(data)
    except (ValueError, RecursionError) as error:
        raise InvalidLine([Problem("", _why(bytes(data), error))]) from None


def _why(data: bytes, error: Exception) -> str:
    """Why bytes are not JSON, in words of our own: the decoder's may quote what they found."""
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    if b"\0" in data:
        return "holds NUL bytes; write the file in UTF-8"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "is not UTF-8"
    if isinstance(error, msgspec.ValidationError):
        return "holds a number out of range" if "out of range" in str(error) else "is not a JSON object"
    constants: list[str] = []
    place = ""
    try:
        json.loads(text, parse_constant=constants.append)
    except json.JSONDecodeError as other:
        place = f" (character {other.pos + 1})" if other.pos < len(text) else ", it ends too early"
    except (ValueError, RecursionError):  # its own limits, met before the fault
        return "is not JSON"
    if constants:
        return "holds NaN or Infinity, which JSON has not"
    if not place and "\\ud" in text.lower():
        return _HALF_PAIR
    return f"is not JSON{place}"


def _custom_id(value: object) -> list[Problem]:
    if value is None:
        return []
    if not isinstance(value, str):
        message = "must be a string"
    elif not 1 <= len(value) <= MAX_CUSTOM_ID:
        message = f"has {len(value)} characters, 1 to {MAX_CUSTOM_ID} are allowed"
    elif _UNPRINTABLE.search(value):
        message = "must not hold control characters or line breaks"
    else:
        return []
    return [Problem("custom_id", message)]


def _unwrap(fields: dict[str, msgspec.Raw], endpoint: str) -> tuple[str, bytes]:
    """Take the endpoint and the body out of a batch line."""
    problems = []
    if "method" in fields and (method := _decode(_value, fields.pop("method"))) != "POST":
        problems.append(Problem("method", _unsupported(method, "POST")))
    if "url" in fields and (endpoint := _decode(_value, fields.pop("url"))) not in ENDPOINTS:
        problems.append(Problem("url", _unsupported(endpoint, *ENDPOINTS)))
    if "body" not in fields:
        problems.append(Problem("body", "is missing"))
    if problems:
        raise InvalidLine(problems)
    return endpoint, bytes(fields.pop("body"))


def _with_messages(fields: dict[str, msgspec.Raw], endpoint: str) -> dict[str, msgspec.Raw]:
    """A body with the prompt as its one message."""
    if "messages" in fields:
        raise InvalidLine([Problem("prompt", "stands beside messages; give one of them")])
    if not isinstance(_decode(_value, fields["prompt"]), str):
        raise InvalidLine([Problem("prompt", "must be a string")])
    message = msgspec.Raw(b'[{"role":"user","content":' + bytes(fields["prompt"]) + b"}]")
    body = {"messages": message, **fields}
    del body["prompt"]
    if endpoint == MESSAGES and "max_tokens" not in fields:
        body["max_tokens"] = msgspec.Raw(str(PROMPT_MAX_TOKENS).encode())
    return body


def _judged(endpoint: str, text: bytes) -> dict[str, Any]:
    body = _decode(_value, text)
    if not isinstance(body, dict):
        raise InvalidLine([Problem("body", "must be an object")])
    # Brackets in texts count too: few lines have so many that a closer look is worth its time.
    if text.count(b"{") + text.count(b"[") > MAX_DEPTH and _too_deep(body):
        raise InvalidLine([Problem("", _TOO_DEEP)])
    if problems := check(endpoint, body):
        raise InvalidLine(problems)
    return body


def _too_deep(body: dict[str, Any]) -> bool:
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for outer in level
            for child in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(child, (dict, list))
        ]
    return bool(level)


def _place(loc: tuple[int | str, ...]) -> str:
    """`messages[3].role` of a validation error; the tags of unions are no part of the way."""
    place = ""
    for step in loc:
        if isinstance(step, int):
            place += f"[{step}]"
        elif not step.startswith("<"):
            place += f".{step}" if place else step
    return place


_TYPES: Final = {
    "missing": "is missing",
    "string_type": "must be a string",
    "string_unicode": _HALF_PAIR,
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "finite_number": "must be a finite number",
    # Rules that are written out in the models.
    "text_or_list": "must be a string or a list",
    "content_needed": "needs content, tool_calls or reasoning_content",
    "schema_needed": "needs an input_schema",
}
_BOUNDS: Final = {
    "greater_than": ("gt", "not over"),
    "greater_than_equal": ("ge", "under"),
    "less_than": ("lt", "not under"),
    "less_than_equal": ("le", "over"),
}


def _message(error: ErrorDetails) -> str:
    """What is wrong, without any text of the request."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind in _BOUNDS:
        bound, relation = _BOUNDS[kind]
        # An integer of a thousand digits would fill the line.
        number = value if isinstance(value, float) or abs(value) < 10**20 else "the number"
        return f"{number} is {relation} {context[bound]:g}"
    if kind == "literal_error":
        names = context["expected"].replace("'", "").replace(" or ", ", ")
        return f"must be one of {names}" if ", " in names else f"must be {names}"
    if kind in ("too_long", "string_too_long"):
        things = "characters" if kind == "string_too_long" else "sequences" if "stop" in error["loc"] else "items"
        return f"has {len(value)} {things}, at most {context['max_length']} are allowed"
    if kind in ("too_short", "string_too_short"):
        return "is empty"
    return _TYPES.get(kind, "is not valid")


def _unsupported(value: object, *supported: str) -> str:
    if not isinstance(value, str):
        return "must be a string"
    return f"{shown(value) or 'an empty string'} is not supported; use {' or '.join(supported)}"


def shown(name: str) -> str:
    """The first 60 characters of a name that a user gave, safe for a terminal."""
    return "".join(char if char.isprintable() else "?" for char in name[:60])
