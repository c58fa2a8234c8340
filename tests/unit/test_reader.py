"""Reading input files: lines, refusals, duplicates, warnings, the digest; and that no bytes can crash it."""

from __future__ import annotations

import hashlib
import io
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import InvalidRequest, UsageError
from jobs.requests import CHAT, MESSAGES, Request
from producers.reader import Defaults, InvalidLine, Report, lines, parse_line, requests, validate

LIMIT = 10_000
BOM = b"\xef\xbb\xbf"
GOOD = b'{"prompt":"x"}'
BAD = b'{"prompt":"x","temperature":1.9}'


class Trickle(io.RawIOBase):
    """A stream that gives at most `step` bytes a read."""

    def __init__(self, content: bytes, step: int) -> None:
        self._content = io.BytesIO(content)
        self._step = step

    def read(self, size: int = -1, /) -> bytes:
        return self._content.read(min(size, self._step))


def judged(content: bytes, limit: int = LIMIT, **defaults: Any) -> Report:
    return validate(io.BytesIO(content), Defaults(**defaults), limit)


def taken(content: bytes, limit: int = LIMIT, report: Report | None = None) -> list[tuple[int, Request | InvalidLine]]:
    report = judged(content, limit) if report is None else report
    return list(requests(io.BytesIO(content), Defaults(), limit, report))


def identified(*ids: str | None) -> bytes:
    rows = ({"prompt": "x"} if name is None else {"prompt": "x", "custom_id": name} for name in ids)
    return b"\n".join(json.dumps(row).encode() for row in rows)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"a", [(1, b"a")]),
        (b"a\n", [(1, b"a")]),
        (b"a\nb", [(1, b"a"), (2, b"b")]),
        (b"a\r\nb\r\n", [(1, b"a"), (2, b"b")]),
        (b"a\rb\n", [(1, b"a\rb")]),
        (b"\n\n a\n \t\r\n\nb\n\n", [(3, b" a"), (6, b"b")]),
        (BOM + b"a\nb", [(1, b"a"), (2, b"b")]),
        (BOM, []),
        (BOM + b"\r\n" + BOM + b"a", [(2, b"a")]),
        (b"12345\n123456\n1234567\n1", [(1, b"12345"), (2, b"123456"), (3, None), (4, b"1")]),
        (b"123456\r\n1234567\r\n", [(1, b"123456"), (2, None)]),
        (BOM + b"123456\r\n" + BOM + b"1234567", [(1, b"123456"), (2, None)]),
        (b"x" * 50 + b"\n" + b"y" * 50, [(1, None), (2, None)]),
        (b" " * 50 + b"\na", [(1, None), (2, b"a")]),
    ],
)
@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_lines(content: bytes, expected: list[tuple[int, bytes | None]], step: int) -> None:
    digest = hashlib.sha256()
    assert list(lines(Trickle(content, step), 6, digest)) == expected  # type: ignore[arg-type]  # only read is called
    assert digest.hexdigest() == hashlib.sha256(content).hexdigest()


def test_a_line_over_the_limit_is_never_held() -> None:
    class Endless(io.RawIOBase):
        """64 MB without a line end, made as they are read."""

        left = 1 << 26

        def read(self, size: int = -1, /) -> bytes:
            size = min(size, self.left)
            self.left -= size
            return b"x" * size

    tracemalloc.start()
    try:
        assert list(lines(Endless(), 1_000_000)) == [(1, None)]  # type: ignore[arg-type]  # only read is called
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@settings(deadline=None)
@given(st.binary(), st.integers(1, 9), st.integers(1, 9))
def test_lines_are_the_same_however_they_are_cut(content: bytes, step: int, limit: int) -> None:
    found = list(lines(Trickle(content, step), limit))  # type: ignore[arg-type]  # only read is called
    assert found == list(lines(io.BytesIO(content), limit))
    assert all(line is None or (line.strip() and len(line) <= limit) for _, line in found)


def test_parse_line_takes_the_defaults() -> None:
    request = parse_line(GOOD, Defaults(MESSAGES, "m"))
    assert request.endpoint == MESSAGES
    assert json.loads(request.body)["model"] == "m"
    assert parse_line(GOOD, Defaults()).endpoint == CHAT
    with pytest.raises(InvalidRequest, match=r"^temperature: 1\.9 is over 1\.5$"):
        parse_line(BAD, Defaults())


def test_a_good_file() -> None:
    content = BOM + GOOD + b"\r\n\r\n" + identified("a", None) + b"\n"
    report = judged(content)
    assert report == Report(3, 0, [], [], hashlib.blake2b(content, digest_size=16).hexdigest())
    assert report.ok
    assert [(n, r.custom_id) for n, r in taken(content)] == [(1, "line-1"), (3, "a"), (4, "line-4")]


def test_one_file_may_mix_endpoints() -> None:
    rows = [
        {"url": CHAT, "body": {"messages": [{"role": "user", "content": "x"}]}},
        {"url": MESSAGES, "body": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}},
    ]
    found = taken(b"\n".join(json.dumps(row).encode() for row in rows))
    assert [request.endpoint for _, request in found if isinstance(request, Request)] == [CHAT, MESSAGES]


@pytest.mark.parametrize("content", [b"", b"\n", BOM, b" \r\n\t\n"])
def test_a_file_without_a_request(content: bytes) -> None:
    report = judged(content)
    assert report.problems == ["the file has no request"]
    assert not report.ok


def test_problems_name_their_line() -> None:
    report = judged(GOOD + b"\n\n" + BAD + b"\nhello\n" + b"x" * (LIMIT + 1) + b"\n" + GOOD)
    assert (report.total, report.bad, report.ok) == (2, 3, False)
    assert report.problems == [
        "line 3: temperature: 1.9 is over 1.5",
        "line 4: is not JSON (character 1)",
        "line 5: is longer than 10,000 bytes",
    ]


def test_all_bad_lines_are_counted_and_a_hundred_shown() -> None:
    report = judged((BAD + b"\n") * 250)
    assert (report.total, report.bad, len(report.problems)) == (0, 250, 100)


@pytest.mark.parametrize(
    ("ids", "problems"),
    [
        (["a", "b", "a", "a"], ["line 3: custom_id: is the same as on line 1",
                                "line 4: custom_id: is the same as on line 1"]),
        (["a", "A", "a "], []),
        ([None, "line-1"], ["line 2: custom_id: is the same as on line 1"]),
        (["line-2", None], ["line 2: custom_id: is missing, and line-2 stands on line 1"]),
        (["line-1", "line-3", "line-999", "line-01", "line-0"], []),
        ([*([None] * 20), "line-9", "line-20", "line-21"], ["line 21: custom_id: is the same as on line 9",
                                                           "line 22: custom_id: is the same as on line 20"]),
        ([None, "x", "line-2"], []),
    ],
)  # fmt: skip
def test_custom_ids_are_unique(ids: list[str | None], problems: list[str]) -> None:
    assert judged(identified(*ids)).problems == problems


def test_a_refused_line_keeps_its_id() -> None:
    content = b'{"prompt":1,"custom_id":"a"}\n{"prompt":1,"custom_id":"a"}\n' + identified("a")
    assert judged(content).problems == [
        "line 1: prompt: must be a string",
        "line 2: prompt: must be a string; custom_id: is the same as on line 1",
        "line 3: custom_id: is the same as on line 1",
    ]


def test_bad_lines_are_given_with_an_id_where_they_are_skipped() -> None:
    content = BAD + b"\n" + GOOD + b'\n{"prompt":1,"custom_id":"a"}\n'
    found = taken(content)
    assert [(n, type(item), item.custom_id) for n, item in found] == [
        (1, InvalidLine, "line-1"),
        (2, Request, "line-2"),
        (3, InvalidLine, "a"),
    ]


CHANGES = [
    (GOOD, GOOD + b"\n" + GOOD),
    (GOOD, GOOD.replace(b"x", b"y")),
    (GOOD, BAD),
    (GOOD, b""),
    (GOOD, b"no JSON"),
    (GOOD, GOOD.replace(b"x", b"x" * LIMIT)),
    (GOOD + b"\n" + BAD, GOOD + b"\n" + BAD.replace(b"9", b"8")),
    (BAD, GOOD),
]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_what_is_not_what_was_judged_is_found_out(before: bytes, after: bytes) -> None:
    with pytest.raises(UsageError, match="the input changed while it was read, nothing was submitted"):
        taken(after, report=judged(before))


def test_one_warning_per_field_name() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "x"},
        {"prompt": "x", "seed": 1},
        {"body": {"messages": [{"role": "user", "content": "x"}], "seed": 1, "n": 2}, "seed": 1},
        {"prompt": 1, "only_on_a_bad_line": 1},
        {"prompt": "x", "\x1b" + "y" * 100: 1},
    ]
    assert judged("\n".join(map(json.dumps, rows)).encode()).warnings == [
        "seed: is not known, passed on as it is (2 lines, the first is line 2)",
        "n: is not known, passed on as it is (line 3)",
        "seed: stands beside body, left out (line 3)",
        "?" + "y" * 59 + ": is not known, passed on as it is (line 5)",
    ]


def test_warnings_do_not_grow_with_the_file() -> None:
    rows = ({"prompt": "x", f"field{number}": 1} for number in range(150))
    warnings = judged("\n".join(map(json.dumps, rows)).encode()).warnings
    assert len(warnings) == 101
    assert warnings[-1] == "and other unknown names, 50 times"


def test_on_line_hears_of_every_line() -> None:
    heard: list[int] = []
    on_line: Callable[[int], None] = heard.append
    validate(io.BytesIO(GOOD + b"\n\n" + BAD), Defaults(), LIMIT, on_line)
    assert heard == [1, 3]


def test_the_digest_is_of_the_content() -> None:
    assert judged(GOOD).digest == judged(GOOD, model="m").digest
    assert judged(GOOD).digest != judged(GOOD + b"\n").digest


WORDS = b'"messages" "body" "url" "method" "custom_id" "role" "x" NaN - 1e999 0 null'.split()
MARKS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\ud800", b"\\", b"\n", b"\r", b"\0", b"\xff", b"\f", b"\v", BOM]
PIECES = st.sampled_from([b'{"prompt":', GOOD, *WORDS, *MARKS]) | st.binary(max_size=4)


@settings(deadline=None)
@given(st.lists(PIECES, max_size=20).map(b"".join))
def test_no_bytes_raise_anything_but_invalid_line(content: bytes) -> None:
    told = ""
    try:
        body = parse_line(content, Defaults(model="m")).body
    except InvalidLine as error:
        told, body = str(error), b"{}"
    assert "\n" not in told
    assert told or json.loads(body)["model"] == "m"


@settings(deadline=None)
@given(st.lists(PIECES, max_size=40).map(b"".join))
def test_both_passes_agree(content: bytes) -> None:
    report = judged(content, limit=60)
    found = taken(content, limit=60)
    good = [item.custom_id for _, item in found if isinstance(item, Request)]
    assert (report.total, report.bad) == (len(good), len(found) - len(good))
    assert len(set(good)) == len(good)
    assert report.ok or report.problems


LINES = st.lists(
    st.sampled_from(
        [
            GOOD,
            b"",
            b" " + GOOD,
            GOOD + b"\f",
            b"\v" + GOOD,
            identified("a"),
            identified("b"),
            b'{"prompt":1,"custom_id":"c"}',
        ]
    )
)


@settings(deadline=None)
@given(LINES.map(b"\n".join), st.booleans())
def test_both_ways_to_read_again_agree(content: bytes, model: bool) -> None:
    """Lines that were all good are not judged again; the same lines beside a bad one are."""
    defaults = Defaults(model="m" if model else None)
    bad = content + b"\n" + BAD
    alone, beside = (
        [
            (number, found.endpoint, found.body, found.custom_id)
            for number, found in requests(io.BytesIO(raw), defaults, LIMIT, validate(io.BytesIO(raw), defaults, LIMIT))
            if isinstance(found, Request)
        ]
        for raw in (content, bad)
    )
    assert alone == beside
