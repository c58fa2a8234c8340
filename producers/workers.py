"""Worker processes that belong to a command: started, watched, started again, and ended with it.

A worker reads a pipe whose other end the command holds, so it drains and ends when the command is gone, kill -9
included. Its log goes to a file in the data folder.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from jobs.errors import MimoqError

#: Deaths of workers within `WINDOW_S` that a command puts up with.
DEATHS = 5
WINDOW_S = 60.0
RESTART_S = 0.2


class Workers:
    """The worker processes of one command."""

    def __init__(self, count: int, env: Mapping[str, str], log: Path) -> None:
        self._count = count
        self._env = dict(env)
        self._log = log
        self._children: list[subprocess.Popen[bytes]] = []
        self._deaths: deque[float] = deque()
        self._start_at = 0.0
        self._begun = False
        self.stopping = False
        self.deaths = 0

    def prepare(self) -> None:
        """Starts the processes up to where they would take jobs; that takes a second or so of importing."""
        for _ in range(self._count):
            self._children.append(self._spawn())

    def begin(self) -> None:
        """Lets the workers take jobs."""
        self._begun = True
        for child in self._children:
            _begin(child)

    def _spawn(self) -> subprocess.Popen[bytes]:
        descriptor = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "worker", "--lane", "bulk", "--exit-with-stdin", "--start-on-stdin"],
                env=self._env,
                stdin=subprocess.PIPE,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,
            )
        finally:
            os.close(descriptor)

    def ensure(self) -> None:
        """Replaces the dead. Raises `MimoqError` when they keep dying, or refuse their settings."""
        if self.stopping:
            return
        now = time.monotonic()
        for child in list(self._children):
            code = child.poll()
            if code is None:
                continue
            self._children.remove(child)
            _close(child)
            self.deaths += 1
            self._deaths.append(now)
            while self._deaths[0] < now - WINDOW_S:
                self._deaths.popleft()
            if code == 2 or len(self._deaths) > DEATHS:
                raise MimoqError(f"the worker process ended with {code}: {self._last_words()}")
            self._start_at = now + RESTART_S
        if now >= self._start_at:
            while len(self._children) < self._count:
                child = self._spawn()
                self._children.append(child)
                if self._begun:
                    _begin(child)

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return f"{lines[-1][:300] if lines else 'it said nothing'} (log: {self._log})"

    def stop(self) -> None:
        """Tells the workers to drain: calls in flight end, nothing new is started."""
        self.stopping = True
        for child in self._children:
            if child.poll() is None:
                child.terminate()

    def kill(self) -> None:
        """Ends the workers at once; what they held is given back when their leases run out."""
        self.stopping = True
        for child in self._children:
            if child.poll() is None:
                child.kill()

    @property
    def alive(self) -> int:
        """Processes that run."""
        return sum(child.poll() is None for child in self._children)

    def wait(self, timeout_s: float) -> bool:
        """Whether all ended within `timeout_s`."""
        end = time.monotonic() + timeout_s
        for child in self._children:
            try:
                child.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                return False
            _close(child)
        return True


def _begin(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has died; `ensure` sees to it
        child.stdin.write(b"\n")
        child.stdin.flush()


def _close(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it never read its byte
        child.stdin.close()
