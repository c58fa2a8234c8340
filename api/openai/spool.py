"""Uploaded files on the disk: one folder, each file named by its id, there whole or not at all.

What goes wrong: the disk is full, or the folder can't be used. Everything here blocks; call it in threads.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from api.problems import Problem
from jobs.errors import NotFound

#: Ids that `strays` asks about at once.
ASKED_IDS: Final = 1_000

_ID = re.compile(r"file-[0-9a-f]{24}")
_INCOMING: Final = "incoming-"
_NOT_FOUND: Final = "there is no such file"


class Spool:
    """The folder. No name but a well-formed id ever reaches the disk.

    Each call raises a `Problem` when the disk is full (507) or can't be used (500).
    """

    def __init__(self, folder: Path) -> None:
        """The folder, and those it lies in, are made at the first upload, mode 0700."""
        self._folder = folder

    def new(self) -> Incoming:
        """A file to be written; nobody finds it before it is committed."""
        with _plain_problems():
            _make(self._folder)
            fd, path = tempfile.mkstemp(prefix=_INCOMING, dir=self._folder)
        return Incoming(Path(path), os.fdopen(fd, "wb", buffering=0))

    def open(self, file_id: str) -> BinaryIO:
        """Its content. Raises `NotFound`."""
        with _plain_problems(looking=True):
            return self._path(file_id).open("rb")

    def path(self, file_id: str) -> Path:
        """Where it lies. Raises `NotFound`."""
        self.size(file_id)
        return self._path(file_id)

    def size(self, file_id: str) -> int:
        """Its bytes. Raises `NotFound`."""
        with _plain_problems(looking=True):
            return self._path(file_id).stat().st_size

    def remove(self, file_id: str) -> None:
        """One that is not there is fine."""
        with suppress(NotFound), _plain_problems(looking=True):
            self._path(file_id).unlink()

    def strays(self, untouched_s: float, known: Callable[[list[str]], set[str]]) -> int:
        """Removes what nobody has written to for `untouched_s` seconds and nobody needs; returns how many files.

        That is uploads which were not committed, and files of ids that `known` does not return.
        """
        with _plain_problems():
            names = self._untouched(time.time() - untouched_s)
        unknown = [name for name in names if name.startswith(_INCOMING)]
        ids = [name for name in names if _ID.fullmatch(name)]
        for start in range(0, len(ids), ASKED_IDS):
            asked = ids[start : start + ASKED_IDS]
            kept = known(asked)
            unknown += [file_id for file_id in asked if file_id not in kept]
        with _plain_problems():
            return sum(_gone(self._folder / name) for name in unknown)

    def _untouched(self, before: float) -> list[str]:
        names = []
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process removes strays too
                    if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_mtime < before:
                        names.append(entry.name)
        return names

    def _path(self, file_id: str) -> Path:
        if not _ID.fullmatch(file_id):
            raise NotFound(_NOT_FOUND)
        return self._folder / file_id


class Incoming:
    """A file that is being written; as a context manager it is discarded unless it was committed."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Use `Spool.new`."""
        self.size = 0
        """Bytes written."""
        self._path = path
        self._file = file
        self._committed = False

    def write(self, data: bytes) -> None:
        """Appends. Raises a `Problem` when there is no room for all of it; then only `discard` makes sense."""
        rest = memoryview(data)
        with _plain_problems():
            while rest:  # it is not buffered, and a write may take a part only
                rest = rest[self._file.write(rest) :]
        self.size += len(data)

    def commit(self, file_id: str) -> None:
        """Makes it the file of that id, which survives a power cut once this returns."""
        if not _ID.fullmatch(file_id):
            raise ValueError("not the id of a file")
        with _plain_problems():
            os.fsync(self._file.fileno())
            self._file.close()
            self._path.replace(self._path.with_name(file_id))
            self._committed = True
            _sync_folder(self._path.parent)

    def discard(self) -> None:
        """Removes it, unless it was committed. Raises nothing: what stays for a fault is a stray."""
        with suppress(OSError):
            self._file.close()
        if not self._committed:
            with suppress(OSError):
                self._path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _make(folder: Path) -> None:
    # Path.mkdir gives its mode to the last folder alone.
    for each in (*reversed(folder.parents), folder):
        if not each.is_dir():
            each.mkdir(mode=0o700, exist_ok=True)


def _gone(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems sync no folders
            raise
    finally:
        os.close(fd)


@contextmanager
def _plain_problems(*, looking: bool = False) -> Iterator[None]:
    """What the system says is wrong, in words for the caller: without paths, which are the operator's."""
    try:
        yield
    except OSError as error:
        if looking and isinstance(error, FileNotFoundError):
            raise NotFound(_NOT_FOUND) from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Problem(507, "no_room", "there is no room for the file: try again later, or delete files") from None
        told = f"the folder of files can't be used ({error.strerror}): see MIMOQ_FILES_DIR"
        raise Problem(500, "files", told) from None
