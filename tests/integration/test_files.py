"""OpenAI's files over HTTP: what is taken, kept, shown, and taken away again; and what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from api.openai.keeper import UNTOUCHED_S, Keeper
from api.openai.spool import Spool
from jobs import files, keys
from jobs.cursors import GONE_S
from tests.integration.api_stand import PROMPT, Api, ApiStand, api_stand, core_standing, line, lines
from tests.integration.openai_stand import create, upload
from tests.integration.store_model import redis_time
from tests.waiting import wait_for

MOST, MOST_INPUT = 40_000_000, 30_000_000
ERROR = {"message", "type", "param", "code"}
HEX = "0123456789abcdef01234567"


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiStand]:
    folder = tmp_path_factory.mktemp("api")
    with api_stand(folder) as stand:
        stand.api(files_dir=str(folder / "a" / "files"), file_max_bytes=str(MOST), batch_max_bytes=str(MOST_INPUT))
        yield stand
        stand.kept_secrets()


@pytest.fixture
def http(stand: ApiStand) -> httpx.Client:
    """A client of a new tenant."""
    return stand.http()


@pytest.fixture
def folder(stand: ApiStand) -> Path:
    """Where the files lie."""
    return stand.folder / "a" / "files"


def lying(folder: Path) -> set[Path]:
    """What lies in the folder, which is made at the first upload."""
    return set(folder.iterdir()) if folder.exists() else set()


def refused(response: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """The error, which is one of OpenAI's and names this parameter."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) >= ERROR
    assert error["param"] == param, error
    assert PROMPT not in response.text
    return error


def form(*parts: tuple[str, bytes], boundary: str = "edge") -> tuple[bytes, dict[str, str]]:
    """A form of parts `(disposition, content)`, and its header."""
    body = b"".join(
        b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (boundary.encode(), disposition.encode(), content)
        for disposition, content in parts
    )
    return body + f"--{boundary}--\r\n".encode(), {"content-type": f"multipart/form-data; boundary={boundary}"}


def page(http: httpx.Client, **params: Any) -> list[str]:
    """Ids of a page of files."""
    response = http.get("/v1/files", params=params)
    assert response.status_code == 200, response.text
    return [file["id"] for file in response.json()["data"]]


# -- taken


def test_what_is_taken_is_given_back(http: httpx.Client) -> None:
    content = bytes(range(256)) * 300 + b"\r\n--edge\r\n--edg"
    made = upload(http, content, "a b.bin", purpose="user_data")
    assert made.status_code == 200
    file = made.json()
    assert file == {
        "id": file["id"],
        "object": "file",
        "bytes": len(content),
        "created_at": file["created_at"],
        "expires_at": None,
        "filename": "a b.bin",
        "purpose": "user_data",
        "status": "processed",
        "status_details": None,
    }
    assert abs(file["created_at"] - time.time()) < 600
    assert http.get(f"/v1/files/{file['id']}").json() == file
    read = http.get(f"/v1/files/{file['id']}/content")
    assert (read.status_code, read.content) == (200, content)
    assert read.headers["content-length"] == str(len(content))
    assert "x-incomplete" not in read.headers


def test_fields_may_stand_on_either_side_of_the_file(http: httpx.Client) -> None:
    purpose, content = ('name="purpose"', b"batch"), ('name="file"; filename="in.jsonl"', lines(line()))
    expires = [
        ('name="expires_after[anchor]"', b"created_at"),
        ('name="expires_after[seconds]"', b"3600"),
    ]
    for parts in ((purpose, content, *expires), (content, *expires, purpose), (*expires, content, purpose)):
        body, headers = form(*parts)
        made = http.post("/v1/files", content=body, headers=headers)
        assert made.status_code == 200, made.text
        assert made.json()["expires_at"] == pytest.approx(made.json()["created_at"] + 3_600, abs=1)


def test_names_lead_nowhere(http: httpx.Client, folder: Path) -> None:
    for name, kept in (
        ("../../etc/passwd.jsonl", "passwd.jsonl"),
        ("C:\\\\x\\\\y.jsonl", "y.jsonl"),
        ("/abs.jsonl", "abs.jsonl"),
    ):
        body, headers = form(('name="purpose"', b"batch"), (f'name="file"; filename="{name}"', b"{}\n"))
        made = http.post("/v1/files", content=body, headers=headers)
        assert (made.status_code, made.json()["filename"]) == (200, kept)
    assert not list(folder.parent.glob("*.jsonl"))
    assert not list(folder.glob("*.jsonl"))


def test_only_its_owner_may_read_the_folder(http: httpx.Client, folder: Path) -> None:
    file = upload(http, b"{}\n").json()["id"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / file).stat().st_mode) == 0o600


def test_processes_share_a_folder(stand: ApiStand, folder: Path) -> None:
    token = stand.token()
    one, two = (stand.http(token, api) for api in (stand.apis[0], stand.api(files_dir=str(folder))))
    file = upload(one, b"shared\n").json()["id"]
    assert two.get(f"/v1/files/{file}/content").content == b"shared\n"
    assert two.delete(f"/v1/files/{file}").json()["deleted"]
    refused(one.get(f"/v1/files/{file}/content"), 404, "id")


def test_a_large_file_needs_no_memory(stand: ApiStand, http: httpx.Client) -> None:
    process = psutil.Process(stand.apis[0].process.pid)
    block = os.urandom(100_000)
    body, headers = form(('name="purpose"', b"user_data"), ('name="file"; filename="x"', b"@"))
    head, _, tail = body.partition(b"@")
    upload(http, block * 20, purpose="user_data")
    before = most = process.memory_info().rss

    def sent() -> Iterator[bytes]:
        nonlocal most
        yield head
        for number in range(390):
            yield block
            if number % 20 == 0:
                most = max(most, process.memory_info().rss)
        yield tail

    made = http.post("/v1/files", content=sent(), headers=headers)
    assert (made.status_code, made.json()["bytes"]) == (200, 39_000_000)
    with http.stream("GET", f"/v1/files/{made.json()['id']}/content") as read:
        size = 0
        for chunk in read.iter_bytes():
            assert chunk[:10] == (block * 2)[size % len(block) :][:10]
            size += len(chunk)
            most = max(most, process.memory_info().rss)
    assert size == 39_000_000
    assert most - before < 25_000_000
    http.delete(f"/v1/files/{made.json()['id']}")


# -- refused


def test_forms_that_can_not_be(http: httpx.Client, folder: Path) -> None:
    purpose, content = ('name="purpose"', b"batch"), ('name="file"; filename="in.jsonl"', lines(line()))
    before = lying(folder)
    for parts, param in (
        ([content], "purpose"),
        ([('name="purpose"', b"ransom"), content], "purpose"),
        ([('name="purpose"', b""), content], "purpose"),
        ([purpose], "file"),
        ([purpose, content, content], "file"),
        ([purpose, ('name="file"', b"{}")], "file"),
        ([purpose, purpose, content], "purpose"),
        ([purpose, ('name="file"; filename="in.jsonl"', b"")], "file"),
        ([purpose, ('name="file"; filename="in.csv"', b"{}")], "file"),
        ([purpose, content, ('name="colour"', b"red")], "colour"),
        ([purpose, content, ('name="expires_after[anchor]"', b"created_at")], "expires_after"),
        ([purpose, content, ('name="expires_after[seconds]"', b"4000")], "expires_after"),
        *(
            (
                [
                    purpose,
                    content,
                    ('name="expires_after[anchor]"', b"created_at"),
                    ('name="expires_after[seconds]"', seconds),
                ],
                "expires_after",
            )
            for seconds in (
                b"3599",
                b"2592001",
                b"-4000",
                b"4e3",
                b"4000.0",
                b" 4000",
                b"",
                b"9" * 400,
                "٤٠٠٠".encode(),
            )
        ),
        (
            [
                purpose,
                content,
                ('name="expires_after[anchor]"', b"last_active_at"),
                ('name="expires_after[seconds]"', b"4000"),
            ],
            "expires_after",
        ),
    ):
        body, headers = form(*parts)
        refused(http.post("/v1/files", content=body, headers=headers), 400, param)
    assert page(http) == []
    assert lying(folder) == before


def test_bodies_that_are_no_forms(http: httpx.Client, folder: Path) -> None:
    before = lying(folder)
    body, headers = form(('name="purpose"', b"batch"), ('name="file"; filename="in.jsonl"', lines(line())))
    refused(http.post("/v1/files", content=body[:-10], headers=headers), 400)
    refused(http.post("/v1/files", content=b"", headers=headers), 400)
    refused(http.post("/v1/files", content=b"garbage", headers=headers), 400)
    refused(http.post("/v1/files", content=body, headers={"content-type": "multipart/form-data"}), 400)
    for kind in ("application/json", "text/plain", ""):
        refused(http.post("/v1/files", content=body, headers={"content-type": kind}), 415)
    refused(http.post("/v1/files", content=body, headers={**headers, "content-encoding": "gzip"}), 415)
    refused(http.post("/v1/files"), 415)
    assert lying(folder) == before


def test_each_purpose_has_its_bound(http: httpx.Client, folder: Path) -> None:
    before = lying(folder)
    assert upload(http, b"x" * MOST_INPUT).status_code == 200
    refused(upload(http, b"x" * (MOST_INPUT + 1)), 413, "file")
    assert upload(http, b"x" * (MOST_INPUT + 1), purpose="user_data").status_code == 200
    refused(upload(http, b"x" * (MOST + 1), purpose="user_data"), 413, "file")
    assert len(page(http)) == 2
    for file in page(http):
        http.delete(f"/v1/files/{file}")
    assert lying(folder) == before


@pytest.mark.parametrize("declared", [True, False])
def test_an_upload_that_is_cut_leaves_nothing(
    stand: ApiStand, http: httpx.Client, folder: Path, declared: bool
) -> None:
    before = lying(folder)
    body, headers = form(('name="purpose"', b"batch"), ('name="file"; filename="in.jsonl"', b"x" * 4_000_000))
    host, port = stand.apis[0].url.removeprefix("http://").split(":")
    framing = f"Content-Length: {len(body)}" if declared else "Transfer-Encoding: chunked"
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nX-Api-Key: {stand.token()}\r\nContent-Type: {headers['content-type']}"
    )
    sent = body[:-1_000]
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}\r\n{framing}\r\n\r\n".encode())
        connection.sendall(sent if declared else b"%x\r\n%s\r\n" % (len(sent), sent))
        wait_for(lambda: lying(folder) - before, what="a file that grows")
    wait_for(lambda: lying(folder) == before, what="what came in to go")


def test_what_a_list_is_asked(http: httpx.Client) -> None:
    mine = upload(http, b"x").json()["id"]
    for params, param in (
        ({"limit": 0}, "limit"),
        ({"limit": 10_001}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"limit": ""}, "limit"),
        ({"order": "sideways"}, "order"),
        ({"after": f"file-{HEX}"}, "after"),
        ({"after": "x"}, "after"),
        ({"after": "x" * 201}, "after"),
        ({"purpose": "x" * 65}, "purpose"),
    ):
        refused(http.get("/v1/files", params=params), 400, param)
    assert page(http, limit=10_000, order="asc", purpose="batch") == [mine]
    assert page(http, purpose="vision") == []
    for name, query, param in ((mine, "offset=-1", "offset"), (mine, "offset=x", "offset"), (mine, "limit=0", "limit")):
        refused(http.get(f"/v1/files/{name}/content?{query}"), 400, param)


# -- whose


def test_another_tenants_file_is_as_one_that_is_not_there(stand: ApiStand, http: httpx.Client, folder: Path) -> None:
    file = upload(http, lines(line())).json()["id"]
    batch = create(http, input_file_id=file).json()["id"].removeprefix("batch_")
    other = stand.http()
    names = [
        file,
        f"file-{batch}-output",
        f"file-{batch}-error",
        f"file-{HEX}",
        f"file-{HEX}-output",
        "file-" + HEX.upper(),
        "file-x",
        "incoming-x",
        "%2e%2e%5cpasswd",
        "file-" + "0" * 5_000,
        "é",
    ]
    for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
        answers = {other.request(method, f"/v1/files/{name}{tail}").content for name in names}
        assert len(answers) == 1
        assert json.loads(answers.pop())["error"]["code"] == "not_found"
    assert page(other) == []
    refused(other.get("/v1/files", params={"after": file}), 400, "after")
    unknown = create(other, input_file_id=f"file-{HEX}")
    assert create(other, input_file_id=file).content == unknown.content
    assert http.get(f"/v1/files/{file}/content").content
    assert (folder / file).exists()


def test_scopes(stand: ApiStand) -> None:
    reads, submits = stand.http(stand.token(["read"])), stand.http(stand.token(["submit"]))
    file = upload(submits, b"x").json()["id"]
    refused(upload(reads, b"x"), 403)
    refused(reads.delete(f"/v1/files/{file}"), 403)
    refused(submits.get(f"/v1/files/{file}/content"), 403)
    refused(submits.get("/v1/files"), 403)
    assert submits.delete(f"/v1/files/{file}").status_code == 200


# -- taken away


def test_a_deleted_file_is_gone_from_the_disk(stand: ApiStand, http: httpx.Client, folder: Path) -> None:
    file = upload(http, b"x").json()["id"]
    assert (folder / file).read_bytes() == b"x"
    assert http.delete(f"/v1/files/{file}").json() == {"id": file, "object": "file", "deleted": True}
    assert not (folder / file).exists()
    assert not stand.redis.exists(keys.file(file))
    refused(http.delete(f"/v1/files/{file}"), 404, "id")
    assert stand.redis.zscore(keys.FILES, file) is None


def keeper(stand: ApiStand, folder: Path) -> Keeper:
    """One that a test has do its rounds."""
    threads: Any = None
    return Keeper(threads, Spool(folder))


def test_a_file_whose_time_is_over(stand: ApiStand, http: httpx.Client, folder: Path) -> None:
    over, going = (upload(http, b"x").json()["id"] for _ in range(2))
    kept = upload(http, b"x", purpose="user_data").json()["id"]
    now = redis_time(stand.redis)
    stand.redis.hset(keys.file(over), "expires_at", repr(now - 1))
    stand.redis.zadd(keys.FILES, {over: now - 1})
    # Nobody sees it any more, whether or not it has been taken away.
    refused(http.get(f"/v1/files/{over}"), 404, "id")
    refused(http.get(f"/v1/files/{over}/content"), 404, "id")
    assert page(http) == [kept, going]
    assert page(http, after=over) == []
    refused(create(http, input_file_id=over), create(http, input_file_id=f"file-{HEX}").status_code, "input_file_id")
    assert (folder / over).exists()
    keeper(stand, folder).expire(stand.store)
    assert not (folder / over).exists()
    assert not stand.redis.exists(keys.file(over))
    assert (folder / going).exists()
    assert (folder / kept).exists()
    assert page(http) == [kept, going]


def test_what_nobody_knows_is_taken_away_once_it_is_old(stand: ApiStand, http: httpx.Client, folder: Path) -> None:
    known, unknown, young = (upload(http, b"x").json()["id"] for _ in range(3))
    stand.redis.delete(keys.file(unknown), keys.file(young))
    half, foreign = folder / "incoming-abc", folder / "README"
    for path in (half, foreign):
        path.write_bytes(b"x")
    for path in (half, foreign, folder / known, folder / unknown):
        os.utime(path, (1, time.time() - UNTOUCHED_S - 60))
    keeper(stand, folder).search(stand.store)
    there = {path.name for path in folder.iterdir()}
    assert there >= {known, young, "README"}
    assert not there & {half.name, unknown}


def test_places_in_lists_are_kept_for_a_while(stand: ApiStand, http: httpx.Client, folder: Path) -> None:
    made = [upload(http, b"x").json()["id"] for _ in range(4)]
    for file in made[1:]:
        http.delete(f"/v1/files/{file}")
    known: Any = stand.redis.smembers(keys.TENANTS)
    tenants = [raw.decode() for raw in known]
    (tenant,) = [name for name in tenants if stand.redis.zscore(keys.tenant_files(name), made[0]) is not None]
    name = keys.tenant_files(tenant)
    old = redis_time(stand.redis) - GONE_S - 60
    stand.redis.zadd(name, {made[0]: old, made[1]: old})
    keeper(stand, folder).search(stand.store)
    there: Any = stand.redis.zrange(name, 0, -1)
    assert {raw.decode() for raw in there} == {made[0], made[2], made[3]}
    assert page(http, after=made[2]) == [made[0]]
    refused(http.get("/v1/files", params={"after": made[1]}), 400, "after")


def test_a_process_that_dies_over_an_upload_leaves_no_file(stand: ApiStand) -> None:
    folder = stand.folder / "other"
    victim = stand.api(files_dir=str(folder))
    try:
        token = stand.token()
        body, headers = form(('name="purpose"', b"batch"), ('name="file"; filename="in.jsonl"', b"x" * 4_000_000))
        host, port = victim.url.removeprefix("http://").split(":")
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nX-Api-Key: {token}\r\nContent-Type: {headers['content-type']}"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:-1_000])
            wait_for(lambda: folder.exists() and any(path.stat().st_size for path in folder.iterdir()), what="a file")
            assert victim.end(signal.SIGKILL) == -signal.SIGKILL
        assert page(stand.http(token)) == []
        (left,) = folder.iterdir()
        assert left.name.startswith("incoming-")
        assert Spool(folder).strays(0.0, lambda ids: set(ids)) == 1
    finally:
        stand.apis.remove(victim)


def test_a_disk_that_is_full(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything that is written there is refused by the system itself."""
    folder = tmp_path / "files"

    def full(prefix: str, dir: Path) -> tuple[int, str]:
        path = Path(dir) / f"{prefix}full"
        path.symlink_to("/dev/full")
        return os.open(path, os.O_WRONLY), str(path)

    async def main() -> None:
        async with core_standing(store_url, files_dir=folder) as (_, http):
            sent: dict[str, Any] = {"files": {"file": ("in.jsonl", lines(line()))}, "data": {"purpose": "batch"}}
            inline = {"endpoint": "/v1/chat/completions", "requests": [{"custom_id": "a", "body": line()["body"]}]}
            with monkeypatch.context() as patched:
                patched.setattr("api.openai.spool.tempfile.mkstemp", full)
                for response in (
                    await http.post("/v1/files", **sent),
                    await http.post("/v1/batches", json=inline),
                ):
                    error = refused(response, 507)
                    assert str(folder) not in error["message"]
                    assert list(folder.iterdir()) == []
            assert (await http.get("/v1/files")).json()["data"] == []
            assert (await http.get("/v1/batches")).json()["data"] == []
            assert (await http.post("/v1/files", **sent)).status_code == 200

    asyncio.run(main())
    assert PROMPT not in caplog.text


def test_a_folder_that_can_not_be_used(store_url: str, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")

    async def main() -> None:
        async with core_standing(store_url, files_dir=blocked / "files") as (_, http):
            response = await http.post("/v1/files", files={"file": ("in.jsonl", b"x")}, data={"purpose": "batch"})
            assert "MIMOQ_FILES_DIR" in refused(response, 500)["message"]
            assert str(tmp_path) not in response.text

    asyncio.run(main())


def test_records_and_files_never_part(stand: ApiStand, http: httpx.Client, folder: Path) -> None:
    """What is listed can be read, and what lies there is known."""
    for number in range(5):
        upload(http, b"%d" % number)
    for file in page(http):
        assert http.get(f"/v1/files/{file}/content").status_code == 200
    there = [path.name for path in folder.iterdir() if path.name.startswith("file-")]
    # One of another test has lost its record on purpose.
    assert len(set(there) - files.known(stand.redis, there)) <= 1


def test_a_file_that_is_gone_from_the_disk(http: httpx.Client, folder: Path) -> None:
    file = upload(http, b"x").json()["id"]
    (folder / file).unlink()
    refused(http.get(f"/v1/files/{file}/content"), 404, "id")
    assert http.delete(f"/v1/files/{file}").status_code == 200


def test_a_method_that_is_not_there(stand: ApiStand, http: httpx.Client) -> None:
    assert isinstance(stand.apis[0], Api)
    for method, path, allow in (
        ("PUT", "/v1/files", "GET, POST"),
        ("POST", f"/v1/files/file-{HEX}", "DELETE, GET"),
        ("PATCH", f"/v1/files/file-{HEX}/content", "GET"),
    ):
        response = http.request(method, path)
        refused(response, 405)
        assert response.headers["allow"] == allow
