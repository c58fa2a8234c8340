"""Where the embedded Valkey's files, locks and socket are, and how to ask whether it answers.

Imported by the guard, which must start fast: the standard library only.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

SOCKET_ROOT = Path("/tmp")  # noqa: S108 - $TMPDIR may be long, and differ between users of one folder; see private_folder


@dataclass(frozen=True)
class Runtime:
    """The places that belong to one data folder; `data_dir` is absolute and free of symbolic links.

    Three locks (flock, so that they end with their holders, however those end) make every race harmless:

    - `users_lock`: every user holds it shared. Whoever has it exclusively knows that there is no user, and keeps new
      ones waiting at the door.
    - `guard_lock`: held by the guard for its life. It is taken by whoever starts a guard and handed down to it, open
      and locked, so there is no moment in which two could start one, or a probe could be mistaken for a guard.
    - `server_lock`: handed down to Valkey in the same way and held by it and its forks alone. While it is taken, some
      process may write the append-only file, whatever became of its guard and its socket: never start another.
    """

    data_dir: Path
    users_lock: Path
    guard_lock: Path
    server_lock: Path
    failure: Path
    server_log: Path
    guard_log: Path
    server_dir: Path
    socket: Path

    @classmethod
    def of(cls, data_dir: Path) -> Runtime:
        data_dir = Path(os.path.realpath(data_dir))
        digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:12]
        return cls(
            data_dir=data_dir,
            users_lock=data_dir / "lock",
            guard_lock=data_dir / "guard.lock",
            server_lock=data_dir / "server.lock",
            failure=data_dir / "guard.failed",
            server_log=data_dir / "valkey.log",
            guard_log=data_dir / "guard.log",
            server_dir=data_dir / "valkey",
            # An address of a unix socket ends at 107 bytes (macOS: 103), a data folder's path anywhere.
            socket=SOCKET_ROOT / f"mimoq-{os.geteuid()}" / digest / "valkey.sock",
        )

    def make_socket_folder(self) -> None:
        """Raises OSError when it can't be made, or is not ours alone."""
        private_folder(self.socket.parent.parent)
        private_folder(self.socket.parent)


def private_folder(path: Path) -> None:
    """Make `path`, mode 0700, or see that it is such a folder of ours.

    Anyone may write into /tmp: another's folder under our name could put another's server behind our socket.
    """
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(0, "is not a folder of yours with mode 0700; remove it", str(path)) from None


def open_lock(path: Path) -> int:
    """A descriptor of a lock file, made if need be; no child inherits it."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Whether the lock is now ours; never waits. It is ours until the last copy of `fd` is closed."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def still_there(fd: int, path: Path) -> bool:
    """Whether `path` is still the file that `fd` has open; not so when someone removed the data folder."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def ask(address: Path, command: str, *, timeout_s: float = 1.0) -> str:
    """Valkey's reply to one inline command, an error reply with its leading `-`. Raises OSError when there is none.

    A bare socket: a Redis client takes long to import, and seconds to retry before it admits that nobody listens.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(str(address))
        connection.sendall(f"{command}\r\n".encode())
        with connection.makefile("rb") as reply:
            head = reply.readline()
            if not head:
                raise ConnectionResetError(0, "closed without an answer")
            body = reply.read(int(head[1:])) if head.startswith(b"$") else head
    return body.decode(errors="replace").strip()


def last_words(log: Path) -> str:
    """The last three lines of `log` as one line of at most 400 characters."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4000))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return one_line(" | ".join(line.strip() for line in lines[-3:]))[-400:]


def one_line(text: str) -> str:
    """`text` without anything that breaks a line or a terminal."""
    return "".join(c if c.isprintable() else " " for c in text).strip()
