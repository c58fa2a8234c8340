"""The input of an OpenAI batch: judged strictly, line by line, and all that is wrong told with line numbers.

What is bad is told once it is all known: from the first bad line on nothing more is handed out, the rest is only judged.
Texts name fields and rules, and repeat nothing of a request but numbers that are out of bounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Final, NamedTuple

import msgspec

from jobs.errors import MimoqError
from jobs.requests import InvalidLine, Problem, Request, check_custom_id, members, parse_body, plain
from producers.reader import lines

#: Bad lines that are told of one by one.
MOST_ERRORS: Final = 10_000

_MISSING: Final = "is missing"


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with a line of the file (from 1), or with the file; `param` names the field."""

    code: str | None
    line: int | None
    message: str | None
    param: str | None


class InvalidInput(MimoqError):
    """Lines that break rules, in their order; no batch can be made of the input."""

    def __init__(self, errors: list[LineError]) -> None:
        first = errors[0]
        place = "" if first.line is None else f"line {first.line}: "
        more = "; and more" if len(errors) > 1 else ""
        super().__init__(f"{place}{first.message}{more}")
        self.errors = errors


class _Fault(NamedTuple):
    """A rule that a line breaks; `param` is empty where it is about the whole line."""

    code: str
    param: str
    message: str


class _Told(msgspec.Struct):
    """What a good body says that matters to its batch."""

    model: str = ""
    stream: bool | None = None


_decode_value = msgspec.json.Decoder().decode
_decode_told = msgspec.json.Decoder(_Told).decode


class InputLines:
    """Judges one input: requests to `endpoint`, `model` for those that name none, at most `max_requests`.

    `lenient` is for requests that came inline, which need no `method` and no `url`. `model` is that of the first good
    request that has one, '' before. Memory grows by the ids, about 100 bytes each, and by what is wrong.
    """

    def __init__(
        self, endpoint: str, *, model: str | None, max_requests: int, max_line_bytes: int, lenient: bool = False
    ) -> None:
        self.model = ""
        self._endpoint = endpoint
        self._default = model
        self._max_requests = max_requests
        self._max_line_bytes = max_line_bytes
        self._lenient = lenient
        self._ids: set[bytes] = set()

    def requests(self, stream: BinaryIO) -> Iterator[Request]:
        """The requests of a file of JSON lines. Raises `InvalidInput` once it has judged all of them."""
        return self.judged(lines(stream, self._max_line_bytes))

    def judged(self, found: Iterable[tuple[int, bytes | None]]) -> Iterator[Request]:
        """The requests of what is numbered already, None for one that is too long. Raises `InvalidInput` as `requests`."""
        errors: list[LineError] = []
        count, bad = 0, 0
        for number, raw in found:
            count += 1
            if count > self._max_requests:
                break
            request, faults = self._judge(raw)
            if faults:
                bad += 1
                if bad <= MOST_ERRORS:
                    errors.append(_told(number, faults))
            elif not bad and request is not None:
                yield request
        if bad > MOST_ERRORS:
            errors.append(_of_all("too_many_errors", f"and {bad - MOST_ERRORS:,} more lines that break a rule"))
        if count > self._max_requests:
            errors.append(_of_all("too_many_requests", f"has more than {self._max_requests:,} requests"))
        if not count:
            errors.append(_of_all("empty_file", "has no request"))
        if errors:
            raise InvalidInput(errors)

    def _judge(self, raw: bytes | None) -> tuple[Request | None, list[_Fault]]:
        if raw is None:
            return None, [_Fault("line_too_long", "", f"is longer than {self._max_line_bytes:,} bytes")]
        try:
            found = members(raw)
        except InvalidLine as error:
            return None, [_Fault("invalid_json_line", "", error.problems[0].message)]
        faults: list[_Fault] = []
        custom_id = self._custom_id(found.pop("custom_id", None), faults)
        self._addressed("method", found.pop("method", None), "POST", "", faults)
        self._addressed("url", found.pop("url", None), self._endpoint, ", the endpoint of the batch", faults)
        request = self._body(found.pop("body", None), custom_id, faults)
        beside = "stands beside custom_id, method, url and body"
        faults += [_Fault("invalid_request", plain(name), beside) for name in found]
        if not faults and request is not None:
            self.model = self.model or model_of(request.body)
        return request, faults

    def _custom_id(self, raw: msgspec.Raw | None, faults: list[_Fault]) -> str | None:
        value = _value(raw)
        if value is None:
            faults.append(_Fault("missing_required_parameter", "custom_id", _MISSING))
            return None
        if not isinstance(value, str):
            faults.append(_Fault("invalid_custom_id", "custom_id", "must be a string"))
            return None
        try:
            check_custom_id(value)
        except InvalidLine as error:
            faults += [_Fault("invalid_custom_id", "custom_id", problem.message) for problem in error.problems]
            return None
        # A bad line keeps its id, so that mending it makes no other line bad.
        digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
        if digest in self._ids:
            faults.append(_Fault("duplicate_custom_id", "custom_id", "stands on an earlier line too"))
        self._ids.add(digest)
        return value

    def _addressed(self, name: str, raw: msgspec.Raw | None, wanted: str, note: str, faults: list[_Fault]) -> None:
        """Judges `method` and `url`, which have one value each."""
        if raw is None:
            if not self._lenient:
                faults.append(_Fault("missing_required_parameter", name, _MISSING))
        elif _value(raw) != wanted:
            faults.append(_Fault(f"invalid_{name}", name, f"must be {wanted}{note}"))

    def _body(self, raw: msgspec.Raw | None, custom_id: str | None, faults: list[_Fault]) -> Request | None:
        if raw is None:
            faults.append(_Fault("missing_required_parameter", "body", _MISSING))
            return None
        body = bytes(raw)
        if not body.startswith(b"{"):
            faults.append(_Fault("invalid_request", "body", "must be an object"))
            return None
        request: Request | None = None
        broken: list[_Fault] = []
        try:
            request = parse_body(body, self._endpoint, model=self._default, custom_id=custom_id)
            told = _decode_told(request.body)
        except InvalidLine as error:
            broken = [_of_body(problem) for problem in error.problems]
            told = _half_told(body)
        if told.stream:
            faults.append(_Fault("streaming_unsupported", "body.stream", "is not supported in a batch"))
        if told.model and self.model and told.model != self.model:
            faults.append(_Fault("mismatched_model", "body.model", "is another than that of the lines before"))
        faults += broken
        return request


def model_of(body: bytes) -> str:
    """The model that a good body names, '' for none."""
    return _decode_told(body).model


def _of_body(problem: Problem) -> _Fault:
    if not problem.field:
        return _Fault("invalid_json_line", "body", problem.message)
    code = "missing_required_parameter" if problem.message == _MISSING else "invalid_request"
    return _Fault(code, f"body.{problem.field}", problem.message)


def _half_told(body: bytes) -> _Told:
    """What a bad body says of these two, as far as they are right."""
    try:
        found = members(body)
    except InvalidLine:
        return _Told()
    model, stream = _value(found.get("model")), _value(found.get("stream"))
    return _Told(model if isinstance(model, str) else "", stream is True)


def _value(raw: msgspec.Raw | None) -> Any:
    """What a member holds; not a string, where it can't be decoded."""
    if raw is None:
        return None
    try:
        return _decode_value(raw)
    except (ValueError, RecursionError):
        return False


def _told(number: int, faults: list[_Fault]) -> LineError:
    """The one error of a line: the first fault's code and param, the messages of all (of many, the first)."""
    message = str(InvalidLine([Problem(fault.param, fault.message) for fault in faults]))
    return LineError(faults[0].code, number, message, faults[0].param or None)


def _of_all(code: str, message: str) -> LineError:
    return LineError(code, None, message, None)
