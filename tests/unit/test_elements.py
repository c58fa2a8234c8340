"""A body split as it comes: the same whatever the chunks, nothing decoded, nothing held but one element."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from api.elements import Elements
from api.problems import Problem

SECRET = "my prompt"

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
#: Texts that are hard on a splitter.
TEXTS = st.text(alphabet='"\\{}[],: \nxé\u2028🤔', max_size=30)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\r\n\t", "\n: "), (",\n\n ", " :\t")])


class Chunks:
    """A stream that comes in given pieces, whatever is asked for."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter([piece for piece in pieces if piece])

    def read(self, _: int, /) -> bytes:
        return next(self._pieces, b"")


def cut(data: bytes, places: Iterable[int]) -> Chunks:
    marks = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return Chunks(data[start:end] for start, end in pairwise(marks))


def bytewise(data: bytes) -> Chunks:
    return Chunks(bytes([byte]) for byte in data)


def split(data: bytes | Chunks, most_element: int = 10_000, most_rest: int = 10_000) -> tuple[list[Any], Elements]:
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    elements = Elements(stream, "requests", most_element, most_rest)
    found = list(elements)
    assert [index for index, _ in found] == list(range(len(found)))
    return [raw for _, raw in found], elements


def refused(data: bytes | Chunks, **bounds: int) -> Problem:
    with pytest.raises(Problem) as caught:
        split(data, **bounds)
    assert SECRET not in caught.value.detail
    return caught.value


def test_elements_and_the_rest_are_as_they_were_given() -> None:
    long = b'{ "n" : 1.50e+2,\r\n\t"t":"\\u00e9\xc3\xa9 ]} , \\" \\\\" , "deep":[[{}],[]] }'
    body = (
        b'{ "a" :\t[1 , {"requests": [2]}],\n"requests":[ ' + long + b' ,\n12345678901234567890, null,"]","", [],{}] '
    )
    for data in (body + b',"b":-0.0} \r\n', b"\xef\xbb\xbf" + body + b',"b":-0.0}'):
        for stream in (data, bytewise(data)):
            found, elements = split(stream)
            assert found == [long, b"12345678901234567890", b"null", b'"]"', b'""', b"[]", b"{}"]
            assert elements.rest == {"a": b'[1 , {"requests": [2]}]', "b": b"-0.0"}
            assert elements.found


@pytest.mark.parametrize(
    ("body", "rest"),
    [(b"{}", {}), (b' { "a" : {"requests":[1]} } ', {"a": b'{"requests":[1]}'}), (b'{"":0}', {"": b"0"})],
)
def test_without_the_array_there_is_the_rest(body: bytes, rest: dict[str, bytes]) -> None:
    found, elements = split(body)
    assert (found, elements.rest, elements.found) == ([], rest, False)


def test_an_empty_array_is_found() -> None:
    found, elements = split(b'{"requests":[ ]}')
    assert (found, elements.found) == ([], True)


def test_names_are_decoded() -> None:
    found, elements = split(b'{"re\\u0071uests":[1],"a\\"b\\\\":2}')
    assert (found, elements.rest) == ([b"1"], {'a"b\\': b"2"})


def test_elements_come_before_their_successors_do() -> None:
    came: list[str] = []

    class Slow:
        pieces = iter([b'{"requests":[{"a":1}', b',{"b":2},', b"3]}"])

        def read(self, _: int, /) -> bytes:
            came.append("read")
            return next(self.pieces, b"")

    for _, raw in Elements(Slow(), "requests", 100, 100):
        came.append((raw or b"").decode())
    assert came[:6] == ["read", '{"a":1}', "read", '{"b":2}', "read", "3"]


@given(
    st.lists(VALUES | TEXTS, max_size=6),
    st.dictionaries((st.text(max_size=6) | TEXTS).filter(lambda name: name != "requests"), VALUES | TEXTS, max_size=4),
    st.integers(0, 4),
    st.booleans(),
    SEPARATORS,
    st.lists(st.integers(0, 10_000), max_size=40),
)
def test_any_object_in_any_chunks(
    values: list[Any],
    others: dict[str, Any],
    place: int,
    ascii_: bool,
    separators: tuple[str, str],
    cuts: list[int],
) -> None:
    def dumped(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ascii_, separators=separators)

    comma, colon = separators
    members = [f"{dumped(name)}{colon}{dumped(value)}" for name, value in others.items()]
    members.insert(place, f'"requests"{colon}[{comma.join(map(dumped, values))}]')
    data = ("{" + comma.join(members) + "}").encode()
    for stream in (data, cut(data, cuts), bytewise(data)):
        found, elements = split(stream, most_element=len(data), most_rest=len(data))
        assert found == [dumped(value).encode() for value in values]
        assert elements.rest == {name: dumped(value).encode() for name, value in others.items()}


@given(
    st.binary(max_size=60)
    | st.lists(
        st.sampled_from(
            [b'{"requests":[', b'"', b"\\", b"[", b"]", b"{", b"}", b",", b":", b" ", b"1", b'"a"', b"tru"]
        ),
        max_size=30,
    ).map(b"".join),
    st.lists(st.integers(0, 100), max_size=10),
)
@example(b'{"requests":[1]}\\', [])
@example(b'{"requests":["\\', [15])
@example(b'{\\"requests":[1]}', [])
def test_garbage_raises_a_problem_or_nothing_whatever_the_chunks(data: bytes, cuts: list[int]) -> None:
    outcomes: list[Any] = []
    for stream in (data, cut(data, cuts), bytewise(data)):
        try:
            found, elements = split(stream)
            outcomes.append((found, elements.rest))
        except Problem as problem:
            outcomes.append((problem.code, problem.status))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@given(VALUES, st.data())
def test_what_is_cut_off_is_refused(value: Any, data: st.DataObject) -> None:
    body = json.dumps({"a": value, "requests": [value, value]}).encode()
    end = data.draw(st.integers(0, len(body) - 1))
    problem = refused(body[:end])
    assert (problem.code, problem.detail) == ("not_json", "the body is not JSON: it ends too early")


@pytest.mark.parametrize(
    "body",
    [
        b'"my prompt"', b"[]", b"1", b'{"requests":[1]}{"a":1}', b'{"requests":[1]}]', b'{"requests":[1]} my prompt',
        b'{"requests":[1,]}', b'{"requests":[,1]}', b'{"requests":[,]}', b'{"requests":[1 2]}', b'{"requests":["a""b"]}',
        b'{"requests":[{}{}]}', b'{"requests":[1}}', b'{"requests":[1]]', b'{"requests":[1],}', b'{,"requests":[1]}',
        b'{"requests":[1]"a":2}', b'{"requests" [1]}', b'{"requests"::[1]}', b'{requests:[1]}', b'{1:[1]}',
        b'{"requests":[1:2]}', b'{"requests":[\'a\']}', b'{"requests":[1],"a"}', b'{"requests":[1],"a":}',
        b'{"requests":[1],"a":tru}', b'{"requests":[1],"a":[1,]}', b'{"requests":[1],"a":{"b"}}', b'{"a":01}',
        b'{"requests":[1],"\\ud800":1}', b'{"requests":[1],"\xff":1}', b'{"a\nb":1}', b'{"requests":[\\"a\\"]}',
        b'{"requests":[1],"a":1,"a":2}', b'{"requests":[1],"requests":[2]}', b'{"a":1,"\\u0061":1}', b'{"a":[}',
        b'{"requests":[1],"a":' + b"[" * 5_000 + b"]" * 5_000 + b"}", b"\xef\xbb\xbf\xef\xbb\xbf{}", b"\xef\xbb{}",
        b'{"requests":[1\x0b]}', b'{"requests":[1]}\0', '{"requests":[]}'.encode("utf-16-le"),
    ],
)  # fmt: skip
def test_what_is_not_one_object_is_refused(body: bytes) -> None:
    for stream in (body, bytewise(body)):
        problem = refused(stream, most_rest=20_000)
        assert (problem.status, problem.code) == (400, "not_json")


def test_a_refusal_says_where_it_is() -> None:
    whole, byte_by_byte = (refused(stream(b'{"requests":[1],\n,')) for stream in (bytes, bytewise))
    assert whole.detail == byte_by_byte.detail == "the body is not a JSON object in UTF-8 (byte 18)"
    assert refused('{"requests":[]}'.encode("utf-16-le")).detail.endswith("it holds NUL bytes")


@pytest.mark.parametrize("value", [b"null", b'"my prompt"', b"{}", b"1"])
def test_what_should_be_the_array_must_be_one(value: bytes) -> None:
    problem = refused(b'{"requests": ' + value + b"}")
    assert (problem.status, problem.code, problem.members) == (400, "invalid_request", {"param": "requests"})
    assert problem.detail == "requests: must be an array"


@pytest.mark.parametrize("stream", [bytes, bytewise])
def test_elements_are_taken_to_their_bound(stream: Any) -> None:
    for raw in (b'["12345678"]', b'"1234567890"', b"123456789012", b'{"a":[1,{}]}'):
        body = b'{"requests":[' + raw + b", " + raw + b", 1]}"
        assert split(stream(body), most_element=12)[0] == [raw, raw, b"1"]
        assert split(stream(body), most_element=11)[0] == [None, None, b"1"]


@pytest.mark.parametrize("stream", [bytes, bytewise])
def test_the_rest_is_taken_to_its_bound(stream: Any) -> None:
    body = b'{"abc":"12345","requests":["long long long"],"d":6}'
    bound = len(b'"abc""12345""requests""d"6')
    assert split(stream(body), most_rest=bound)[1].rest == {"abc": b'"12345"', "d": b"6"}
    for most in range(bound):
        problem = refused(stream(body), most_rest=most)
        assert (problem.status, problem.code) == (413, "too_large")


@pytest.mark.parametrize(
    "raw",
    [
        (b"[" + b" " * 50) * 10_000 + b"]" * 10_000,
        (b'{"a":' + b" " * 50) * 10_000 + b"[}" + b"}" * 10_000,
        b'"' + b"\\\\" * 300_000 + b'"',
        b"1" * 600_000,
    ],
    ids=["arrays", "objects", "string", "number"],
)
def test_depth_and_length_cost_neither_recursion_nor_memory(raw: bytes) -> None:
    body = b'{"requests":[' + raw + b",1]}"
    stream = Chunks([body[start : start + 4096] for start in range(0, len(body), 4096)])
    tracemalloc.start()
    try:
        assert split(stream, most_element=20_000)[0] == [None, b"1"]
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
    assert split(body, most_element=len(raw))[0] == [raw, b"1"]


def test_memory_is_one_element_and_a_chunk() -> None:
    raw = b'{"a":"' + b"x" * 8_000_000 + b'"}'

    class Stream:
        def __init__(self) -> None:
            self.parts = [b'{"requests":[', *([raw, b","] * 4), raw, b"]}"]
            self.at = 0

        def read(self, _: int, /) -> bytes:
            part = self.parts[0] if self.parts else b""
            piece = part[self.at : self.at + 65_536]
            self.at += len(piece)
            if self.at >= len(part):
                self.at = 0
                self.parts[:1] = []
            return piece

    stream = Stream()
    tracemalloc.start()
    try:
        for _, found in Elements(stream, "requests", len(raw), 100):
            assert found is not None
            assert len(found) == len(raw)
        # The one that was handed out last, and the one that is being read, whose buffer grows by leaps.
        assert tracemalloc.get_traced_memory()[1] < 3 * len(raw)
    finally:
        tracemalloc.stop()


def test_what_the_stream_raises_is_raised() -> None:
    class Broken:
        def read(self, _: int, /) -> bytes:
            raise Problem(400, "cut", "the body ended too early")

    assert refused_by(Broken()) == "cut"


def refused_by(stream: Any) -> str:
    with pytest.raises(Problem) as caught:
        list(Elements(stream, "requests", 100, 100))
    return caught.value.code
