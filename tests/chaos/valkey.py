"""The store that chaos has: a Valkey with an append-only file, started as the product starts its own, and harmed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from jobs.guard import remove_socket, server_command
from jobs.processes import spawn_detached
from jobs.runtime import Runtime, ask
from tests.chaos.spans import Span
from tests.waiting import wait_for


class Valkey:
    """One Valkey after another on the same file; `away` are the spans in which it did not answer."""

    def __init__(self, folder: Path) -> None:
        """Starts it and returns once it answers."""
        self._runtime = Runtime.of(folder)
        self.url = f"unix://{self._runtime.socket}"
        self.away: list[Span] = []
        self._paused = False
        self._runtime.server_dir.mkdir(parents=True)
        self._runtime.make_socket_folder()
        self._process = self._spawn()
        wait_for(self.answers, what="an answer of Valkey")

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._runtime.socket.unlink(missing_ok=True)
        return spawn_detached(server_command(self._runtime), log=self._runtime.server_log)

    @property
    def _dead(self) -> bool:
        return self._process.poll() is not None

    @property
    def is_away(self) -> bool:
        return bool(self.away) and self.away[-1].end > time.time()

    def answers(self, timeout_s: float = 0.2) -> bool:
        with contextlib.suppress(OSError):
            return ask(self._runtime.socket, "PING", timeout_s=timeout_s) == "+PONG"
        return False

    def ask(self, command: str) -> str:
        """The reply to one inline command. Raises OSError when it does not answer."""
        return ask(self._runtime.socket, command, timeout_s=1.0)

    def kill(self) -> None:
        """`kill -9`."""
        self.away.append(Span(time.time()))
        self._process.kill()
        self._process.wait()

    def start(self) -> None:
        """Starts it again on its file; `look` tells when it answers."""
        self._process = self._spawn()

    def pause(self) -> None:
        """SIGSTOP."""
        self.away.append(Span(time.time()))
        self._paused = True
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT, if it is paused."""
        if self._paused:
            os.kill(self._process.pid, signal.SIGCONT)
            self._paused = False

    def look(self) -> bool:
        """Whether it is there; notes when it is again."""
        if self.is_away and not self._dead and not self._paused and self.answers():
            self.away[-1].end = time.time()
        return not self.is_away

    def close(self) -> None:
        """Ends it."""
        self.resume()
        self._process.kill()
        self._process.wait()
        remove_socket(self._runtime)
