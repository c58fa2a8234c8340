"""Forms with one file, read piece by piece: the file goes to the disk, the fields into memory.

python-multipart finds the parts; what they may hold is decided here. What goes wrong: a form is cut, too large or none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api.openai.spool import Incoming
from api.problems import Problem
from jobs.requests import shown

FILE: Final = "file"
FIELD_BYTES: Final = 65_536
PARTS: Final = 32
#: Bytes of the headers of one part.
HEADER_BYTES: Final = 8_192
FILENAME_CHARS: Final = 255
#: Bytes of the file that are gathered before they are written, and bytes that the parser gets at once.
BLOCK_BYTES: Final = 1_000_000
PIECE_BYTES: Final = 65_536

_BOUNDARY = re.compile(rb"[ -~]{0,69}[!-~]")
_ENCODINGS: Final = (b"", b"binary", b"8bit", b"7bit")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SEND: Final = "send multipart/form-data with one part named file"

# The parser warns of what it refuses, and quotes it.
_silent = logging.Logger(f"{__name__}.parser", logging.CRITICAL + 1)


@dataclass(slots=True)
class Form:
    """What came beside the file's content."""

    fields: dict[str, str]
    filename: str
    """Without folders, 1 to 255 characters."""


async def receive(
    body: AsyncIterator[bytes],
    content_type: str,
    incoming: Incoming,
    most: int,
    write: Callable[[Incoming, bytes], Awaitable[None]],
) -> Form:
    """Reads a form whose part `file` has at most `most` bytes; `write` gets these in blocks of about a megabyte.

    Raises a `Problem`: 400, 413, or 415 for another content type. What was written then is the caller's to discard.
    """
    parts = _Parts(most)
    parser = _parser(content_type, parts)
    async for chunk in body:
        for start in range(0, len(chunk), PIECE_BYTES):
            try:
                parser.write(chunk[start : start + PIECE_BYTES])
            except FormParserError as error:
                if "header size" in str(error):
                    raise _headers_too_large() from None
                raise Problem(400, "not_form", f"the body is no form of its Content-Type; {_SEND}") from None
            if len(parts.block) >= BLOCK_BYTES:
                await write(incoming, parts.take())
    form = parts.form()
    if parts.block:
        await write(incoming, parts.take())
    return form


def _parser(content_type: str, parts: _Parts) -> MultipartParser:
    try:
        kind, options = parse_options_header(content_type)
    except UnicodeEncodeError:
        kind, options = b"", {}
    if kind != b"multipart/form-data":
        raise Problem(415, "media_type", _SEND)
    boundary = options.get(b"boundary", b"")
    if not _BOUNDARY.fullmatch(boundary):
        detail = "Content-Type: multipart/form-data needs a boundary of 1 to 70 printable characters"
        raise Problem(400, "not_form", detail)
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": parts.begin,
            "on_header_field": parts.header_name,
            "on_header_value": parts.header_value,
            "on_header_end": parts.header_end,
            "on_headers_finished": parts.headers_end,
            "on_part_data": parts.data,
            "on_part_end": parts.part_end,
            "on_end": parts.end,
        },
        max_header_count=HEADER_BYTES,
        max_header_size=HEADER_BYTES,
    )
    parser.logger = _silent
    return parser


@dataclass(slots=True)
class _Headers:
    """Of the part that is being read."""

    size: int = 0
    name: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)
    known: dict[bytes, bytes] = field(default_factory=dict)


class _Parts:
    """What the parser calls; the file's bytes wait in `block`."""

    def __init__(self, most: int) -> None:
        self.block = bytearray()
        self._most = most
        self._size = 0
        self._fields: dict[str, str] = {}
        self._filename: str | None = None
        self._count = 0
        self._headers = _Headers()
        self._name = ""  # of the part
        self._value = bytearray()
        self._in_file = False
        self._ended = False

    def take(self) -> bytes:
        """The bytes gathered so far, which are the caller's now."""
        block, self.block = bytes(self.block), bytearray()
        return block

    def form(self) -> Form:
        """Once the body has ended. Raises a `Problem` where the form has not, or has no file."""
        if not self._ended:
            raise Problem(400, "not_form", "the form ended too early")
        if self._filename is None:
            raise _bad_file("is missing; send it as a part with this name and a filename")
        return Form(self._fields, self._filename)

    def begin(self) -> None:
        self._count += 1
        if self._count > PARTS:
            raise Problem(413, "too_large", f"the form has over {PARTS} parts")
        self._headers = _Headers()

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._add_header("name", data, start, end)

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._add_header("value", data, start, end)

    def _add_header(self, half: Literal["name", "value"], data: bytes, start: int, end: int) -> None:
        headers = self._headers
        headers.size += end - start
        if headers.size > HEADER_BYTES:
            raise _headers_too_large()
        (headers.name if half == "name" else headers.value).extend(data[start:end])

    def header_end(self) -> None:
        headers = self._headers
        headers.known[bytes(headers.name).lower()] = bytes(headers.value).strip(b" \t")
        headers.name.clear()
        headers.value.clear()

    def headers_end(self) -> None:
        known = self._headers.known
        kind, options = parse_options_header(known.get(b"content-disposition", b""))
        if kind != b"form-data" or b"name" not in options:
            raise Problem(400, "not_form", "a part of the form has no Content-Disposition: form-data with a name")
        if known.get(b"content-transfer-encoding", b"").lower() not in _ENCODINGS:
            raise Problem(400, "not_form", "send the parts of the form without a Content-Transfer-Encoding")
        self._name = _text(options[b"name"], "a name of the form")
        self._in_file = self._name == FILE
        if self._in_file:
            if self._filename is not None:
                raise _bad_file("is given twice")
            if not options.get(b"filename"):
                raise _bad_file("needs a filename")
            self._filename = _basename(options[b"filename"])
        elif b"filename" in options:
            raise self._bad_field("has a filename; only file may be a file")
        elif self._name in self._fields:
            raise self._bad_field("is given twice")

    def data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._size += end - start
            if self._size > self._most:
                raise Problem(413, "too_large", f"the file has over {self._most:,} bytes", param=FILE)
            self.block += memoryview(data)[start:end]
        elif len(self._value) + end - start > FIELD_BYTES:
            name = shown(self._name)
            raise Problem(413, "too_large", f"{name}: has over {FIELD_BYTES:,} bytes", param=name)
        else:
            self._value += memoryview(data)[start:end]

    def part_end(self) -> None:
        if not self._in_file:
            self._fields[self._name] = _text(bytes(self._value), shown(self._name))
            self._value.clear()

    def end(self) -> None:
        self._ended = True

    def _bad_field(self, what: str) -> Problem:
        name = shown(self._name)
        return Problem(400, "invalid_request", f"{name}: {what}", param=name)


def _headers_too_large() -> Problem:
    return Problem(413, "too_large", f"a part of the form has over {HEADER_BYTES:,} bytes of headers")


def _bad_file(what: str) -> Problem:
    return Problem(400, "invalid_request", f"{FILE}: {what}", param=FILE)


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Problem(400, "not_form", f"{what} is not UTF-8") from None


def _basename(data: bytes) -> str:
    name = re.split(r"[/\\]", _text(data, "the filename"))[-1]
    if not name:
        raise _bad_file("needs a filename")
    if len(name) > FILENAME_CHARS:
        raise _bad_file(f"its filename has {len(name):,} characters, at most {FILENAME_CHARS} are allowed")
    if _UNPRINTABLE.search(name):
        raise _bad_file("its filename must not hold control characters or line breaks")
    return name
