"""Forms as clients really send them, cut anywhere; and everything else refused in words that repeat none of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.openai.multipart import BLOCK_BYTES, FIELD_BYTES, HEADER_BYTES, PARTS, PIECE_BYTES, Form, receive
from api.openai.spool import Incoming, Spool
from api.problems import Problem

SECRET = "my prompt"
BOUNDARY = "----------------------4f3c"
TYPE = f"multipart/form-data; boundary={BOUNDARY}"
MOST = 1_000_000
NO_FORM = "the body is no form of its Content-Type; send multipart/form-data with one part named file"
LINES = b'{"custom_id": "1"}\n{"custom_id": "2"}\n'


def part(name: str, value: bytes, more: str = "", headers: str = "") -> bytes:
    return f'Content-Disposition: form-data; name="{name}"{more}\r\n{headers}\r\n'.encode() + value


def form(*parts: bytes, end: bytes = b"--\r\n") -> bytes:
    """A body as curl makes it."""
    line = b"--" + BOUNDARY.encode()
    return b"".join(line + b"\r\n" + each + b"\r\n" for each in parts) + line + end


FILE = part("file", LINES, '; filename="in.jsonl"', "Content-Type: application/octet-stream\r\n")
PURPOSE = part("purpose", b"batch")


def received(
    folder: Path, body: bytes, content_type: str = TYPE, *, chunk: int = 65_536, most: int = MOST
) -> tuple[Form, bytes, list[int]]:
    """The form, the file's content, and the sizes of the blocks that it was written in."""
    blocks: list[int] = []

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), chunk):
            yield body[start : start + chunk]

    async def write(incoming: Incoming, data: bytes) -> None:
        await asyncio.sleep(0)
        blocks.append(len(data))
        incoming.write(data)

    spool = Spool(folder)
    with spool.new() as incoming:
        found = asyncio.run(receive(chunks(), content_type, incoming, most, write))
        incoming.commit("file-" + "0" * 24)
    with spool.open("file-" + "0" * 24) as file:
        return found, file.read(), blocks


def refused(folder: Path, body: bytes, content_type: str = TYPE, **how: int) -> Problem:
    with pytest.raises(Problem) as caught:
        received(folder, body, content_type, **how)
    assert SECRET not in caught.value.detail
    return caught.value


@pytest.mark.parametrize("chunk", [1, 7, 65_536])
@pytest.mark.parametrize("parts", [(PURPOSE, FILE), (FILE, PURPOSE), (PURPOSE, FILE, part("a[b]", b"")), (FILE,)])
def test_fields_come_before_and_after_the_file(tmp_path: Path, parts: tuple[bytes, ...], chunk: int) -> None:
    found, content, _ = received(tmp_path, form(*parts), chunk=chunk)
    assert content == LINES
    assert found.filename == "in.jsonl"
    assert found.fields == {
        **({"purpose": "batch"} if PURPOSE in parts else {}),
        **({"a[b]": ""} if len(parts) > 2 else {}),
    }


@pytest.mark.parametrize("chunk", [1, 65_536])
def test_what_httpx_sends(tmp_path: Path, chunk: int) -> None:
    request = httpx.Request(
        "POST",
        "http://127.0.0.1/v1/files",
        data={"purpose": "batch", "expires_after[anchor]": "created_at", "ключ": "значение 🤔\r\n"},
        files={"file": ("C:\\Übung/日本 \\in put.jsonl", LINES, "application/jsonl")},
    )
    found, content, _ = received(tmp_path, request.read(), request.headers["content-type"], chunk=chunk)
    assert content == LINES
    assert found.filename == "in put.jsonl"
    assert found.fields == {"purpose": "batch", "expires_after[anchor]": "created_at", "ключ": "значение 🤔\r\n"}


@pytest.mark.parametrize(
    ("file", "filename"),
    [
        (LINES, "upload"),
        (("日本.jsonl", LINES), "日本.jsonl"),
        (("in.jsonl", LINES, "application/jsonl"), "in.jsonl"),
        (None, "x.jsonl"),
    ],
)
def test_what_the_sdk_of_openai_sends(tmp_path: Path, file: Any, filename: str) -> None:
    seen: list[tuple[str, bytes]] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append((request.headers["content-type"], request.read()))
        return httpx2.Response(200, json={})

    (tmp_path / "x.jsonl").write_bytes(LINES)
    with openai.OpenAI(
        api_key="k",
        base_url="http://127.0.0.1:9/v1",
        http_client=httpx2.Client(transport=httpx2.MockTransport(answer)),
    ) as client:
        client.files.create(
            file=tmp_path / "x.jsonl" if file is None else file,
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
    [(content_type, body)] = seen
    for chunk in (1, 65_536):
        found, content, _ = received(tmp_path / "files", body, content_type, chunk=chunk)
        assert content == LINES
        assert found.filename == filename
        assert found.fields == {
            "purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"
        }  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(
            [
                b"\r",
                b"\n",
                b"\r\n",
                b"-",
                b"--",
                b"\r\n--b",
                b"\r\n--bX",
                b"\r\n--b-",
                b"\r\n--b\r",
                b"\r\n-",
                b"--b--",
                b"b",
                b"\0\xff",
            ]
        ),
        max_size=12,
    ).map(b"".join),
    st.integers(1, 12),
)
def test_content_like_a_boundary_is_content(tmp_path: Path, content: bytes, chunk: int) -> None:
    if any(mark in content + b"\r\n" for mark in (b"\r\n--b\r\n", b"\r\n--b--")) or content.startswith(b"--b"):
        return  # that is a boundary
    body = (
        b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + content + b"\r\n--b--\r\n"
    )
    found, came, _ = received(tmp_path, body, "multipart/form-data; boundary=b", chunk=chunk)
    assert (found.fields, came) == ({"a": "1"}, content)


def test_the_file_is_written_in_blocks(tmp_path: Path) -> None:
    content = bytes(range(256)) * 12_000
    body = form(PURPOSE, part("file", content, '; filename="f"'))
    for chunk in (10_000, len(body)):
        found, came, blocks = received(tmp_path, body, chunk=chunk, most=len(content))
        assert came == content
        assert found.fields == {"purpose": "batch"}
        assert sum(blocks) == len(content)
        assert 0 < blocks[-1] < BLOCK_BYTES + PIECE_BYTES
        assert all(BLOCK_BYTES <= block < BLOCK_BYTES + PIECE_BYTES for block in blocks[:-1])


def test_what_has_come_is_written_before_the_rest_comes(tmp_path: Path) -> None:
    written: list[int] = []

    async def chunks() -> AsyncIterator[bytes]:
        yield form(part("file", b"", '; filename="f"'), end=b"")[: -len(BOUNDARY) - 4]
        for number in range(5):
            assert len(written) == number
            yield b"x" * BLOCK_BYTES
        yield b"\r\n--" + BOUNDARY.encode() + b"--"

    async def write(incoming: Incoming, data: bytes) -> None:
        written.append(len(data))

    with Spool(tmp_path).new() as incoming:
        asyncio.run(receive(chunks(), TYPE, incoming, 10 * BLOCK_BYTES, write))
    assert sum(written) == 5 * BLOCK_BYTES


def test_a_file_may_be_empty_or_as_long_as_is_allowed(tmp_path: Path) -> None:
    for content in (b"", b"x" * 5_000):
        body = form(part("file", content, '; filename="f"'))
        assert received(tmp_path, body, most=5_000)[1] == content
    problem = refused(tmp_path, body, most=4_999)
    assert (problem.status, problem.code, problem.members) == (413, "too_large", {"param": "file"})
    assert "4,999 bytes" in problem.detail


def test_too_much_of_anything_is_refused(tmp_path: Path) -> None:
    fields = [part(f"f{number}", b"x") for number in range(PARTS)]
    assert len(received(tmp_path, form(FILE, *fields[1:]))[0].fields) == PARTS - 1
    assert received(tmp_path, form(FILE, part("a", b"x" * FIELD_BYTES)))[0].fields["a"] == "x" * FIELD_BYTES
    head = len("Content-Dispositionform-data; name=") + len('"a"')
    assert received(tmp_path, form(FILE, part("a", b"", headers=f"A: {'x' * (HEADER_BYTES - head - 1)}\r\n")))
    one_more = f"A: {'x' * (HEADER_BYTES - head)}\r\n"
    many = "".join(f"A{number}: 1\r\n" for number in range(3_000))
    for body, what in [
        (form(FILE, *fields), "32 parts"),
        (form(FILE, part("a", b"x" * (FIELD_BYTES + 1))), "a: has over 65,536 bytes"),
        (form(FILE, part("a", b"", headers=one_more)), "8,192 bytes of headers"),
        (form(FILE, part("a", b"", headers=many)), "8,192 bytes of headers"),
        (form(FILE, part("a", b"", headers=f"{'A' * 9_000}: 1\r\n")), "8,192 bytes of headers"),
        (form(FILE, part("a", b"", headers=f"A:{' ' * 9_000}1\r\n")), "8,192 bytes of headers"),
        (form(FILE, part("a" * 9_000, b"")), "8,192 bytes of headers"),
    ]:
        for chunk in (100, len(body)):
            problem = refused(tmp_path, body, chunk=chunk)
            assert (problem.status, problem.code) == (413, "too_large")
            assert what in problem.detail


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (form(PURPOSE), "file: is missing; send it as a part with this name and a filename"),
        (form(), "file: is missing; send it as a part with this name and a filename"),
        (form(FILE, FILE), "file: is given twice"),
        (form(part("file", LINES)), "file: needs a filename"),
        (form(part("file", LINES, '; filename=""')), "file: needs a filename"),
        (form(part("file", LINES, '; filename="a/b\\\\"')), "file: needs a filename"),
        (form(part("file", LINES, "; filename*=UTF-8''in.jsonl")), "file: needs a filename"),
        (form(part("file", LINES, f'; filename="{"x" * 256}"')),
         "file: its filename has 256 characters, at most 255 are allowed"),
        (form(part("file", LINES, '; filename="a\x00b"')),
         "file: its filename must not hold control characters or line breaks"),
        (form(part("file", LINES, '; filename="a\nb"')),
         "file: its filename must not hold control characters or line breaks"),
        (form(part("file", LINES, '; filename="a\u2028b"')),
         "file: its filename must not hold control characters or line breaks"),
    ],
)  # fmt: skip
def test_there_is_one_file_and_it_has_a_name(tmp_path: Path, body: bytes, detail: str) -> None:
    problem = refused(tmp_path, body)
    assert (problem.status, problem.members, problem.detail) == (400, {"param": "file"}, detail)


@pytest.mark.parametrize(
    ("given_name", "filename"),
    [
        ("in.jsonl", "in.jsonl"),
        ("/a/b/in.jsonl", "in.jsonl"),
        ("C:\\\\a\\\\in.jsonl", "in.jsonl"),
        ("..\\../in.jsonl", "in.jsonl"),
        ('a\\"b;c.jsonl', 'a"b;c.jsonl'),
        ("a%22b.jsonl", "a%22b.jsonl"),
        ("é" * 255, "é" * 255),
    ],
)
def test_filenames(tmp_path: Path, given_name: str, filename: str) -> None:
    assert received(tmp_path, form(part("file", LINES, f'; filename="{given_name}"')))[0].filename == filename
    starred = part("file", LINES, f"; filename*=UTF-8''other.jsonl; filename=\"{given_name}\"")
    assert received(tmp_path, form(starred))[0].filename == filename


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (form(FILE, part("other", b"my prompt", '; filename="x"')), "other: has a filename; only file may be a file"),
        (form(FILE, PURPOSE, PURPOSE), "purpose: is given twice"),
        (form(FILE, part("a", b"my prompt\xff")), "a is not UTF-8"),
        (form(part("file", LINES, '; filename="\xff"').replace("\xff".encode(), b"\xff")), "the filename is not UTF-8"),
        (form(FILE, part("\xff", b"1").replace("\xff".encode(), b"\xff")), "a name of the form is not UTF-8"),
        (form(FILE, part("a", b"1", headers="Content-Transfer-Encoding: base64\r\n")),
         "send the parts of the form without a Content-Transfer-Encoding"),
        (form(FILE, b"\r\nmy prompt"), "a part of the form has no Content-Disposition: form-data with a name"),
        (form(FILE, b"Content-Disposition: form-data\r\n\r\n"),
         "a part of the form has no Content-Disposition: form-data with a name"),
        (form(FILE, b'Content-Disposition: attachment; name="a"\r\n\r\n'),
         "a part of the form has no Content-Disposition: form-data with a name"),
        (b"", "the form ended too early"),
        (b"\r\n", "the form ended too early"),
        (b'{"prompt":"my prompt"}', NO_FORM),
        (form(FILE, b"my prompt\r\n\r\n"), NO_FORM),
    ],
)  # fmt: skip
def test_what_is_no_such_form_is_refused(
    tmp_path: Path, body: bytes, detail: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        problem = refused(tmp_path, body)
    assert (problem.status, problem.detail) == (400, detail)
    assert not [record for record in caplog.records if record.name != "asyncio"]


def test_encodings_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    for encoding in ("binary", "8BIT", "7bit"):
        body = form(part("file", LINES, '; filename="f"', f"content-transfer-encoding: {encoding}\r\n"))
        assert received(tmp_path, body)[1] == LINES


def test_a_form_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = form(PURPOSE, FILE, end=b"--")
    for end in range(len(whole)):
        assert refused(tmp_path, whole[:end]).status == 400
    assert received(tmp_path, whole + b"\r\nwhat comes behind it does not count")[1] == LINES
    assert [path.name for path in tmp_path.iterdir()] == ["file-" + "0" * 24]


@pytest.mark.parametrize(
    ("content_type", "status", "detail"),
    [
        ("", 415, "send multipart/form-data with one part named file"),
        ("application/json", 415, "send multipart/form-data with one part named file"),
        ("multipart/mixed; boundary=b", 415, "send multipart/form-data with one part named file"),
        ("multipart/form-data\u2028; boundary=b", 415, "send multipart/form-data with one part named file"),
        ("multipart/form-data", 400, "needs a boundary"),
        ("multipart/form-data; boundary", 400, "needs a boundary"),
        ("multipart/form-data; boundary=", 400, "needs a boundary"),
        ('multipart/form-data; boundary=" "', 400, "needs a boundary"),
        ('multipart/form-data; boundary="a\r\nb"', 400, "needs a boundary"),
        ("multipart/form-data; boundary=" + "b" * 71, 400, "needs a boundary"),
        ("multipart/form-data; boundary=\xff", 400, "needs a boundary"),
    ],
)
def test_content_types_that_are_no_form(tmp_path: Path, content_type: str, status: int, detail: str) -> None:
    problem = refused(tmp_path, form(FILE), content_type)
    assert problem.status == status
    assert detail in problem.detail


def test_content_types_in_other_words(tmp_path: Path) -> None:
    for content_type in (
        f'Multipart/Form-Data; charset=utf-8; Boundary="{BOUNDARY}"',
        f"multipart/form-data;boundary={BOUNDARY};charset=utf-8",
    ):
        assert received(tmp_path, form(FILE), content_type)[1] == LINES


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(
            [b"--b", b"--b--", b"\r\n", b"\r", b"\n", b"-", b":", b" ", b"\t", b"x", b"\xff",
             b"Content-Disposition: form-data", b'; name="file"', b'; filename="f"', b'; name="a"',
             b"Content-Disposition", b'"', b"\\", b";", b"="]
        )
        | st.binary(max_size=8),
        max_size=30,
    ).map(b"".join),
    st.sampled_from(["multipart/form-data; boundary=b"] * 3 + [""]) | st.text(max_size=20),
    st.integers(1, 40),
)  # fmt: skip
def test_garbage_raises_a_problem_or_nothing(tmp_path: Path, body: bytes, content_type: str, chunk: int) -> None:
    for each in (content_type, f"multipart/form-data; boundary={content_type}", "multipart/form-data; boundary=b"):
        for start in (b"", b"--b\r\n", b'--b\r\nContent-Disposition: form-data; name="file"; filename="'):
            with suppress(Problem):
                received(tmp_path, start + body, each, chunk=chunk)


def test_what_writing_raises_is_raised(tmp_path: Path) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield form(FILE)

    async def write(incoming: Incoming, data: bytes) -> None:
        raise Problem(507, "no_room", "full")

    with Spool(tmp_path).new() as incoming, pytest.raises(Problem) as caught:
        asyncio.run(receive(chunks(), TYPE, incoming, MOST, write))
    assert caught.value.status == 507
    assert list(tmp_path.iterdir()) == []
