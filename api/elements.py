"""A JSON object read as a stream of bytes and split: the elements of its one big array one by one, its other members whole.

Nothing is decoded but the names of members: numbers and texts stay as they were given. Elements are only told apart;
whether one is valid JSON is for who decodes it. Of the body a chunk and one element are held at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import BytesIO
from typing import Final, NoReturn, Protocol

import msgspec

from api.problems import Problem

CHUNK_BYTES: Final = 1 << 18
#: Brackets within brackets: far more than any request may have, few enough that nobody keeps a thread busy with them.
MOST_DEPTH: Final = 10_000

_BOM: Final = b"\xef\xbb\xbf"
_QUOTE, _COLON, _COMMA = b'":,'
_OBJECT, _OBJECT_END, _ARRAY, _ARRAY_END = b"{}[]"
_END: Final = -1

# Each matches at any place, maybe nothing, and never goes back: time grows with the bytes alone.
_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb"[-+.0-9A-Za-z]*+")
# To the next bracket, or to a string whose end is not in the chunk. Innermost pairs of brackets are passed over whole.
_FLAT = rb'[^"{}\[\]]*+(?:"[^"]*+"[^"{}\[\]]*+)*+'
_TO_BRACKET = re.compile(_FLAT + rb"(?:[{\[]" + _FLAT + rb"[}\]]" + _FLAT + rb")*+")

_anything = msgspec.json.Decoder(msgspec.Raw)
_name = msgspec.json.Decoder(str)


class Readable(Protocol):
    """What bytes come from: `read` returns any number of them, none at the end."""

    def read(self, n: int, /) -> bytes: ...


class Elements:
    """Iterate once: `(index from 0, raw element)`, None for an element of over `most_element` bytes.

    Raises a `Problem`: 400 where the body is no JSON object or its `member` no array, 413 where its other members
    have over `most_rest` bytes together.
    """

    def __init__(self, stream: Readable, member: str, most_element: int, most_rest: int) -> None:
        self.rest: dict[str, bytes] = {}
        """The other members, each raw JSON; complete once iteration is over."""
        self.found = False
        """Whether the array was there."""
        self._stream = stream
        self._member = member
        self._most_element = most_element
        self._most_rest = most_rest
        self._rest_bytes = 0
        self._chunk = b""
        self._signs = b""  # the chunk without its escapes, byte by byte: every quote in it begins or ends a string
        self._at = 0  # the place in both
        self._before = 0  # bytes of earlier chunks
        self._backslash = b""  # the last byte so far, where it goes with the next one
        self._ended = False

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        self._skip_bom()
        self._expect(_OBJECT)
        more = self._peek() != _OBJECT_END
        while more:
            name = self._member_name()
            if name in self.rest or (self.found and name == self._member):
                raise Problem(400, "not_json", f"the body names a member twice (byte {self._before + self._at:,})")
            if name == self._member:
                self.found = True
                yield from self._elements()
            else:
                self.rest[name] = self._member_value()
            more = self._goes_on(_OBJECT_END)
        self._expect(_OBJECT_END)
        if self._peek() != _END:
            self._fail()

    def _elements(self) -> Iterator[tuple[int, bytes | None]]:
        if self._peek() != _ARRAY:
            self._value(0)  # what is no value at all is not JSON
            raise Problem(400, "invalid_request", f"{self._member}: must be an array", param=self._member)
        self._at += 1
        index = 0
        more = self._peek() != _ARRAY_END
        while more:
            yield index, self._value(self._most_element)
            index += 1
            more = self._goes_on(_ARRAY_END)
        self._expect(_ARRAY_END)

    def _member_name(self) -> str:
        if self._peek() != _QUOTE:
            self._fail()
        raw = self._rest_value()
        try:
            name = _name.decode(raw)
        except ValueError:
            self._fail()
        self._expect(_COLON)
        return name

    def _member_value(self) -> bytes:
        raw = self._rest_value()
        try:
            _anything.decode(raw)
        except (ValueError, RecursionError):
            self._fail()
        return raw

    def _rest_value(self) -> bytes:
        raw = self._value(self._most_rest - self._rest_bytes)
        if raw is None:
            what = f"the body has over {self._most_rest:,} bytes beside its {self._member}"
            raise Problem(413, "too_large", what)
        self._rest_bytes += len(raw)
        return raw

    def _value(self, most: int) -> bytes | None:
        """The raw value that comes next, None when it has over `most` bytes."""
        first = self._peek()
        taken = _Taken(self._at, most)
        if first == _QUOTE:
            self._at += 1
            self._to_quote(taken)
        elif first in (_OBJECT, _ARRAY):
            self._at += 1
            self._to_bracket(taken)
        else:
            self._scalar(taken)
        return taken.value(self._chunk, self._at)

    def _to_bracket(self, taken: _Taken) -> None:
        """From within an object or array to behind its end."""
        depth = 1
        while depth:
            self._at = _end(_TO_BRACKET, self._signs, self._at)
            if self._at == len(self._signs):
                self._need_more(taken)
                continue
            sign = self._signs[self._at]
            self._at += 1
            if sign == _QUOTE:
                self._to_quote(taken)
            else:
                depth += 1 if sign in (_OBJECT, _ARRAY) else -1
                if depth > MOST_DEPTH:
                    raise Problem(400, "not_json", f"the body is nested too deeply (byte {self._before + self._at:,})")

    def _to_quote(self, taken: _Taken) -> None:
        """From within a string to behind its end."""
        while (found := self._signs.find(b'"', self._at)) < 0:
            self._at = len(self._signs)
            self._need_more(taken)
        self._at = found + 1

    def _scalar(self, taken: _Taken) -> None:
        """To behind a number or word."""
        begin = self._before + self._at
        self._at = _end(_SCALAR, self._signs, self._at)
        while self._at == len(self._signs) and self._more(taken):
            self._at = _end(_SCALAR, self._signs, 0)
        if self._before + self._at == begin:
            self._fail()

    def _goes_on(self, end: int) -> bool:
        """After an element or a member: whether a comma promises another; if not, `end` comes next."""
        sign = self._peek()
        if sign == _COMMA:
            self._at += 1
        elif sign != end:
            self._fail()
        return sign == _COMMA

    def _expect(self, sign: int) -> None:
        if self._peek() != sign:
            self._fail()
        self._at += 1

    def _peek(self) -> int:
        """The next byte that is no space, -1 at the end."""
        self._at = _end(_SPACE, self._signs, self._at)
        while self._at == len(self._signs):
            if not self._more():
                return _END
            self._at = _end(_SPACE, self._signs, 0)
        return self._signs[self._at]

    def _skip_bom(self) -> None:
        start = b""
        while len(start) < len(_BOM) and _BOM.startswith(start) and (chunk := self._stream.read(CHUNK_BYTES)):
            start += chunk
        self._take(start)
        if start.startswith(_BOM):
            self._at = len(_BOM)

    def _need_more(self, taken: _Taken) -> None:
        if not self._more(taken):
            self._fail()

    def _more(self, taken: _Taken | None = None) -> bool:
        """Goes to the next chunk, False where there is none; what the value has of this one is kept."""
        read = self._stream.read(CHUNK_BYTES)
        if not read and not self._backslash:
            self._ended = True
            return False
        if taken is not None:
            taken.keep(self._chunk)
        self._before += len(self._chunk)
        self._take(read)
        return True

    def _take(self, read: bytes) -> None:
        """Makes what was read the chunk."""
        chunk = self._backslash + read
        # Backslashes go in pairs from the first of a row; one that is left over waits for what it goes with.
        odd = (len(chunk) - len(chunk.rstrip(b"\\"))) % 2 if read else 0
        self._backslash = b"\\" * odd
        self._chunk = chunk[: len(chunk) - odd]
        self._signs = self._chunk.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        self._at = 0

    def _fail(self) -> NoReturn:
        if self._ended:
            raise Problem(400, "not_json", "the body is not JSON: it ends too early")
        hint = "; it holds NUL bytes" if b"\0" in self._chunk else ""
        place = f"byte {self._before + self._at + 1:,}"
        raise Problem(400, "not_json", f"the body is not a JSON object in UTF-8 ({place}){hint}")


class _Taken:
    """The bytes of one value, gathered over chunks for as long as they are few enough."""

    def __init__(self, start: int, most: int) -> None:
        self._start = start  # in the present chunk
        self._most = most
        self._size = 0
        self._pieces: BytesIO | None = None

    def keep(self, chunk: bytes) -> None:
        """The value goes on in the next chunk."""
        self._size += len(chunk) - self._start
        if self._size > self._most:
            self._pieces = None
        else:
            self._pieces = self._pieces or BytesIO()
            self._pieces.write(memoryview(chunk)[self._start :])
        self._start = 0

    def value(self, chunk: bytes, end: int) -> bytes | None:
        """The whole of it, which ends in this chunk; None when it is too much."""
        if self._size + end - self._start > self._most:
            return None
        if self._pieces is None:
            return chunk[self._start : end]
        self._pieces.write(memoryview(chunk)[:end])
        return self._pieces.getvalue()


def _end(pattern: re.Pattern[bytes], signs: bytes, at: int) -> int:
    found = pattern.match(signs, at)
    assert found is not None  # each pattern matches nothing at least
    return found.end()
