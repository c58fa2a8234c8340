"""The most memory that another process has."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

SAMPLE_S = 0.01


def now_mb(process: psutil.Process) -> float:
    """What a process has at present."""
    return float(process.memory_info().rss / 1e6)


def ever_mb(process: psutil.Process) -> float:
    """A process's most memory so far where the system tells it, else what it has at present."""
    # Not by the child's `ru_maxrss`: that counts what its parent had when it was forked.
    with contextlib.suppress(FileNotFoundError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return now_mb(process)


class Peak:
    """The most that `look` sees of a process while this is open, in MB; 0 where it was gone before the first look."""

    def __init__(self, process: psutil.Process, look: Callable[[psutil.Process], float]) -> None:
        self._process, self._look = process, look
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.most_mb = 0.0

    def _watch(self) -> None:
        with contextlib.suppress(psutil.Error, OSError):
            while True:
                self.most_mb = max(self.most_mb, self._look(self._process))
                if self._over.wait(SAMPLE_S):
                    return

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
