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

from jobs import usual
from jobs.errors import InvalidRequest
from jobs.refusals import HALF_PAIR, message, place, unsupported
from jobs.refusals import shown as shown

if TYPE_CHECKING:
    from jobs.chat import Shape

CHAT: Final = usual.CHAT
MESSAGES: Final = usual.MESSAGES
ENDPOINTS: Final[tuple[str, ...]] = (CHAT, MESSAGES)

MAX_DEPTH: Final = 100
MAX_CUSTOM_ID: Final = 512
# What a prompt alone gets on /v1/messages, where max_tokens must be given: the default of chat completions.
PROMPT_MAX_TOKENS: Final = 32_768

_SHOWN_PROBLEMS = 10
_TOO_DEEP = f"is nested too deeply, {MAX_DEPTH} levels are allowed"
# Control characters, line separators and surrogates: an id is one word or phrase on one line.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,40}")
# White space that JSON has; `bytes.strip` takes more.
_SPACE: Final = b" \t\r\n"
_BATCH_LINE: Final = frozenset({"custom_id", "method", "url", "body"})

T = TypeVar("T")
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_value = msgspec.json.Decoder()


class _Naming(msgspec.Struct):
    """What tells of a good body whether it names a model."""

    model: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_naming = msgspec.json.Decoder(_Naming)


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
        return [Problem(place(item["loc"]), message(item)) for item in error.errors(include_url=False)]
    return []


def unknown_fields(endpoint: str, body: Mapping[str, Any]) -> list[str]:
    """The body's top-level fields that the endpoint's schema does not name."""
    return [] if body.keys() <= (named := _named(endpoint)) else [name for name in body if name not in named]


def parse(line: bytes, *, endpoint: str = CHAT, model: str | None = None) -> Parsed:
    """Read one line of JSON; `endpoint` and `model` are for requests that name none.

    Raises `InvalidLine`, and nothing else whatever the bytes.
    """
    parts = usual.take_apart(line)
    custom_id, at, sent = parts if parts is not None else (None, None, line.strip(_SPACE))
    judged = usual.judge(at or endpoint, sent)
    if judged is not None and not _custom_id(custom_id):
        names = judged.model is not msgspec.UNSET
        return Parsed(Request(at or endpoint, sent if names else _with_model(sent, model), custom_id), [], [])
    taken = _take_apart(line, endpoint)
    try:
        # What was found not to be usual is not tried again.
        names, unknown = (_by_schema if taken.sent == sent else _judged)(taken.endpoint, taken.sent)
    except InvalidLine as error:
        raise InvalidLine([*taken.problems, *error.problems], taken.custom_id) from None
    if taken.problems:
        raise InvalidLine(taken.problems)
    sent = taken.sent if names else _with_model(taken.sent, model)
    return Parsed(Request(taken.endpoint, sent, taken.custom_id), unknown, taken.ignored)


def parse_again(line: bytes, *, endpoint: str = CHAT, model: str | None = None) -> Request:
    """The request of a line that `parse` took, without judging it again; of other lines any, or `InvalidLine`."""
    parts = usual.take_apart(line)
    if parts is not None:
        custom_id, at, sent = parts
    else:
        taken = _take_apart(line, endpoint)
        custom_id, at, sent = taken.custom_id, taken.endpoint, taken.sent
    if model is not None and _decode(_naming, sent).model is msgspec.UNSET:
        sent = _with_model(sent, model)
    return Request(at or endpoint, sent, custom_id)


class _Taken(NamedTuple):
    """A line taken apart, its body not judged yet; `problems` are those of its custom id."""

    custom_id: str | None
    problems: list[Problem]
    endpoint: str
    sent: bytes
    ignored: list[str]


def _take_apart(line: bytes, endpoint: str) -> _Taken:
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
            sent = line.strip(_SPACE) if given_id is None else msgspec.json.encode(fields)
    except InvalidLine as error:
        raise InvalidLine([*problems, *error.problems], custom_id) from None
    return _Taken(custom_id, problems, endpoint, sent, ignored)


def parse_body(body: bytes, endpoint: str, *, model: str | None = None, custom_id: str | None = None) -> Request:
    """Read a bare body, whatever its fields are called; `model` is for one that names none.

    Raises `InvalidLine`, and nothing else whatever the bytes.
    """
    sent = body.strip(_SPACE)
    has_model, _ = _judged(endpoint, sent)
    return Request(endpoint, sent if has_model else _with_model(sent, model), custom_id)


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


def _with_model(sent: bytes, model: str | None) -> bytes:
    """A body that names no model, with this one."""
    return sent if model is None else b'{"model":' + msgspec.json.encode(model) + b"," + sent[1:]


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
    endpoint = CHAT if endpoint is None else endpoint
    fields = {"prompt": request} if isinstance(request, str) else dict(request)
    if custom_id is not None:
        fields["custom_id"] = custom_id
    if (made := _usual(fields, endpoint, model)) is not None:
        return made
    try:
        line = json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise InvalidLine([Problem("", HALF_PAIR)]) from None
    except RecursionError:
        raise InvalidLine([Problem("", _TOO_DEEP)]) from None
    except (TypeError, ValueError):
        raise InvalidLine([Problem("", "holds a value that JSON has not")]) from None
    return parse(line, endpoint=endpoint, model=model).request


def _usual(fields: dict[str, Any], endpoint: str, model: str | None) -> Request | None:
    """The request of these fields if it is a usual one, just as by way of its JSON; None if that is to be gone."""
    custom_id, url, body = fields.get("custom_id"), fields.get("url", endpoint), fields
    if custom_id is not None and (type(custom_id) is not str or _custom_id(custom_id)):
        return None
    if "body" in fields:
        if type(url) is not str or fields.get("method", "POST") != "POST" or not fields.keys() <= _BATCH_LINE:
            return None
        endpoint, body = url, fields["body"]
    elif "prompt" in fields:
        if "messages" in fields or type(fields["prompt"]) is not str:
            return None
        body = {"messages": [{"role": "user", "content": fields["prompt"]}], **fields}
        del body["prompt"]
        if endpoint == MESSAGES and "max_tokens" not in fields:
            body["max_tokens"] = PROMPT_MAX_TOKENS
    if body is not fields.get("body") and "custom_id" in body:
        body = {name: value for name, value in body.items() if name != "custom_id"}
    found = usual.encode(endpoint, body)
    if found is None:
        return None
    sent, judged = found
    return Request(endpoint, sent if judged.model is not msgspec.UNSET else _with_model(sent, model), custom_id)


@cache
def _named(endpoint: str) -> frozenset[str]:
    return frozenset(_schema(endpoint).model_fields)


@cache
def _schema(endpoint: str) -> type[Shape]:
    # Building the models takes longer than most commands have.
    if endpoint == CHAT:
        from jobs.chat import ChatBody

        return ChatBody
    if endpoint == MESSAGES:
        from jobs.messages import MessagesBody

        return MessagesBody
    raise InvalidRequest(f"endpoint: {unsupported(endpoint, *ENDPOINTS)}")


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
        return HALF_PAIR
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
        problems.append(Problem("method", unsupported(method, "POST")))
    if "url" in fields and (endpoint := _decode(_value, fields.pop("url"))) not in ENDPOINTS:
        problems.append(Problem("url", unsupported(endpoint, *ENDPOINTS)))
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


def _judged(endpoint: str, text: bytes) -> tuple[bool, list[str]]:
    """Whether a good body names a model, and its fields that are not known."""
    if (found := usual.judge(endpoint, text)) is not None:
        return found.model is not msgspec.UNSET, []
    return _by_schema(endpoint, text)


def _by_schema(endpoint: str, text: bytes) -> tuple[bool, list[str]]:
    """The same of a body that is not usual."""
    body = _decode(_value, text)
    if not isinstance(body, dict):
        raise InvalidLine([Problem("body", "must be an object")])
    # Brackets in texts count too: few lines have so many that a closer look is worth its time.
    if text.count(b"{") + text.count(b"[") > MAX_DEPTH and _too_deep(body):
        raise InvalidLine([Problem("", _TOO_DEEP)])
    if problems := check(endpoint, body):
        raise InvalidLine(problems)
    return "model" in body, unknown_fields(endpoint, body)


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
