"""Worker processes that belong to a command: started, watched, started again, and ended with it.

A worker reads a pipe whose other end the command holds, so it drains and ends when the command is gone, kill -9
included. Its settings reach it by the same pipe; its log goes to a file in the data folder.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobs.errors import MimoqError
from jobs.processes import Deaths, last_line, put_aside

RESTART_S = 0.2
#: What is to be rung for: batch id, lane, label of the upstream, times.
Rings = tuple[str, str, str, int]


@dataclass(frozen=True, slots=True)
class _Child:
    """One worker process, of one lane; no other of the command has its `place`."""

    lane: str
    place: int
    process: subprocess.Popen[bytes]
    started_at: float = field(default_factory=time.monotonic)


class Workers:
    """The worker processes of one command; `since` is the monotonic time at which the command began."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self._lanes: list[str] = []  # one for each process there should be
        self._told = b""
        self._log = Path(os.devnull)
        self._children: list[_Child] = []
        self._deaths = Deaths()
        self._start_at = 0.0
        self._patience_s = 5.0
        self.stopping = False

    def prepare(self, lane: str = "bulk") -> None:
        """Starts one process, up to where it would take jobs: importing takes it a second or so.

        A command does this first of all. The worker learns its settings when it may begin, and ends if it never may.
        """
        taken = {child.place for child in self._children}
        place = next(place for place in itertools.count() if place not in taken)
        self._children.append(_Child(lane, place, _spawn(lane, place)))

    def begin(
        self,
        lanes: Sequence[str],
        settings: Mapping[str, str],
        log: Path,
        drain_s: float,
        rings: Rings | None = None,
    ) -> None:
        """Lets a worker of each of `lanes` take jobs, with these `MIMOQ_...` variables over their environment's.

        The first of them rings for the command where there is anything to ring for, because it has Celery imported anyway.
        """
        self._lanes = list(lanes)
        self._patience_s = drain_s + 15
        told = {"settings": dict(settings), "log": str(log)}
        self._told = json.dumps(told).encode() + b"\n"
        first = json.dumps({**told, "rings": rings}).encode() + b"\n"
        self._log = log
        put_aside(log)
        for lane in self._missing():
            self.prepare(lane)
        for place, child in enumerate(self._children):
            self._tell(child, self._told if place else first)

    def _missing(self) -> list[str]:
        """The lanes of the processes that should be there and are not."""
        missing = list(self._lanes)
        for child in self._children:
            if child.lane in missing:
                missing.remove(child.lane)
        return missing

    def _tell(self, child: _Child, told: bytes) -> None:
        assert child.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died; `ensure` sees to it
            child.process.stdin.write(told)
            child.process.stdin.flush()

    def ensure(self) -> None:
        """Replaces the dead. Raises `MimoqError` when they keep dying, or refuse their settings."""
        if self.stopping:
            return
        now = time.monotonic()
        for child in list(self._children):
            code = child.process.poll()
            if code is None:
                continue
            self._children.remove(child)
            _close(child.process)
            if self._deaths.too_many(child.started_at, code) or code == 2:
                raise MimoqError(f"the worker process ended with {code}: {last_line(self._log)}")
            self._start_at = now + RESTART_S
        if now >= self._start_at:
            for lane in self._missing():
                self.prepare(lane)
                self._tell(self._children[-1], self._told)

    def stop(self) -> None:
        """Tells the workers to drain: calls in flight end, nothing new is started."""
        self.stopping = True
        for child in self._children:
            if child.process.poll() is None:
                child.process.terminate()

    def kill(self) -> None:
        """Ends the workers at once; what they held is given back when their leases run out."""
        self.stopping = True
        for child in self._children:
            if child.process.poll() is None:
                child.process.kill()

    @property
    def begun(self) -> bool:
        """Whether any have been let take jobs."""
        return bool(self._lanes)

    @property
    def alive(self) -> int:
        """Processes that run."""
        return sum(child.process.poll() is None for child in self._children)

    def end(self) -> None:
        """Tells the workers to drain, if nobody has, and waits until they are gone; those that hang are killed."""
        if not self.stopping:
            self.stop()
        end = time.monotonic() + self._patience_s
        for child in self._children:
            try:
                child.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            _close(child.process)
        self._children.clear()


def _spawn(lane: str, place: int) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-P", "-m", "worker", "--lane", lane, "--place", str(place)]
    return subprocess.Popen(
        [*argv, "--exit-with-stdin", "--start-on-stdin"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it never read its line
        process.stdin.close()
