"""Reading an input file of requests, one JSON line each, in two passes.

`validate` judges the whole file and its digest before anything is submitted; `requests` reads it again to submit it. The
same bytes have the same judgement, so it judges again only where there are bad lines to tell from good ones. A line is held
at a time: memory grows with the file by its `custom_id`s only (about 150 bytes each; the ids that lines without one get cost
a bit each).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, Protocol

from jobs.errors import UsageError
from jobs.requests import CHAT, InvalidLine, Parsed, Problem, Request, parse, parse_again, shown

__all__ = ["Defaults", "InvalidLine", "Report", "lines", "parse_line", "requests", "validate"]

CHUNK_BYTES: Final = 1 << 18
SHOWN_PROBLEMS: Final = 100
SHOWN_WARNINGS: Final = 100
CHANGED: Final = "the input changed while it was read, nothing was submitted"

_BOM: Final = b"\xef\xbb\xbf"
_GENERATED = re.compile(r"line-([1-9][0-9]{0,17})")


class Digest(Protocol):
    """What hashlib's objects can do."""

    def update(self, data: bytes, /) -> object: ...


@dataclass(slots=True, frozen=True)
class Defaults:
    """What a line without an endpoint or a model of its own gets; no `model`: it stays without."""

    endpoint: str = CHAT
    model: str | None = None


@dataclass(slots=True, frozen=True)
class Report:
    """What a full pass over the input found."""

    total: int
    """Good lines: the requests that can be submitted."""
    bad: int
    """Refused lines."""
    problems: list[str]
    """The first 100 of them, as `line 17: temperature: 1.9 is over 1.5`; or that the file has no request."""
    warnings: list[str]
    """One for each field name that is passed on unjudged, or left out."""
    digest: str
    """BLAKE2b of the content, 32 hexadecimal digits."""

    @property
    def ok(self) -> bool:
        return self.bad == 0 and self.total > 0


def lines(stream: BinaryIO, max_line_bytes: int, digest: Digest | None = None) -> Iterator[tuple[int, bytes | None]]:
    """`(line number from 1, line)` of every line that is not blank, without its line end and BOM.

    A line over `max_line_bytes` comes as None and is never held whole. Every byte read goes to `digest` too.
    """
    number, size = 0, 0
    pieces: list[bytes] = []  # of the line that the chunks so far left open, while it may still be short enough
    held = max_line_bytes + len(_BOM) + len(b"\r")
    while chunk := stream.read(CHUNK_BYTES):
        if digest is not None:
            digest.update(chunk)
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            number += 1
            if size:
                pieces.append(line)
                told = _trimmed(b"".join(pieces), max_line_bytes) if size + len(line) <= held else None
                pieces.clear()
                size = 0
            else:
                told = _trimmed(line, max_line_bytes)
            if told != b"":
                yield number, told
        size += len(rest)
        if size <= held:
            pieces.append(rest)
        else:
            pieces.clear()
    told = _trimmed(b"".join(pieces), max_line_bytes) if size <= held else None
    if told != b"":
        yield number + 1, told


def _trimmed(line: bytes, max_line_bytes: int) -> bytes | None:
    # Files with a BOM that were joined by `cat` have one in the middle, so any line may begin with it.
    line = line.removeprefix(_BOM).removesuffix(b"\r")
    if len(line) > max_line_bytes:
        return None
    return b"" if line.isspace() else line


def parse_line(raw: bytes, defaults: Defaults) -> Request:
    """The request of one line; raises `InvalidLine`, and nothing else whatever the bytes."""
    return parse(raw, endpoint=defaults.endpoint, model=defaults.model).request


def validate(
    stream: BinaryIO, defaults: Defaults, max_line_bytes: int, on_line: Callable[[int], object] | None = None
) -> Report:
    """Judge every line; `on_line` is called with each line's number."""
    digest = hashlib.blake2b(digest_size=16)
    total = bad = 0
    problems: list[str] = []
    warnings = _Warnings()
    for number, found in _judged(stream, defaults, max_line_bytes, digest):
        if isinstance(found, InvalidLine):
            bad += 1
            if bad <= SHOWN_PROBLEMS:
                problems.append(f"line {number}: {found}")
        else:
            total += 1
            if found.unknown or found.ignored:
                warnings.note(number, found)
        if on_line is not None:
            on_line(number)
    if not total and not bad:
        problems.append("the file has no request")
    return Report(total, bad, problems, warnings.told(), digest.hexdigest())


def requests(
    stream: BinaryIO, defaults: Defaults, max_line_bytes: int, report: Report
) -> Iterator[tuple[int, Request | InvalidLine]]:
    """`(line number, request)` of every line of what `report` is of, each with a `custom_id`: its own or `line-<number>`.

    A bad line comes as its `InvalidLine`, with a `custom_id` too. Raises `UsageError`, at the end at the latest, when the
    content is not what was validated; what came until then is not to be trusted.
    """
    digest = hashlib.blake2b(digest_size=16)
    found: Request | InvalidLine
    try:
        for number, found in (_again if report.bad == 0 else _sorted)(stream, defaults, max_line_bytes, digest):
            if isinstance(found, Request) and found.custom_id is None:
                found = Request(found.endpoint, found.body, f"line-{number}")
            yield number, found
    except InvalidLine:
        raise UsageError(CHANGED) from None
    if digest.hexdigest() != report.digest:
        raise UsageError(CHANGED)


def _again(
    stream: BinaryIO, defaults: Defaults, max_line_bytes: int, digest: Digest
) -> Iterator[tuple[int, Request | InvalidLine]]:
    """What the lines hold, all of which were good."""
    endpoint, model = defaults.endpoint, defaults.model
    for number, line in lines(stream, max_line_bytes, digest):
        if line is None:
            raise UsageError(CHANGED)
        yield number, parse_again(line, endpoint=endpoint, model=model)


def _sorted(
    stream: BinaryIO, defaults: Defaults, max_line_bytes: int, digest: Digest
) -> Iterator[tuple[int, Request | InvalidLine]]:
    """What the lines hold, good and bad."""
    for number, found in _judged(stream, defaults, max_line_bytes, digest):
        yield number, found if isinstance(found, InvalidLine) else found.request


def _judged(
    stream: BinaryIO, defaults: Defaults, max_line_bytes: int, digest: Digest
) -> Iterator[tuple[int, Parsed | InvalidLine]]:
    """What each line holds, or why it is refused; a repeated `custom_id` is among the reasons."""
    ids = _CustomIds()
    endpoint, model = defaults.endpoint, defaults.model
    found: Parsed | InvalidLine
    for number, line in lines(stream, max_line_bytes, digest):
        try:
            if line is None:
                raise InvalidLine([Problem("", f"is longer than {max_line_bytes:,} bytes")])
            found = parse(line, endpoint=endpoint, model=model)
            custom_id = found.request.custom_id
        except InvalidLine as error:
            found = error.with_traceback(None)
            custom_id = error.custom_id
        # A refused line keeps its id: a second row of that name would be taken for its answer.
        first = ids.first(number, custom_id)
        if first != number:
            message = f"is the same as on line {first}"
            if custom_id is None:
                message = f"is missing, and line-{number} stands on line {first}"
            others = found.problems if isinstance(found, InvalidLine) else ()
            found = InvalidLine([*others, Problem("custom_id", message)], custom_id)
        if isinstance(found, InvalidLine) and found.custom_id is None:
            found.custom_id = f"line-{number}"
        yield number, found


class _CustomIds:
    """Who used which id first, the ids of lines without one included (a bit each)."""

    def __init__(self) -> None:
        self._lines: dict[str, int] = {}
        self._generated = bytearray()

    def first(self, number: int, custom_id: str | None) -> int:
        """The line that was the first to use the id that line `number` has: `number` itself if it is new."""
        if custom_id is None:
            byte, bit = number >> 3, 1 << (number & 7)
            if byte >= len(self._generated):
                self._generated.extend(bytes(byte + 1 - len(self._generated)))
            self._generated[byte] |= bit
            return self._lines.get(f"line-{number}", number)
        if match := _GENERATED.fullmatch(custom_id):
            other = int(match[1])
            if other >> 3 < len(self._generated) and self._generated[other >> 3] >> (other & 7) & 1:
                return other
        return self._lines.setdefault(custom_id, number)


class _Warnings:
    """Field names that are passed on unjudged or left out: how often, and where first."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, bool], list[int]] = {}
        self._untold = 0

    def note(self, number: int, found: Parsed) -> None:
        for names, is_sent in ((found.unknown, True), (found.ignored, False)):
            for name in names:
                seen = self._seen.get((name, is_sent))
                if seen is not None:
                    seen[1] += 1
                elif len(self._seen) < SHOWN_WARNINGS:
                    self._seen[name, is_sent] = [number, 1]
                else:
                    self._untold += 1

    def told(self) -> list[str]:
        texts = []
        for (name, is_sent), (first, count) in self._seen.items():
            fate = "is not known, passed on as it is" if is_sent else "stands beside body, left out"
            where = f"line {first}" if count == 1 else f"{count:,} lines, the first is line {first}"
            texts.append(f"{shown(name)}: {fate} ({where})")
        if self._untold:
            texts.append(f"and other unknown names, {self._untold:,} times")
        return texts
