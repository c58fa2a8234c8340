"""The requests of a message batch: judged one by one as they come, and what is wrong told as Anthropic does.

From the first bad request on nothing more is handed out, the rest is only judged. Texts name fields and rules, and repeat
nothing of a request but numbers that are out of bounds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from api.anthropic.shapes import CUSTOM_ID
from api.elements import Elements
from api.problems import Problem
from jobs.requests import MESSAGES, InvalidLine, Request, members, parse_body, plain
from jobs.settings import Settings

#: Broken rules that are told: the protocol has one text for all.
SHOWN_FAULTS = 5

_CUSTOM_ID = re.compile(CUSTOM_ID.strip("^$"))
_PLACE = re.compile(r"\[(\d+)\]")


class _Fault(NamedTuple):
    """A rule that an element breaks; `field` is empty where it is about the whole of it."""

    field: str
    message: str


class _Told(msgspec.Struct):
    """What a good body says that matters to its batch."""

    stream: bool | None = None


_decode_value = msgspec.json.Decoder().decode
_decode_told = msgspec.json.Decoder(_Told).decode


def messages(elements: Elements, settings: Settings, model: str | None) -> Iterator[Request]:
    """The requests; once one breaks a rule no more come, the rest is only judged, and a `Problem` tells of them."""
    most, longest = settings.message_batch_max_requests, settings.max_line_bytes
    ids: set[bytes] = set()
    told: list[str] = []
    faulty = count = 0

    def tell(place: str, message: str) -> None:
        nonlocal faulty
        faulty += 1
        if len(told) < SHOWN_FAULTS:
            told.append(f"{place}: {message}")

    for index, raw in elements:
        count += 1
        if count > most:
            raise Problem(400, "too_many_requests", f"requests: has over {most:,} items")
        if raw is None:
            tell(f"requests.{index}", f"is longer than {longest:,} bytes")
            continue
        request, faults = _message(raw, ids, model)
        for fault in faults:
            tell(f"requests.{index}.{fault.field}" if fault.field else f"requests.{index}", fault.message)
        if not faulty and request is not None:
            yield request
    if not elements.found:
        tell("requests", "is missing")
    elif not count:
        tell("requests", "is empty")
    for name in elements.rest:
        tell(plain(name) or "a member", "is not known; a message batch has `requests` alone")
    if faulty:
        first, *next_ones = told
        more = f"; and {faulty - 1:,} more, as {'; '.join(next_ones)}" if next_ones else ""
        raise Problem(400, "invalid_requests", first + more)


def _message(raw: bytes, ids: set[bytes], model: str | None) -> tuple[Request | None, list[_Fault]]:
    """The request of one element, or the rules that it breaks; `ids` are digests of the custom ids before it."""
    try:
        found = members(raw)
    except InvalidLine as error:
        return None, [_Fault("", error.problems[0].message)]
    faults: list[_Fault] = []
    custom_id = _custom_id(found.pop("custom_id", None), ids, faults)
    params = found.pop("params", None)
    request = None
    if params is None:
        faults.append(_Fault("params", "is missing"))
    elif not (body := bytes(params)).startswith(b"{"):
        faults.append(_Fault("params", "must be an object"))
    else:
        try:
            request = parse_body(body, MESSAGES, model=model, custom_id=custom_id)
        except InvalidLine as error:
            faults += [_Fault(_in_params(problem.field), problem.message) for problem in error.problems]
        else:
            if _decode_told(request.body).stream:
                faults.append(_Fault("params.stream", "is not supported in a batch"))
    for name in found:
        faults.append(_Fault(plain(name), "stands beside custom_id and params"))
    return request, faults


def _custom_id(raw: msgspec.Raw | None, ids: set[bytes], faults: list[_Fault]) -> str | None:
    if raw is None:
        faults.append(_Fault("custom_id", "is missing"))
        return None
    try:
        value = _decode_value(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, str) or not _CUSTOM_ID.fullmatch(value):
        faults.append(_Fault("custom_id", f"must be a string that matches {CUSTOM_ID}"))
        return None
    # 8 bytes each, not the ids: there may be many. A bad request keeps its id, so that mending it makes no other one bad.
    digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
    if digest in ids:
        faults.append(_Fault("custom_id", "is that of an earlier request too"))
    ids.add(digest)
    return value


def _in_params(field: str) -> str:
    """`params.messages.3.role` of `messages[3].role`, as Anthropic writes it."""
    return _PLACE.sub(r".\1", f"params.{field}" if field else "params")
