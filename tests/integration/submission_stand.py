"""What tests of submitting do harm with: a wire that is cut at a command, producers that are killed, a Valkey that dies."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jobs.guard import remove_socket, server_command
from jobs.runtime import Runtime, ask
from tests.waiting import wait_for


def commands(data: bytes) -> tuple[list[bytes], bytes]:
    """The whole commands of what a Redis client has sent, and the rest."""
    found = []
    start = 0
    while (end := _end(data, start)) is not None:
        found.append(data[start:end])
        start = end
    return found, data[start:]


def _end(data: bytes, place: int) -> int | None:
    """Where the command that begins at `place` ends: `*2\\r\\n$3\\r\\nGET\\r\\n$1\\r\\nx\\r\\n`."""
    line = data.find(b"\r\n", place)
    if line < 0:
        return None
    parts = int(data[place + 1 : line])
    place = line + 2
    for _ in range(parts):
        line = data.find(b"\r\n", place)
        if line < 0:
            return None
        place = line + 2 + int(data[place + 1 : line]) + 2
    return place if place <= len(data) else None


class Wire:
    """A wire to a server's unix socket, cut once: at a command, counted from 1 over all connections.

    `where` is before the command is passed on, in its middle (half), or after the server has carried it out and before its
    reply is passed back.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        self._folder = tempfile.TemporaryDirectory(prefix="mimoq-test-", dir="/tmp")
        self.url = f"unix://{self._folder.name}/wire.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{self._folder.name}/wire.sock")
        self._listener.listen(50)
        self.mend()
        threading.Thread(target=self._accept, name="wire", daemon=True).start()

    def mend(self) -> None:
        """It is whole, and counts from 1."""
        self.seen: list[bytes] = []
        self.was_cut = False
        self._at, self._where = 0, ""
        self._on_cut: Callable[[], object] = lambda: None

    def cut(self, at: int, where: str, on_cut: Callable[[], object] = lambda: None) -> None:
        """Will be cut at that command; `on_cut` runs before anybody notices."""
        self.mend()
        self._at, self._where, self._on_cut = at, where, on_cut

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), name="wire", daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
            server.connect(self._server.removeprefix("unix://"))
            pending = b""
            while True:
                readable, _, _ = select.select([client, server], [], [])
                if server in readable:
                    if not (data := server.recv(1 << 16)):
                        return
                    client.sendall(data)
                if client in readable:
                    if not (data := client.recv(1 << 16)):
                        return
                    whole, pending = commands(pending + data)
                    for command in whole:
                        if not self._pass_on(command, server, client):
                            return

    def _pass_on(self, command: bytes, server: socket.socket, client: socket.socket) -> bool:
        """Whether the wire is still whole after this command."""
        self.seen.append(command.split(b"\r\n")[2].upper())
        if self.was_cut or len(self.seen) != self._at:
            server.sendall(command)
            return True
        server.sendall({"before": b"", "half": command[: len(command) // 2], "after": command}[self._where])
        # What got through is carried out before anybody notices.
        server.shutdown(socket.SHUT_WR)
        while server.recv(1 << 16):
            pass
        self._on_cut()
        self.was_cut = True
        return False

    def close(self) -> None:
        """Nobody gets through any more."""
        self._listener.close()
        self._folder.cleanup()


class Victims:
    """Producer processes, one after another, forked by `submitting.py`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("submitting.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._said() == "ready"
        self.pid = 0

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def submit(self, **told: Any) -> int:
        """How the next one ended: 0, or minus the number of its signal."""
        assert self._process.stdin is not None
        self.pid = 0
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        self.pid = int(self._said())
        return int(self._said())

    def kill(self) -> None:
        """`kill -9` of the present one, once it is known; for another thread."""
        os.kill(wait_for(lambda: self.pid, what="a producer"), signal.SIGKILL)

    def close(self) -> None:
        """Ends the one that forks."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


class Durable:
    """A Valkey as the product starts its own, append-only file and all, to be killed, paused and robbed of last writes."""

    def __init__(self, folder: Path) -> None:
        self._runtime = Runtime.of(folder)
        self.url = f"unix://{self._runtime.socket}"
        self._runtime.server_dir.mkdir(parents=True)
        self._runtime.make_socket_folder()
        self.start()

    def start(self) -> None:
        """Starts it (again) on its file and returns once it answers."""
        with self._runtime.server_log.open("ab") as log:
            self._process = subprocess.Popen(
                server_command(self._runtime), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_for(self._answers, what="an answer of Valkey")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return ask(self._runtime.socket, "PING") == "+PONG"
        return False

    @property
    def _file(self) -> Path:
        return next((self._runtime.server_dir / "appendonlydir").glob("*.incr.aof"))

    @property
    def written(self) -> int:
        """Bytes of its file."""
        return self._file.stat().st_size

    def kill(self, keep: int | None = None) -> None:
        """`kill -9`; with `keep`, its file then ends after so many bytes."""
        self._process.kill()
        self._process.wait()
        if keep is not None:
            os.truncate(self._file, keep)

    def pause(self) -> None:
        """SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends it."""
        self.resume()
        self.kill()
        remove_socket(self._runtime)


@contextlib.contextmanager
def durable(folder: Path) -> Iterator[Durable]:
    """A server that is ended whatever happens."""
    server = Durable(folder)
    try:
        yield server
    finally:
        server.close()
