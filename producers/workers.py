"""Worker processes that belong to a command: started, watched, started again, and ended with it.

A worker reads a pipe whose other end the command holds, so it drains and ends when the command is gone, kill -9
included. Its settings reach it by the same pipe; its log goes to a file in the data folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from jobs.errors import MimoqError
from jobs.processes import Deaths

RESTART_S = 0.2
#: A log of earlier workers that is longer is put aside (one is kept).
LOG_BYTES = 10_000_000


#: What is to be rung for: batch id, lane, label of the upstream, times.
Rings = tuple[str, str, str, int]


class Workers:
    """The worker processes of one command; `since` is the monotonic time at which the command began."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self._count = 0
        self._told = b""
        self._log = Path(os.devnull)
        self._children: list[subprocess.Popen[bytes]] = []
        self._started_at: dict[int, float] = {}  # by process id
        self._deaths = Deaths()
        self._start_at = 0.0
        self._patience_s = 5.0
        self.stopping = False

    def prepare(self) -> None:
        """Starts one process, up to where it would take jobs: importing takes it a second or so.

        A command does this first of all. The worker learns its settings when it may begin, and ends if it never may.
        """
        self._add(_spawn())

    def begin(self, count: int, settings: Mapping[str, str], log: Path, drain_s: float, rings: Rings) -> None:
        """Lets `count` workers take jobs, with these `MIMOQ_...` variables over their environment's.

        The first of them does the ringing for the command, because it has Celery imported anyway.
        """
        self._count = count
        self._patience_s = drain_s + 15
        told = {"settings": dict(settings), "log": str(log)}
        self._told = json.dumps(told).encode() + b"\n"
        first = json.dumps({**told, "rings": rings}).encode() + b"\n"
        self._log = log
        if log.exists() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_name(log.name + ".1"))
        while len(self._children) < count:
            self.prepare()
        for place, child in enumerate(self._children):
            self._tell(child, self._told if place else first)

    def _tell(self, child: subprocess.Popen[bytes], told: bytes) -> None:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died; `ensure` sees to it
            child.stdin.write(told)
            child.stdin.flush()

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
            if self._deaths.too_many(self._started_at.pop(child.pid), code) or code == 2:
                raise MimoqError(f"the worker process ended with {code}: {self._last_words()}")
            self._start_at = now + RESTART_S
        if now >= self._start_at:
            while len(self._children) < self._count:
                self._tell(self._add(_spawn()), self._told)

    def _add(self, child: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        self._children.append(child)
        self._started_at[child.pid] = time.monotonic()
        return child

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
    def begun(self) -> bool:
        """Whether any have been let take jobs."""
        return self._count > 0

    @property
    def alive(self) -> int:
        """Processes that run."""
        return sum(child.poll() is None for child in self._children)

    def end(self) -> None:
        """Tells the workers to drain, if nobody has, and waits until they are gone; those that hang are killed."""
        if not self.stopping:
            self.stop()
        end = time.monotonic() + self._patience_s
        for child in self._children:
            try:
                child.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            _close(child)
        self._children.clear()


def _spawn() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "worker", "--lane", "bulk", "--exit-with-stdin", "--start-on-stdin"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _close(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it never read its line
        child.stdin.close()
