"""Uploaded files on the disk: whole or not there, for their owner alone, and none for ever."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from api.openai.spool import ASKED_IDS, Incoming, Spool
from api.problems import Problem
from jobs.errors import NotFound

ID = "file-0123456789abcdef01234567"
OTHER = "file-ffffffffffffffffffffffff"
DEV_FULL = Path("/dev/full")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "files"


@pytest.fixture
def spool(folder: Path) -> Spool:
    return Spool(folder)


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def put(spool: Spool, file_id: str, content: bytes = b"x") -> None:
    with spool.new() as incoming:
        incoming.write(content)
        incoming.commit(file_id)


def content(spool: Spool, file_id: str) -> bytes:
    with spool.open(file_id) as file:
        return file.read()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def age(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def none_known(_: list[str]) -> set[str]:
    return set()


def test_a_file_is_there_once_committed(spool: Spool, folder: Path) -> None:
    with spool.new() as incoming:
        incoming.write(b"one\n")
        incoming.write(b"")
        incoming.write(b"two\0\xff")
        assert incoming.size == 9
        with pytest.raises(NotFound):
            spool.open(ID)
        incoming.commit(ID)
    assert content(spool, ID) == b"one\ntwo\0\xff"
    assert spool.size(ID) == 9
    assert spool.path(ID) == folder / ID
    assert names(folder) == [ID]


def test_what_is_not_committed_is_gone(spool: Spool, folder: Path) -> None:
    with spool.new() as incoming:
        incoming.write(b"x")
        assert len(names(folder)) == 1
    assert names(folder) == []
    incoming.discard()
    other = spool.new()
    other.discard()
    other.discard()
    assert names(folder) == []


def test_discarding_what_was_committed_leaves_it(spool: Spool) -> None:
    incoming = spool.new()
    incoming.commit(ID)
    incoming.discard()
    assert spool.size(ID) == 0


def test_nothing_is_made_before_the_first_upload(spool: Spool, folder: Path) -> None:
    for look in (spool.open, spool.size, spool.path):
        with pytest.raises(NotFound, match="there is no such file"):
            look(ID)
    spool.remove(ID)
    assert spool.strays(0, none_known) == 0
    assert not folder.parent.exists()


@pytest.mark.usefixtures("open_umask")
def test_it_is_its_owners_alone(spool: Spool, folder: Path) -> None:
    put(spool, ID)
    assert [path.stat().st_mode & 0o777 for path in (folder / ID, folder, folder.parent)] == [0o600, 0o700, 0o700]


def test_removed_is_not_found(spool: Spool, folder: Path) -> None:
    put(spool, ID)
    put(spool, OTHER, b"kept")
    spool.remove(ID)
    spool.remove(ID)
    with pytest.raises(NotFound):
        spool.size(ID)
    assert content(spool, OTHER) == b"kept"


def test_a_file_that_is_read_can_be_removed(spool: Spool) -> None:
    put(spool, ID, b"content")
    with spool.open(ID) as file:
        spool.remove(ID)
        assert file.read() == b"content"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "x", "../secret", "file-", ID + "\n", ID + "0", ID[:-1], ID.upper(), f"../files/{ID}", f"{ID}/.",
     "/etc/passwd", ID[:-1] + "\u0661", ID + "-output", "file-0123456789abcdef0123456\0", "incoming-x"],
)  # fmt: skip
def test_no_other_name_reaches_the_disk(spool: Spool, folder: Path, name: str) -> None:
    put(spool, ID)
    (folder / "x").touch()
    (folder / "incoming-x").touch()
    (folder.parent / "secret").touch()
    for look in (spool.open, spool.size, spool.path):
        with pytest.raises(NotFound):
            look(name)
    spool.remove(name)
    with spool.new() as incoming, pytest.raises(ValueError, match="not the id of a file"):
        incoming.commit(name)
    assert names(folder) == [ID, "incoming-x", "x"]
    assert (folder.parent / "secret").exists()


def test_commit_reaches_the_disk_before_the_name_and_the_name_before_it_returns(
    spool: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, bool]] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append((os.fstat(fd).st_ino, (folder / ID).exists()))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    put(spool, ID)
    assert synced == [((folder / ID).stat().st_ino, False), (folder.stat().st_ino, True)]


@pytest.mark.parametrize(("number", "code"), [(errno.EINVAL, ""), (errno.EIO, "files")])
def test_folders_that_can_not_be_synced(
    spool: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if os.fstat(fd).st_ino == folder.stat().st_ino:
            raise OSError(number, os.strerror(number))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    if not code:
        put(spool, ID)
        assert content(spool, ID) == b"x"
    else:
        with pytest.raises(Problem) as caught:
            put(spool, ID)
        assert caught.value.code == code


@pytest.mark.skipif(not DEV_FULL.exists(), reason="has no /dev/full")
def test_a_full_disk_is_told(spool: Spool, tmp_path: Path) -> None:
    with Incoming(tmp_path / "incoming-x", DEV_FULL.open("wb", buffering=0)) as incoming:
        with pytest.raises(Problem) as caught:
            incoming.write(b"my prompt")
        assert incoming.size == 0
    assert (caught.value.status, caught.value.code) == (507, "no_room")
    assert "my prompt" not in caught.value.detail


def test_a_quota_is_a_full_disk(spool: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Problem) as caught:
        put(spool, ID)
    assert (caught.value.status, caught.value.code) == (507, "no_room")
    assert names(folder) == []


def test_a_write_that_takes_a_part_only_goes_on_or_says_so(spool: Spool, folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with spool.new() as incoming, pytest.raises(Problem) as caught:
            incoming.write(b"x" * 150_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == "files"
    assert names(folder) == []


def test_a_folder_that_can_not_be_used_is_told_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    spool = Spool(tmp_path / "file" / "files")
    calls: list[Callable[[], object]] = [spool.new, lambda: spool.open(ID), lambda: spool.size(ID)]
    calls += [lambda: spool.remove(ID), lambda: spool.strays(0, none_known)]
    for call in calls:
        with pytest.raises(Problem) as caught:
            call()
        assert (caught.value.status, caught.value.code) == (500, "files")
        assert "MIMOQ_FILES_DIR" in caught.value.detail
        assert str(tmp_path) not in caught.value.detail


def test_an_upload_whose_folder_was_taken_away_is_a_fault_of_ours(spool: Spool, folder: Path) -> None:
    incoming = spool.new()
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(Problem) as caught:
        incoming.commit(ID)
    incoming.discard()
    assert caught.value.code == "files"


def test_strays_are_what_nobody_knows_or_commits(spool: Spool, folder: Path) -> None:
    for file_id in (ID, OTHER):
        put(spool, file_id)
    old, new = spool.new(), spool.new()
    (folder / "someone's").touch()
    (folder / "file-eeeeeeeeeeeeeeeeeeeeeeee").mkdir()
    fresh = "file-aaaaaaaaaaaaaaaaaaaaaaaa"
    put(spool, fresh)
    abandoned = folder / next(name for name in names(folder) if name.startswith("incoming-"))
    for path in folder.iterdir():
        if path.name != fresh and not (path.name.startswith("incoming-") and path != abandoned):
            age(path, 100)
    asked: list[list[str]] = []

    def known(ids: list[str]) -> set[str]:
        asked.append(sorted(ids))
        return {OTHER}

    assert spool.strays(200, known) == 0
    assert asked == []
    assert spool.strays(50, known) == 2
    assert asked == [[ID, OTHER]]
    left = names(folder)
    assert [name for name in left if not name.startswith("incoming-")] == sorted(
        [fresh, "file-eeeeeeeeeeeeeeeeeeeeeeee", OTHER, "someone's"]
    )
    assert len(left) == 5
    assert not abandoned.exists()
    old.discard()
    new.discard()


def test_strays_are_asked_about_in_groups(spool: Spool, folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(ASKED_IDS + 1):
        (folder / f"file-{number:024x}").touch()
    sizes: list[int] = []

    def known(ids: list[str]) -> set[str]:
        sizes.append(len(ids))
        return set(ids[1:])

    assert spool.strays(-10, known) == 2
    assert sizes == [ASKED_IDS, 1]


def test_strays_that_another_process_removed_are_not_counted(spool: Spool) -> None:
    put(spool, ID)
    put(spool, OTHER)

    def known(_: list[str]) -> set[str]:
        spool.remove(ID)
        return set()

    assert spool.strays(-10, known) == 1
